"""`agentmem status`, as a process: beside a real server on a tiny model, beside sick ones, and
without one.
"""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from support.commands import KEY, chat
from support.server_process import ServerProcess
from support.tiny import BLOCK
from support.tiny_model_dir import write_tiny_model

UNHEALTHY = 1


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("status")
    keys = directory / "keys.toml"
    keys.write_text(f'default = "{KEY}"\n')
    keys.chmod(0o600)
    flags = ("--block-size", str(BLOCK), "--kv-budget", "64M", "--api-keys", str(keys))
    with ServerProcess(
        directory / "home", *flags, model=write_tiny_model(directory / "tiny")
    ) as server:
        server.client.headers["x-api-key"] = KEY
        yield server
        assert server.stop() == 0


def status(url: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    plain = {k: v for k, v in os.environ.items() if not k.startswith("AGENTMEM_")}
    command = [sys.executable, "-m", "agentmem", "status", *arguments]
    environment = plain | environment | {"AGENTMEM_URL": url}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def test_status_shows_model_agents_and_budgets(server):
    for name in ("alice", "bob"):
        chat(server, name, 1)
    server.client.post("/agents/alice/pin")
    done = status(server.url, "--api-key", KEY, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (
        found["status"] == "ok"
        and found["model"].endswith("/tiny")
        and found["max_context"] == 1024
    )
    assert (found["agents"]["total"], found["agents"]["hot"], found["agents"]["pinned"]) == (
        2,
        2,
        1,
    )
    assert 0 < found["ram_bytes"] <= found["kv_budget"] == 64 << 20
    assert 0 < found["process_bytes"] <= found["memory_limit"]
    assert 0 < found["store"]["disk_bytes"] <= found["store"]["room_bytes"]
    assert 0 < found["uptime"] < 600
    shown = status(server.url, "--api-key", KEY)
    assert (shown.returncode, shown.stderr) == (0, "")
    address = server.url.removesuffix("/v1")
    for text in (
        f"agentmem {found['version']} at {address}",
        ": ok",
        "1,024 tokens",
        "2 hot",
        "of 67.1 MB",
    ):
        assert text in shown.stdout, shown.stdout


def test_without_a_key_the_agents_are_not_told(server):
    done = status(server.url)
    assert done.returncode == 0 and "API key" in done.stdout and "hot" not in done.stdout
    assert json.loads(status(server.url, "--json").stdout)["agents"] is None


def test_no_proxy_is_asked_for_a_server_on_this_machine(server):
    assert status(server.url, "--api-key", KEY, HTTP_PROXY="http://127.0.0.1:9").returncode == 0


def test_where_nobody_answers_it_says_so():
    done = status("http://127.0.0.1:1")
    assert (done.returncode, done.stdout) == (UNHEALTHY, "")
    assert done.stderr.count("\n") == 1 and "no server answers at http://127.0.0.1:1" in done.stderr


@pytest.mark.parametrize(
    ("code", "body", "said"),
    [
        (200, b"[]", "agentmem server?"),
        (200, b'{"status": "ok"}', "agentmem server?"),
        (404, b"{}", "agentmem server?"),
    ],
)
def test_what_is_no_agentmem_server_is_called_so(code, body, said):
    with answering(code, body) as url:
        done = status(url)
    assert done.returncode == UNHEALTHY and said in done.stderr and done.stdout == ""


class answering:
    """A server that always answers the same."""

    def __init__(self, code: int, body: bytes):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(code)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> str:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_a_failed_server_is_shown_with_its_problem_and_exit_code_1(server):
    health = server.client.get(server.url.removesuffix("/v1") + "/health").json()
    sick = health | {"status": "failed", "errors": ["the engine fell over"]}
    with answering(503, json.dumps(sick).encode()) as url:
        done = status(url)
        as_json = status(url, "--json")
    assert (done.returncode, done.stderr) == (UNHEALTHY, "")
    assert ": failed" in done.stdout and "the engine fell over" in done.stdout
    assert as_json.returncode == UNHEALTHY and json.loads(as_json.stdout)["status"] == "failed"
