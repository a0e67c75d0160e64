"""A server that can be left running: who gets in, how often, and who is waited for."""

import asyncio
import contextlib
import socket
import time

import httpx
import openai
import pytest
import uvicorn

from agentmem.config import Settings
from agentmem.errors import StartupError
from agentmem.server import run
from agentmem.server.app import create_app
from agentmem.server.auth import read_api_keys
from agentmem.server.connection import PatientConnection
from agentmem.server.rate_limits import Allowance
from support.chat_http import KEYS, write_keys
from support.fake_engine import FakeEngine
from support.server_process import ServerProcess

HELLO = {"messages": [{"role": "user", "content": "hello"}]}
HURRIED = ("--client-timeout", "0.5", "--log-level", "debug")
HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
)


class Started(Exception):
    """The server got as far as to start the engine."""


async def start():
    raise Started


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_a_server_without_keys_does_not_listen_beyond_its_machine(host, tmp_path):
    settings = Settings(home=tmp_path, host=host, port=0)
    with pytest.raises(StartupError, match="--api-keys FILE, or --insecure"):
        run.serve(start, settings, print)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.5", "localhost", "::1"])
def test_it_listens_on_this_machine(host, tmp_path):
    with pytest.raises(Started):
        run.serve(start, Settings(home=tmp_path, host=host, port=0), print)


def test_with_keys_or_if_meant_it_listens_everywhere(tmp_path):
    keys = write_keys(tmp_path / "keys.toml")
    for given in ({"api_keys": keys}, {"insecure": True}):
        with pytest.raises(Started):
            run.serve(start, Settings(home=tmp_path, host="0.0.0.0", port=0, **given), print)


def test_what_was_used_up_comes_back_in_a_minute(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    allowance = Allowance(60)
    assert allowance.wait(60) == 0
    allowance.use(60)
    assert allowance.wait(1) == pytest.approx(1)
    allowance.use(30)
    assert allowance.wait(1) == pytest.approx(31)
    now += 31
    assert allowance.wait(1) == pytest.approx(0)
    now += 1000
    assert allowance.wait(60) == 0 and allowance.wait(61) > 0


def limited(tmp_path, **limits):
    """Return a client of a server that knows KEYS, in this process."""
    settings = Settings(home=tmp_path, api_keys=write_keys(tmp_path / "keys.toml"), **limits)
    app = create_app(FakeEngine(), settings, read_api_keys(settings.api_keys))
    transport = httpx.ASGITransport(app)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


def test_a_key_that_asks_too_often_is_told_when_to_come_again(tmp_path):
    async def ask():
        async with limited(tmp_path, requests_per_minute=2) as client:
            answers = {}
            for name in ("a", "a", "a", "b"):
                headers = {"authorization": f"Bearer {KEYS[name]}"}
                answer = await client.post("/v1/chat/completions", json=HELLO, headers=headers)
                answers.setdefault(name, []).append(answer)
            free = await client.get("/v1/models", headers={"x-api-key": KEYS["a"]})
            assert free.status_code == 200
            return answers

    answers = asyncio.run(ask())
    assert [answer.status_code for answer in answers["a"]] == [200, 200, 429]
    assert [answer.status_code for answer in answers["b"]] == [200]
    refused = answers["a"][2]
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    error = refused.json()["error"]
    assert error["code"] == "rate_limit_exceeded" and "2 requests a minute" in error["message"]


@pytest.mark.parametrize("body", [{}, {"stream": True}])
def test_tokens_that_were_computed_count(body, tmp_path):
    async def ask():
        async with limited(tmp_path, tokens_per_minute=3) as client:
            headers = {"authorization": f"Bearer {KEYS['a']}"}
            answers = []
            for _ in range(2):
                answer = await client.post(
                    "/v1/chat/completions", json=HELLO | body, headers=headers
                )
                answers.append(answer)
            return answers

    first, second = asyncio.run(ask())
    assert (first.status_code, second.status_code) == (200, 429)
    assert "3 tokens a minute" in second.json()["error"]["message"]


def test_the_sdk_sees_a_rate_limit(tmp_path):
    async def ask():
        async with limited(tmp_path, requests_per_minute=1) as http:
            given = {"base_url": "http://localhost/v1", "api_key": KEYS["a"], "max_retries": 0}
            client = openai.AsyncOpenAI(**given, http_client=http)
            await client.chat.completions.create(model="default", **HELLO)
            with pytest.raises(openai.RateLimitError):
                await client.chat.completions.create(model="default", **HELLO)

    asyncio.run(ask())


@pytest.fixture(scope="module")
def hurried(model, tmp_path_factory):
    """A server that waits for nobody for longer than half a second, and one for its word."""
    home = tmp_path_factory.mktemp("hurried") / "home"
    with ServerProcess(home, *HURRIED, model=model) as server:
        yield server
        assert server.client.get("/models").status_code == 200
        assert server.stop() == 0


def connect(server):
    host, port = server.url.removeprefix("http://").removesuffix("/v1").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def answer_to(server, *pieces, pause=0.0):
    """Return what comes back for a request in pieces, until the server closes the connection."""
    with connect(server) as connection:
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
        data = b""
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(4096):
                data += piece
        return data


def test_a_body_that_does_not_come_is_answered_408(hurried):
    began = time.monotonic()
    said = answer_to(hurried, HEAD + b"content-length: 100\r\n\r\n{", b"")
    assert b"408 Request Timeout" in said and b"request_timeout" in said
    assert time.monotonic() - began < 20


def test_a_body_that_trickles_is_waited_for(hurried):
    body = b'{"messages": [{"role": "user", "content": "w8"}], "max_tokens": 2}'
    head = HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
    pieces = [body[i : i + 20] for i in range(0, len(body), 20)]
    assert b"200 OK" in answer_to(hurried, head, *pieces, pause=0.3)


@pytest.mark.parametrize("pieces", [[HEAD], [b""], [b"x-%d: y\r\n" % i for i in range(40)]])
def test_a_head_that_does_not_end_is_dropped(pieces, hurried):
    began = time.monotonic()
    said = answer_to(hurried, HEAD if len(pieces) > 1 else b"", *pieces, pause=0.25)
    assert said == b"" and 1 < time.monotonic() - began < 25


def test_a_client_that_takes_nothing_is_dropped():
    asyncio.run(_serve_a_client_that_takes_nothing())


async def _serve_a_client_that_takes_nothing():
    """Another one, meanwhile, gets all that it asked for."""
    ends = {}

    async def app(scope, receive, send):
        name = scope["path"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        watch = asyncio.create_task(_gone(receive))
        for _ in range(256):  # MB
            await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
            if watch.done():
                break
        ends[name] = "dropped" if watch.done() else "served"
        watch.cancel()
        await send({"type": "http.response.body", "body": b""})

    def protocol(**options):
        return PatientConnection(**options, patience=0.5)

    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    config = uvicorn.Config(app, http=protocol, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve([sock]))
    port = sock.getsockname()[1]
    _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    writer.transport.pause_reading()
    writer.write(b"GET /slow HTTP/1.1\r\nhost: localhost\r\n\r\n")
    async with httpx.AsyncClient(timeout=60) as client:
        answer = await client.get(f"http://127.0.0.1:{port}/quick")
    assert len(answer.content) == 256 << 20
    async with asyncio.timeout(30):
        while "/slow" not in ends:
            await asyncio.sleep(0.05)
    assert ends == {"/quick": "served", "/slow": "dropped"}
    writer.transport.abort()
    server.should_exit = True
    await serving


async def _gone(receive):
    while (await receive())["type"] != "http.disconnect":
        pass


def test_nothing_that_was_said_is_logged_at_any_level(hurried):
    secret = "w77 w78 w79"
    answer = hurried.chat([{"role": "user", "content": secret}])["choices"][0]["message"]["content"]
    refused = hurried.client.post("/chat/completions", json={"messages": secret})
    assert refused.status_code == 400 and len(answer.split()) > 3
    log = (hurried.home / "server.log").read_text()
    assert "POST /v1/chat/completions" in log
    assert secret not in log and answer not in log
