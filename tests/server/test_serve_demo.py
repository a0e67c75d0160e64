"""The whole path over HTTP: a server process on the demo model, stopped, killed, started again."""

import json
import pydoc_data.topics
import signal
import subprocess
import sys
import time
from urllib.parse import quote

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.server_process import ServerProcess

pytestmark = pytest.mark.demo


def conversation() -> list[dict[str, str]]:
    """Return a chat of about 1,000 tokens."""
    text = pydoc_data.topics.topics["assignment"] + pydoc_data.topics.topics["yield"]
    return [
        {"role": "system", "content": "You answer questions about a text, in one short sentence."},
        {"role": "user", "content": text[:4300] + "\n\nWhat is this text about?"},
    ]


def second_turn(first: dict) -> list[dict[str, str]]:
    answer = {"role": "assistant", "content": first["choices"][0]["message"]["content"]}
    return [*conversation(), answer, {"role": "user", "content": "Which language is it about?"}]


def wait_until_idle_and_saved(server: ServerProcess) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        store = server.client.get(server.url.removesuffix("/v1") + "/health").json()["store"]
        if store["blocks"] >= 3 and store["tail_bytes"] and not store["backlog_bytes"]:
            return
        time.sleep(0.1)
    raise AssertionError(f"not saved: {store}")


def test_the_next_turn_after_a_restart_or_a_kill_skips_prefill_and_says_the_same(
    tmp_path, demo_model_dir
):
    with ServerProcess(tmp_path / "control", model=demo_model_dir) as control:
        first = control.chat(conversation())
        assert 900 < first["usage"]["prompt_tokens"] < 1100
        assert first["agentmem"]["cache"] == "cold"
        expected = control.chat(second_turn(first))
        assert expected["agentmem"]["cache"] == "hot"
        assert control.stop() == 0
    earlier = first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"]

    home = tmp_path / "stopped"
    with ServerProcess(home, model=demo_model_dir) as server:
        assert server.chat(conversation())["choices"] == first["choices"]
        assert server.stop(signal.SIGTERM) == 0
    with ServerProcess(home, model=demo_model_dir) as server:
        warm = server.chat(second_turn(first))
        assert warm["agentmem"]["cache"] == "warm"
        assert warm["usage"]["prompt_tokens_details"]["cached_tokens"] >= 0.95 * earlier
        assert warm["choices"][0]["message"] == expected["choices"][0]["message"]
        assert warm["agentmem"]["ttft_ms"] < first["agentmem"]["ttft_ms"] / 4
        wait_until_idle_and_saved(server)
        server.stop(signal.SIGKILL)

    for tail in home.rglob("tails/*"):
        tail.unlink()  # as if killed before the tail was due: only sealed blocks are left
    with ServerProcess(home, model=demo_model_dir) as server:
        killed = server.chat(second_turn(first))
        assert killed["agentmem"]["cache"] == "warm"
        assert killed["agentmem"]["cached_tokens"] == killed["usage"]["prompt_tokens"] // 256 * 256
        assert killed["choices"][0]["message"] == expected["choices"][0]["message"]
        assert server.stop(signal.SIGINT) == 0


def test_the_openai_sdk_streams_the_answer_it_gets_at_once(tmp_path, demo_model_dir):
    with ServerProcess(tmp_path, model=demo_model_dir) as server:
        client = openai.OpenAI(base_url=server.url, api_key="none")
        ask = {
            "model": "default",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "temperature": 0,
            "extra_body": {"agent_id": "alice"},
        }
        whole = client.chat.completions.create(**ask)
        assert "Paris" in whole.choices[0].message.content
        chunks = list(
            client.chat.completions.create(
                **ask, stream=True, stream_options={"include_usage": True}
            )
        )
        assert (
            "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            == whole.choices[0].message.content
        )
        assert chunks[-1].usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 1
        scraped = server.client.get(server.url.removesuffix("/v1") + "/metrics")
        families = {f.name: f for f in text_string_to_metric_families(scraped.text)}
        assert {
            s.labels["cache"]: s.value
            for s in families["agentmem_requests"].samples
            if "total" in s.name
        } == {
            "cold": 1,
            "hot": 1,
        }
        client.close()
        assert server.stop() == 0


BAD = [
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"temperature": "hot"}, "temperature"),
    ({"agent_id": "x" * 300}, "agent_id"),
    ({"agent_id": "a\0b"}, "agent_id"),
    ({"agent_id": ""}, "agent_id"),
    ({"agent_id": 7}, "agent_id"),
    ({"messages": [{"role": "user", "content": "word " * 9000}]}, "messages"),
    ({"messages": [{"role": "king", "content": "hello"}]}, "messages"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages"),
    ({"padding": "x" * 10_000_000}, None),
]


def test_bad_requests_get_a_clear_400_and_leave_the_store_as_it_was(tmp_path, demo_model_dir):
    def files():
        return {p: p.read_bytes() for p in sorted(tmp_path.rglob("store/*/*")) if p.is_file()}

    with ServerProcess(tmp_path, model=demo_model_dir) as server:
        hello = [{"role": "user", "content": "hello"}]
        server.chat(hello, max_tokens=2)
        time.sleep(4)  # past the tail's delay
        before = files(), server.client.get("/agents").json()
        for change, param in BAD:
            body = {"messages": hello, "agent_id": "alice", "max_tokens": 2} | change
            headers = {"content-type": "application/json"}
            response = server.client.post(
                "/chat/completions", content=json.dumps(body), headers=headers
            )
            error = response.json()["error"]
            assert response.status_code == 400, (change, response.text[:200])
            assert param is None or error["param"].startswith(param), error
            assert error["message"] and error["type"] == "invalid_request_error"
        for content in (b"", b"[1]", b"{", b"\xff\xfe"):
            assert (
                server.client.post(
                    "/chat/completions", content=content, headers=headers
                ).status_code
                == 400
            )
        assert (files(), server.client.get("/agents").json()) == before
        for name in ("../../etc/passwd", "a/b", "🦊 ü"):
            assert server.chat(hello, agent=name, max_tokens=2)["agentmem"]["agent_id"] == name
            assert server.client.delete(f"/agents/{quote(name, safe='')}").json() == {
                "agent_id": name,
                "deleted": True,
            }
        names = [a["agent_id"] for a in server.client.get("/agents").json()["data"]]
        assert names == ["alice"]
        assert server.stop() == 0


@pytest.mark.parametrize("model", ["/no/such/model", "nope", "--"])
def test_a_missing_model_is_one_line_and_exit_code_2(tmp_path, model):
    command = [
        sys.executable,
        "-m",
        "agentmem",
        "serve",
        "--home",
        str(tmp_path),
        "--port",
        "0",
        f"--model={model}",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1 and "Traceback" not in result.stderr
    assert model in result.stderr
