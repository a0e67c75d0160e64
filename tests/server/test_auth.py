"""API keys: who gets in, and that namespaces see nothing of each other."""

import asyncio
import hashlib
import logging

import httpx
import openai
import pytest
from fastapi import Request

from agentmem.config import Settings
from agentmem.errors import StartupError
from agentmem.server import auth, run
from agentmem.server.app import create_app
from agentmem.server.auth import OPEN, namespace_of, read_api_keys
from support.fake_engine import FakeEngine
from support.server_process import ServerProcess
from support.tiny_model_dir import write_tiny_model

ALICE, ALICE_2, BOB, WRONG = (
    f"sk-{name}-{'0' * 16}" for name in ("alice", "alice-2", "bob", "wrong")
)
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def hashed(key):
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


SHOUTED = hashed(ALICE).upper().replace("SHA", "sha")


def bearer(key):
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def key_file(tmp_path):
    def write(text):
        path = tmp_path / "keys.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        path.chmod(0o600)
        return path

    return write


@pytest.fixture
def two_namespaces(key_file):
    return key_file(f'alice = ["{ALICE}", "{hashed(ALICE_2)}"]\n"team b" = "{BOB}"\n')


class Agents(FakeEngine):
    """Each namespace has one agent, named after it."""

    def infos(self, namespace):
        self.agent_ids = [namespace]
        return super().infos(namespace)

    async def delete(self, key):
        return key.agent_id == key.namespace

    async def prefetch(self, key):
        return 100 if key.agent_id == key.namespace else None


@pytest.fixture
def engine():
    return Agents()


@pytest.fixture
def app(engine, tmp_path, two_namespaces):
    return create_app(engine, Settings(home=tmp_path), read_api_keys(two_namespaces))


def call(app, method, path, headers=None, **kwargs):
    async def one():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, headers=headers, **kwargs)

    return asyncio.run(one())


def refused(response):
    """The answer is OpenAI's for a wrong key; its message."""
    error = response.json()["error"]
    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
    assert (error["type"], error["code"], error["param"]) == (
        "invalid_request_error",
        "invalid_api_key",
        None,
    )
    assert response.headers["x-request-id"]
    return error["message"]


# who gets in


@pytest.mark.parametrize(
    ("headers", "namespace"),
    [
        ({"authorization": f"Bearer {ALICE}"}, "alice"),
        ({"authorization": f"bearer   {ALICE} "}, "alice"),
        ({"x-api-key": ALICE}, "alice"),
        ({"x-api-key": ALICE_2}, "alice"),
        ({"x-api-key": BOB}, "team b"),
        ({"x-api-key": BOB, "authorization": f"Bearer {BOB}"}, "team b"),
        ({"x-api-key": BOB, "authorization": "Bearer "}, "team b"),
        ({"x-api-key": BOB, "authorization": "Basic eDp5"}, "team b"),
    ],
)
def test_a_request_is_its_keys_namespaces(app, engine, headers, namespace):
    assert call(app, "POST", "/v1/chat/completions", headers, json=HELLO).status_code == 200
    assert engine.requests[0].agent.namespace == namespace


@pytest.mark.parametrize(
    "headers",
    [
        *(
            {},
            {"authorization": ""},
            {"authorization": "Bearer"},
            {"authorization": "Bearer "},
            {"x-api-key": " "},
        ),
        *(
            bearer(WRONG),
            bearer(ALICE[:-1]),
            bearer(ALICE.upper()),
            bearer(f"{ALICE} {BOB}"),
            bearer(hashed(ALICE_2)),
        ),
        *(
            {"authorization": ALICE},
            {"authorization": f"Basic {ALICE}"},
            {"x-api-key": f"Bearer {ALICE}"},
        ),
        *({"x-api-key": b"\xff\xfe"}, {"authorization": b"Bearer \xff"}),
        *(bearer(ALICE) | {"x-api-key": BOB}, bearer(ALICE) | {"x-api-key": ALICE_2}),
        bearer(WRONG) | {"x-api-key": BOB},
        [("authorization", f"Bearer {ALICE}"), ("authorization", f"Bearer {BOB}")],
    ],
)
def test_a_missing_unknown_or_second_key_is_refused_and_never_repeated(
    app, engine, headers, caplog
):
    caplog.set_level(logging.DEBUG)
    response = call(app, "POST", "/v1/chat/completions", headers, json=HELLO)
    refused(response)
    for secret in ("sk-", hashed(ALICE_2)[7:]):
        assert secret not in response.text + caplog.text
    assert engine.requests == []


def test_every_route_needs_a_key_but_those_that_are_open_and_one_that_is_added_later_too(app):
    @app.get("/api/later")
    async def later(request: Request) -> str:
        return namespace_of(request)

    paths = {route.path: route.methods for route in app.routes if route.path not in OPEN}
    assert {"/v1/chat/completions", "/v1/models", "/v1/agents", "/api/later"} <= set(paths)
    for path, methods in paths.items():
        for method in methods:
            response = call(app, method, path)
            if path.startswith("/v1/messages"):  # in Anthropic's shape
                assert response.status_code == 401
                assert response.json()["error"]["type"] == "authentication_error"
            elif path.startswith("/api"):  # in Ollama's
                assert response.status_code == 401
                assert "API key" in response.json()["error"]
            else:
                refused(response)
    assert call(app, "GET", "/api/later", bearer(BOB)).json() == "team b"
    refused(call(app, "GET", "/v1/no-such-route"))
    refused(call(app, "GET", "/no-such-route"))
    for path in OPEN:
        assert call(app, "GET", path).status_code == 200


def test_an_open_route_that_asks_for_the_namespace_fails_closed(app, monkeypatch):
    monkeypatch.setattr(auth, "OPEN", OPEN | {"/elsewhere"})

    @app.get("/elsewhere")
    async def elsewhere(request: Request) -> str:
        return namespace_of(request)

    assert call(app, "GET", "/elsewhere", bearer(ALICE)).status_code == 500


def test_a_wrong_host_is_refused_before_keys_are_looked_at(app):
    assert (
        call(app, "GET", "/v1/models", bearer(ALICE) | {"host": "evil.example"}).status_code == 400
    )


def test_a_request_without_a_key_is_refused_before_its_body_is_read(app):
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "headers": [(b"host", b"localhost")],
    }
    sent = []

    async def receive():
        raise AssertionError("the body was read")

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 401


def test_without_a_file_any_key_or_none_is_in_the_default_namespace(engine, tmp_path):
    app = create_app(engine, Settings(home=tmp_path), read_api_keys(None))
    for headers in ({}, bearer("none"), bearer(ALICE) | {"x-api-key": BOB}):
        assert call(app, "POST", "/v1/chat/completions", headers, json=HELLO).status_code == 200
    assert [r.agent.namespace for r in engine.requests] == ["default"] * 3


@pytest.mark.parametrize(
    ("key", "own", "other"), [(ALICE_2, "alice", "team b"), (BOB, "team b", "alice")]
)
def test_agent_routes_reach_the_keys_own_namespace_only(app, key, own, other):
    listed = call(app, "GET", "/v1/agents", bearer(key)).json()["data"]
    assert [agent["agent_id"] for agent in listed] == [own]
    for agent, status in ((own, 200), (other, 404)):
        assert call(app, "POST", f"/v1/agents/{agent}/prefetch", bearer(key)).status_code == status
        assert call(app, "DELETE", f"/v1/agents/{agent}", bearer(key)).status_code == status


# the file


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (f'alice = "{ALICE}', "Unterminated"),
        (b'alice = "\xff"', "utf-8"),
        ("", "no key"),
        ("alice = []", "no key"),
        ('alice = ""', "'alice'.*16 or more"),
        (f'bob = "{BOB}"\nalice = "{ALICE[:15]}"', "'alice'.*16 or more"),
        (f'alice = ["{ALICE}", ""]', "'alice'.*16 or more"),
        (f'alice = "{ALICE} {ALICE}"', "'alice'.*spaces"),
        (f'alice = "{ALICE}é"', "'alice'.*ASCII"),
        (f'alice = "{hashed(ALICE)[:-1]}"', "'alice'.*sha256:HEX"),
        ("alice = 1234567890123456", "'alice'.*a string"),
        (f'[alice]\nkey = "{ALICE}"', "'alice'.*a string"),
        (f'alice = [["{ALICE}"]]', "'alice'.*a string"),
        (f'alice = "{ALICE}"\nbob = "{ALICE}"', "'alice' and 'bob'|'bob' and 'alice'"),
        (f'alice = "{ALICE}"\nbob = ["{BOB}", "{SHOUTED}"]', "in common"),
        (f'"" = "{ALICE}"', "1 to 64"),
        (f'{"x" * 65} = "{ALICE}"', "1 to 64"),
        (f'"a\\nb" = "{ALICE}"', r"'a\\nb'.*control"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_file_and_entry_but_shows_no_key(key_file, text, named):
    with pytest.raises(StartupError, match=rf"keys\.toml: .*({named})") as error:
        read_api_keys(key_file(text))
    message = str(error.value)
    assert "\n" not in message
    assert ALICE[:15] not in message and hashed(ALICE)[7:20] not in message


def test_a_file_that_cannot_be_read_is_found_before_the_engine_starts(tmp_path):
    async def start():
        raise AssertionError("the engine was started")

    for path in (tmp_path / "absent.toml", tmp_path):
        with pytest.raises(StartupError, match=f"^--api-keys {path}: "):
            run.serve(start, Settings(port=0, api_keys=path), print)


def test_longest_names_and_a_key_given_twice_to_one_namespace_are_fine(key_file):
    keys = read_api_keys(key_file(f'"{"ü" * 64}" = ["{ALICE}", "{hashed(ALICE)}"]'))
    assert list(keys.values()) == ["ü" * 64]


@pytest.mark.parametrize(("mode", "warnings"), [(0o600, 0), (0o400, 0), (0o640, 1), (0o604, 1)])
def test_a_file_that_other_users_can_read_is_warned_about(two_namespaces, caplog, mode, warnings):
    two_namespaces.chmod(mode)
    assert len(read_api_keys(two_namespaces)) == 3
    assert len([r for r in caplog.records if "chmod 600" in r.getMessage()]) == warnings


# a server process with a model


class Client:
    """What the holder of a key does."""

    def __init__(self, server, key):
        self._http, self._headers = server.client, bearer(key)

    def ask(self, agent):
        messages = [{"role": "user", "content": " ".join(f"w{i}" for i in range(8, 256))}]
        body = {"messages": messages, "agent_id": agent, "max_tokens": 4, "temperature": 0}
        return self._http.post("/chat/completions", json=body, headers=self._headers).json()[
            "agentmem"
        ]

    def agents(self):
        """What of an agent changes only when it is asked or deleted."""
        listed = self._http.get("/agents", headers=self._headers).json()["data"]
        return {
            a["agent_id"]: (a["tokens"], a["branches"], a["created"], a["last_used"])
            for a in listed
        }

    def prefetch(self, agent):
        return self._http.post(f"/agents/{agent}/prefetch", headers=self._headers).status_code

    def delete(self, agent):
        return self._http.delete(f"/agents/{agent}", headers=self._headers).status_code


def test_a_namespace_sees_matches_and_touches_nothing_of_another(tmp_path, two_namespaces):
    model = write_tiny_model(tmp_path / "tiny")
    flags = ("--api-keys", str(two_namespaces), "--block-size", "32", "--prefill-chunk", "64")
    with ServerProcess(tmp_path / "home", *flags, model=model) as server:
        alice, bob = Client(server, ALICE), Client(server, BOB)
        assert alice.ask("a")["cached_tokens"] == 0
        assert alice.ask("a2")["cached_tokens"] >= 224  # inside a namespace the prefix is shared
        before = alice.agents()
        assert set(before) == {"a", "a2"}

        first = bob.ask("b")
        assert (first["cache"], first["cached_tokens"], first["restored_bytes"]) == ("cold", 0, 0)
        assert set(bob.agents()) == {"b"}
        assert (bob.prefetch("a"), bob.delete("a")) == (404, 404)
        bob.ask("a")  # an agent of bob's by that name is another one
        assert (bob.prefetch("a"), bob.delete("a")) == (200, 200)
        assert alice.agents() == before
        assert alice.ask("a")["cached_tokens"] >= 224

        _sdk_with_a_right_and_a_wrong_key(server.url)
        assert server.stop() == 0
    log = (tmp_path / "home" / "server.log").read_text() + "".join(server.output)
    assert not any(secret in log for secret in (ALICE, ALICE_2, BOB, WRONG))


def _sdk_with_a_right_and_a_wrong_key(url):
    with openai.OpenAI(base_url=url, api_key=ALICE, max_retries=0) as right:
        assert len(list(right.models.list())) == 1
    with openai.OpenAI(base_url=url, api_key=WRONG, max_retries=0) as wrong:
        with pytest.raises(openai.AuthenticationError) as error:
            wrong.chat.completions.create(model="default", **HELLO)
        assert (error.value.code, error.value.type) == ("invalid_api_key", "invalid_request_error")
        with pytest.raises(openai.AuthenticationError):
            wrong.models.list()
