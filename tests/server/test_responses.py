"""POST /v1/responses, as the openai SDK and Codex use it.

Real server processes answer, on a tiny model.
"""

import json
import signal

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from support.chat_http import FLAGS, KEYS, transcript, user, words, write_keys
from support.server_process import ServerProcess

EVENT = TypeAdapter(ResponseStreamEvent)


def sdk(server: ServerProcess, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key=key, max_retries=0)


def create(server: ServerProcess, status: int = 200, **body) -> dict:
    response = server.client.post(
        "/responses", json={"temperature": 0, "max_output_tokens": 6, **body}
    )
    assert response.status_code == status, response.text
    return response.json()


def events(response: httpx.Response) -> list[dict]:
    """Return a stream's events; each is what its event line says, and what openai's types hold."""
    found = []
    for block in response.text.split("\n\n"):
        if block and not block.startswith(":"):
            name, data = block.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    assert [e["sequence_number"] for e in found] == list(range(len(found)))
    return found


def text(response: dict) -> str:
    return "".join(
        part["text"]
        for item in response["output"]
        if item["type"] == "message"
        for part in item["content"]
    )


def test_the_sdk_reads_an_answer_and_can_ask_for_it_again(server):
    with sdk(server) as client:
        made = client.responses.create(
            model="default",
            input=words(30, 1),
            instructions="w9 w10",
            max_output_tokens=6,
            temperature=0,
        )
        again = client.responses.retrieve(made.id)
        assert (made.status, made.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert made.output_text and made.output[0].content[0].type == "output_text"
        assert made.usage.input_tokens_details.cached_tokens == made.agentmem["cached_tokens"]
        assert again.model_dump(warnings=False) == made.model_dump(warnings=False)
        client.responses.delete(made.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(made.id)


def test_every_event_of_a_stream_is_one_of_openais_and_in_its_order(server):
    body = {"input": words(9, 2), "stream": True, "temperature": 0, "max_output_tokens": 4}
    found = events(server.client.post("/responses", json=body))
    for event in found:
        EVENT.validate_python(event, strict=False)
    kinds = [e["type"].removeprefix("response.") for e in found]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    said = "".join(e["delta"] for e in found if e["type"].endswith("text.delta"))
    assert said == found[-4]["text"] == text(found[-1]["response"])
    Response.model_validate(found[-1]["response"])
    assert (
        server.client.get(f"/responses/{found[-1]['response']['id']}").json()
        == found[-1]["response"]
    )


def test_the_sdks_stream_ends_with_the_answer_that_it_would_get_at_once(server):
    asked = {"model": "default", "input": words(12, 3), "temperature": 0, "max_output_tokens": 900}
    with sdk(server) as client:
        with client.responses.stream(**asked, extra_body={"agent_id": "streamed"}) as stream:
            deltas = [e.delta for e in stream if e.type == "response.output_text.delta"]
        whole = client.responses.create(**asked)
    assert "".join(deltas) == whole.output_text


def test_a_chain_of_responses_is_answered_as_the_whole_conversation_would_be_and_is_cached(server):
    said, previous = [], None
    with sdk(server) as client:
        for seed in range(4):
            asked = {"role": "user", "content": words(25, seed)}
            made = client.responses.create(
                model="default",
                input=[asked],
                previous_response_id=previous,
                temperature=0,
                max_output_tokens=6,
                extra_body={"agent_id": "chain"},
            )
            said.append(asked)
            full = server.chat(said, agent=f"whole {seed}", max_tokens=6)
            assert made.output_text == full["choices"][0]["message"]["content"]
            if previous:
                assert made.previous_response_id == previous
                assert (
                    made.usage.input_tokens_details.cached_tokens
                    >= made.usage.input_tokens - 25 - 7
                )
            said.append({"role": "assistant", "content": made.output_text})
            previous = made.id
    assert transcript(server, "chain")["messages"] == said


def test_instructions_are_of_one_response_alone_and_go_before_all_that_was_said(server):
    first = create(server, input=words(5, 1), instructions="w50 w51", agent_id="told")
    second = create(server, input=words(5, 2), instructions="w60", previous_response_id=first["id"])
    said = [user(5, 1), {"role": "assistant", "content": text(first)}, user(5, 2)]
    plain = server.chat([{"role": "system", "content": "w60"}, *said], agent="plain", max_tokens=6)
    assert text(second) == plain["choices"][0]["message"]["content"]
    shown = transcript(server, "told")
    assert [turn["instructions"] for turn in shown["turns"]] == ["w50 w51", "w60"]
    assert shown["messages"][:3] == said
    assert (
        create(server, input=words(5, 3), previous_response_id=second["id"])["instructions"] is None
    )


def test_two_answers_to_one_response_are_branches(server):
    first = create(server, input=words(9, 1), agent_id="fork")
    branches = [create(server, input=words(4, n), previous_response_id=first["id"]) for n in (2, 3)]
    for n, branch in zip((2, 3), branches, strict=True):
        assert transcript(server, "fork", turn=branch["id"])["messages"][2] == user(4, n)


def test_a_response_that_is_not_there_not_stored_or_deleted_cannot_be_followed(server):
    unstored = create(server, input="w9", store=False)
    deleted = create(server, input="w9")
    kept = create(server, input="w10", previous_response_id=deleted["id"])
    assert server.client.delete(f"/responses/{deleted['id']}").json()["deleted"] is True
    for gone in ("resp_nothing", unstored["id"], deleted["id"]):
        error = create(server, 404, input="w9", previous_response_id=gone)["error"]
        assert (error["code"], error["param"]) == (
            "previous_response_not_found",
            "previous_response_id",
        )
        assert server.client.get(f"/responses/{gone}").status_code == 404
        assert server.client.delete(f"/responses/{gone}").status_code == 404
    # what follows keeps what was said
    assert create(server, input="w11", previous_response_id=kept["id"])["status"]


def test_codex_sends_its_whole_history_each_turn_and_all_of_it_is_cached(server):
    head = {"thread-id": "thread-1", "session-id": "s"}
    rest = {
        "model": "default",
        "instructions": words(20, 5),
        "tool_choice": "auto",
        "tools": [{"type": "web_search"}, {"type": "namespace", "name": "mcp", "tools": []}],
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "include": ["reasoning.encrypted_content"],
        "text": {"verbosity": "low"},
        "store": False,
        "stream": True,
        "prompt_cache_key": "thread-1",
        "client_metadata": {"x": "y"},
        "max_output_tokens": 6,
        "temperature": 0,
    }
    before = 0
    said = [
        {
            "type": "message",
            "role": "developer",
            "content": [{"type": "input_text", "text": words(10, 6)}],
        }
    ]
    for turn in range(3):
        said.append(
            {
                "type": "message",
                "role": "user",
                "content": [{"type": "input_text", "text": words(15, turn)}],
            }
        )
        done = events(server.client.post("/responses", json={**rest, "input": said}, headers=head))
        item = next(e["item"] for e in done if e["type"] == "response.output_item.done")
        response = done[-1]["response"]
        assert (
            response["agentmem"]["agent_id"] == "thread-1" and response["agentmem"]["turn"] is None
        )
        assert response["usage"]["input_tokens_details"]["cached_tokens"] >= before
        before = response["usage"]["input_tokens"]
        said.append({"type": "message", "role": "assistant", "content": item["content"]})
    assert server.client.get("/agents/thread-1/transcript").status_code == 404


def test_a_context_that_is_too_long_is_an_event_of_a_stream_and_else_a_status(server):
    error = create(server, 400, input=words(1100, 1))["error"]
    assert error["code"] == "context_length_exceeded"
    found = events(server.client.post("/responses", json={"input": words(1100, 1), "stream": True}))
    assert [e["type"] for e in found] == [
        "response.created",
        "response.in_progress",
        "response.failed",
    ]
    assert found[-1]["response"]["error"]["code"] == "context_length_exceeded"


def test_a_prewarm_fills_the_cache_and_leaves_nothing_else(server):
    body = {"input": words(60, 77), "agent_id": "warm", "prompt_cache_options": {"prewarm": True}}
    warmed = create(server, **body)
    assert (warmed["status"], warmed["output"], warmed["usage"]["output_tokens"]) == (
        "completed",
        [],
        0,
    )
    assert server.client.get("/agents/warm/transcript").status_code == 404
    asked = create(server, input=words(60, 77), agent_id="warm")
    assert (
        asked["usage"]["input_tokens_details"]["cached_tokens"]
        == warmed["usage"]["input_tokens"] - 1
    )


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "schema": 1}}}, "text.format.schema"),
        ({"background": True}, "background"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["w9"]}, "input"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input.0.content.0",
        ),
    ],
)
def test_what_would_not_be_honoured_is_refused(server, body, param):
    error = create(server, 400, **{"input": "w9", **body})["error"]
    assert error["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        {"truncation": "auto", "background": None, "text": None, "max_tool_calls": 3},
        {"stream_idle": 1, "service_tier": "flex", "stream_options": {"include_obfuscation": True}},
        {"reasoning": {"effort": "high", "summary": "auto"}, "text": {"verbosity": "low"}},
        {"context_management": [{"type": "compaction"}], "include": ["web_search_call.results"]},
    ],
)
def test_what_is_no_more_than_a_wish_passes(server, body):
    assert create(server, input="w9", max_output_tokens=2, **body)["output"]


def test_chains_survive_a_kill_of_the_server(model, tmp_path):
    home = tmp_path / "home"
    with ServerProcess(home, *FLAGS, model=model) as server:
        first = create(server, input=words(40, 1), agent_id="kept")
        second = create(server, input=words(5, 2), previous_response_id=first["id"])
        named = transcript(server, "kept")
        server.client.post("/store/gc")  # what was written before it is on disk then
        server.process.send_signal(signal.SIGKILL)
    with ServerProcess(home, *FLAGS, model=model) as server:
        assert server.client.get(f"/responses/{second['id']}").json() == second
        asked = {"model": "default", "input": words(5, 3), "max_output_tokens": 6, "temperature": 0}
        with sdk(server) as client:
            with client.responses.stream(**asked, previous_response_id=second["id"]) as stream:
                said = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
            again = client.responses.retrieve(second["id"])
            assert again.output_text == text(second) and again.previous_response_id == first["id"]
        assert transcript(server, "kept")["messages"][:4] == named["messages"]
        plain = server.chat([*named["messages"], user(5, 3)], agent="plain", max_tokens=6)
        assert said == plain["choices"][0]["message"]["content"]
        assert server.stop() == 0


def test_a_namespace_knows_nothing_of_another_ones_responses(model, tmp_path):
    keys = write_keys(tmp_path / "keys.toml")
    with ServerProcess(tmp_path / "home", *FLAGS, "--api-keys", str(keys), model=model) as server:
        with sdk(server, KEYS["a"]) as a, sdk(server, KEYS["b"]) as b:
            made = a.responses.create(model="default", input="w9 w10", max_output_tokens=2)
            assert a.responses.retrieve(made.id).id == made.id
            for ask in (
                lambda: b.responses.retrieve(made.id),
                lambda: b.responses.delete(made.id),
                lambda: b.responses.create(
                    model="default", input="w9", previous_response_id=made.id
                ),
            ):
                with pytest.raises(openai.NotFoundError):
                    ask()
            assert a.responses.create(
                model="default", input="w9", previous_response_id=made.id, max_output_tokens=2
            )
        assert server.stop() == 0
