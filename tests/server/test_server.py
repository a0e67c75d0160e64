"""The HTTP layer over a fake engine: the wire format, errors, limits, disconnects and shutdown."""

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn

from agentmem.config import Settings
from agentmem.errors import Busy, EngineFailed, StartupError
from agentmem.server import run, sse
from agentmem.server.app import create_app
from agentmem.server.errors import ErrorResponses
from agentmem.server.middleware import BodyLimit
from support.fake_engine import FakeEngine, tiny_tokenizer

HELLO = [{"role": "user", "content": "hello"}]
POST = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def settings(tmp_path):
    return Settings(home=tmp_path, max_body=4096, allowed_hosts=["box.local"])


@pytest.fixture
def call(engine, settings):
    """One request to the app, without a socket."""

    def call(method, path, **kwargs):
        async def one():
            transport = httpx.ASGITransport(
                create_app(engine, settings, None), raise_app_exceptions=False
            )
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost:8000"
            ) as client:
                return await client.request(method, path, **kwargs)

        return asyncio.run(one())

    return call


@pytest.fixture
def chat(call):
    def chat(headers=None, **body):
        return call(
            "POST", "/v1/chat/completions", json={"messages": HELLO, **body}, headers=headers
        )

    return chat


@contextlib.contextmanager
def listening(engine, settings):
    """The app on a real port; yields (host, port)."""
    sock = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        create_app(engine, settings, None), lifespan="off", ws="none", log_config=None
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield sock.getsockname()
    finally:
        server.should_exit = True
        thread.join(10)
        sock.close()
        assert not thread.is_alive()


def sdk(address):
    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{address[1]}/v1", api_key="none", max_retries=0
    )


def until(condition, seconds=1.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def post(address, body, headers=""):
    """A raw request, so that the test decides when the connection goes away."""
    payload = json.dumps({"messages": HELLO, **body}).encode()
    sock = socket.create_connection(address, timeout=5)
    head = f"{POST}{headers}"
    sock.sendall(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
    return sock


def refused(response, status, param=None, code=None):
    """The answer is this error in OpenAI's shape; its message."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (response.status_code, error["param"]) == (status, param), error
    assert code is None or error["code"] == code
    assert response.headers["x-request-id"] == response.headers["request-id"]
    return error["message"]


# the wire format, as the openai SDK reads it


def test_sdk_reads_an_answer_with_its_usage_and_what_it_cost(engine, settings):
    with listening(engine, settings) as address, sdk(address) as client:
        answer = client.chat.completions.create(
            model="tiny", messages=HELLO, extra_body={"agent_id": "alice"}
        )
    assert answer.choices[0].message.content == "Hello wörld"
    assert (answer.object, answer.model, answer.choices[0].finish_reason) == (
        "chat.completion",
        "org/tiny",
        "stop",
    )
    assert answer.id.startswith("chatcmpl-")
    prompt = len(engine.requests[0].tokens)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (prompt, prompt + 2)
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.agentmem == {
        "agent_id": "alice",
        "cache": "warm",
        "cached_tokens": 3,
        "cause": "first",
        "restored_bytes": 1024,
        "restore_ms": 1.235,
        "prefill_ms": 2.0,
        "ttft_ms": 3.5,
        "queue_ms": 0.1,
        "turn": answer.agentmem["turn"],
    }
    assert answer.agentmem["turn"].startswith("turn_")


def test_sdk_reads_a_stream_in_openais_order(engine, settings):
    with listening(engine, settings) as address, sdk(address) as client:
        options = {"include_usage": True}
        chunks = list(
            client.chat.completions.create(
                model="org/tiny", messages=HELLO, stream=True, stream_options=options
            )
        )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "Hello wörld"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None, None, None, "stop"]
    assert chunks[-2].agentmem["cache"] == "warm"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 2
    assert len({c.id for c in chunks}) == 1


@pytest.mark.parametrize("include_usage", [True, False])
def test_stream_is_exactly_data_lines_and_usage_is_there_only_if_asked(chat, include_usage):
    response = chat(stream=True, stream_options={"include_usage": include_usage})
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(e.startswith("data: {") and "\n" not in e for e in events)
    chunks = [json.loads(e.removeprefix("data: ")) for e in events]
    if include_usage:
        assert [c["usage"] for c in chunks[:-1]] == [None] * 4
        assert chunks[-1]["usage"]["prompt_tokens"] > 0
    else:
        assert len(chunks) == 4
        assert not any("usage" in c for c in chunks)


def test_sdk_lists_the_model_and_maps_errors_to_its_own_classes(engine, settings):
    with listening(engine, settings) as address, sdk(address) as client:
        (model,) = client.models.list()
        assert (model.id, model.owned_by, model.max_context) == ("org/tiny", "agentmem", 64)
        assert (model.type, model.object, model.max_input_tokens) == ("model", "model", 64)
        assert client.models.retrieve("org/tiny").id == "org/tiny"
        with pytest.raises(openai.NotFoundError) as e:
            client.chat.completions.create(model="gpt-4", messages=HELLO)
        assert (e.value.code, e.value.param) == ("model_not_found", "model")
        assert e.value.request_id.startswith("req_")
        engine.error, engine.words = Busy("The queue is full."), ()
        with pytest.raises(openai.RateLimitError) as busy:
            client.chat.completions.create(model="tiny", messages=HELLO)
        assert busy.value.response.headers["retry-after"] == "1"


# what reaches the engine


def test_messages_render_with_the_models_template(engine, chat):
    parts = [
        {"type": "text", "text": "hello "},
        {"type": "text", "text": "world", "cache_control": {}},
    ]
    history = [
        {"role": "developer", "content": "hello"},
        {"role": "user", "content": parts},
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "tool_calls": None,
            "annotations": [],
        },
        {"role": "user", "content": ""},
    ]
    assert chat(messages=history).status_code == 200
    text = "<s> system hello </s> <s> user hello world </s> <s> assistant </s> <s> user </s> "
    text += "<s> assistant"
    assert engine.requests[0].tokens == engine.tokenizer.encode(text, add_special_tokens=False)


def test_sampling_parameters_reach_the_engine(engine, chat):
    body = {
        "max_tokens": 9,
        "max_completion_tokens": 7,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": -1,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "repetition_context_size": 64,
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "logit_bias": {"5": -100},
        "seed": -1,
        "stop": "x",
        "ignore_eos": True,
    }
    assert chat(**body).status_code == 200
    params = engine.requests[0].params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k, params.min_p) == (
        7,
        0,
        0.5,
        0,
        0.1,
    )
    assert (params.repetition_penalty, params.repetition_context_size) == (1.1, 64)
    assert (params.presence_penalty, params.frequency_penalty) == (-2, 2)
    assert (params.logit_bias, params.seed, params.stop) == (((5, -100),), 2**64 - 1, ("x",))
    assert params.ignore_eos


def test_null_means_the_default_and_harmless_parameters_are_accepted(engine, chat):
    body = {
        "temperature": None,
        "stop": None,
        "seed": None,
        "stream": None,
        "max_tokens": None,
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "prompt_cache_options": {"ttl": "30m"},
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "logprobs": False,
        "n": 1,
    }
    response = chat(**body)
    assert response.status_code == 200, response.text
    params = engine.requests[0].params
    assert (params.temperature, params.stop, params.seed) == (1.0, (), None)


def test_max_tokens_is_clamped_to_what_the_context_has_left(engine, chat):
    assert chat(max_tokens=10**9).status_code == 200
    assert chat().status_code == 200
    first, second = engine.requests
    assert first.params.max_tokens == second.params.max_tokens == 64 - len(first.tokens)


@pytest.mark.parametrize("words", [64, 500])
def test_prompt_that_fills_the_context_is_refused_with_both_numbers(engine, chat, words):
    messages = [{"role": "user", "content": "hello " * (words - 5)}]
    message = refused(chat(messages=messages), 400, "messages", "context_length_exceeded")
    assert "64" in message
    assert str(words) in message
    assert engine.requests == []


def test_what_sets_the_limit_is_said(engine, chat):
    engine.why_max_context = " (kv_budget is small)"
    message = refused(chat(messages=[{"role": "user", "content": "hello " * 90}]), 400, "messages")
    assert "64 tokens (kv_budget is small)" in message


def test_longest_prompt_that_leaves_one_token_is_served(engine, chat):
    assert chat(messages=[{"role": "user", "content": "hello " * 58}]).status_code == 200
    assert (len(engine.requests[0].tokens), engine.requests[0].params.max_tokens) == (63, 1)


@pytest.mark.parametrize("agent_id", ["../x", "a/b//c", "🦊🦊", "x" * 256, " "])
def test_any_text_is_an_agent_id(engine, chat, agent_id):
    assert chat(agent_id=agent_id).json()["agentmem"]["agent_id"] == agent_id
    assert chat(headers={"X-Agent-Id": agent_id.encode()}).status_code == 200
    assert [r.agent.agent_id for r in engine.requests] == [agent_id, agent_id.strip() or agent_id]


def test_agent_id_of_the_body_comes_before_the_headers_and_none_is_anonymous(engine, chat):
    chat(agent_id="body", headers={"X-Agent-Id": "header"})
    chat()
    assert [r.agent.agent_id for r in engine.requests] == ["body", "anonymous"]


@pytest.mark.parametrize("agent_id", ["", "x" * 257, "a\0b", "a\nb", "\x85", "\ud800", 7])
def test_agent_id_that_cannot_be_one_is_refused_by_name(engine, call, agent_id):
    body = json.dumps({"messages": HELLO, "agent_id": agent_id})
    response = call(
        "POST", "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    refused(response, 400, "agent_id")
    assert engine.requests == []


def test_agent_id_header_that_is_not_utf8_is_refused(chat):
    refused(chat(headers={"X-Agent-Id": b"\xff\xfe"}), 400, "agent_id")
    refused(chat(headers={"X-Agent-Id": b"x" * 300}), 400, "agent_id")


# what is refused


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"temperature": -0.1}, "temperature", "invalid_value"),
        ({"temperature": ""}, "temperature", "invalid_type"),
        ({"temperature": True}, "temperature", "invalid_type"),
        ({"stream": "yes"}, "stream", "invalid_type"),
        ({"max_tokens": -2}, "max_tokens", "invalid_value"),
        ({"max_tokens": "-5"}, "max_tokens", "invalid_type"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
        ({"top_p": 1.1}, "top_p", None),
        ({"top_p": []}, "top_p", "invalid_type"),
        ({"top_k": -2}, "top_k", None),
        ({"repetition_penalty": 0}, "repetition_penalty", None),
        ({"seed": 1.5}, "seed", None),
        ({"seed": "x"}, "seed", None),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", None),
        ({"stop": [str(i) for i in range(65)]}, "stop", None),
        ({"stop": [1]}, "stop.0", None),
        ({"stop": ["x" * 1001]}, "stop.0", None),
        ({"n": 17}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_type"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", None),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"response_format": {"type": "xml"}}, "response_format", "unsupported_parameter"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
        ({"mirostat": 2}, "mirostat", "unsupported_parameter"),
        ({"web_search_options": {}}, "web_search_options", "unsupported_parameter"),
        ({"min_tokens": 5}, "min_tokens", "unsupported_parameter"),
        ({"agentmem": {"frobnicate": 1}}, "agentmem.frobnicate", "unknown_parameter"),
        ({"messages": []}, "messages", None),
        ({"messages": "hi"}, "messages", "invalid_type"),
        ({"messages": None}, "messages", "invalid_type"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "invalid_type"),
        ({"messages": [{"role": "king", "content": ""}]}, "messages.0.role", None),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content",
            None,
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages.0.content",
            None,
        ),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages.0.content", None),
        ({"messages": ["hello"]}, "messages.0", None),
        ({"messages": [{"role": "assistant", "tool_calls": {}}]}, "messages.0.tool_calls", None),
        ({"model": "gpt-4"}, "model", "model_not_found"),
    ],
)
def test_request_that_cannot_be_honoured_is_refused_naming_the_field(
    engine, call, body, param, code
):
    content = json.dumps({"messages": HELLO, **body})
    response = call(
        "POST",
        "/v1/chat/completions",
        content=content,
        headers={"content-type": "application/json"},
    )
    message = refused(response, 404 if code == "model_not_found" else 400, param, code)
    assert len(message) > 10
    assert engine.requests == []


@pytest.mark.parametrize(
    "body",
    [
        *(
            b"",
            b"{",
            b"[]",
            b"null",
            b"7",
            b'"x"',
            b'{"messages": NaN}',
            b"\xff\xfe\xfd",
            b"[" * 4000,
        ),
        *(
            b'{"\\ud800": 1}',
            b'{"messages": [], "%s": 1}' % (b"k" * 3000),
            b'{"temperature": 1%s}' % (b"0" * 4000),
        ),
        *(
            b'{"temperature": 1%s}' % (b"0" * 400),
            b'{"seed": 1%s}' % (b"0" * 400),
            b'{"logit_bias": {"\\ud800": 1}}',
        ),
    ],
)
def test_body_that_is_no_request_is_answered_400(engine, call, body):
    response = call(
        "POST", "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert len(response.content) < 1000
    assert engine.requests == []


def test_body_without_json_content_type_is_refused_as_any_web_page_could_send_it(call):
    body = json.dumps({"messages": HELLO})
    response = call(
        "POST", "/v1/chat/completions", content=body, headers={"content-type": "text/plain"}
    )
    assert "application/json" in refused(response, 400)


@pytest.mark.parametrize("chunked", [False, True])
def test_body_over_the_limit_is_refused_with_the_limit(engine, settings, chunked):
    def pieces():
        yield from (b"x" * 65536 for _ in range(160))  # 10 MB

    headers = {"content-type": "application/json"}
    with listening(engine, settings) as address:
        url = f"http://127.0.0.1:{address[1]}/v1/chat/completions"
        content = pieces() if chunked else b"".join(pieces())
        response = httpx.post(url, content=content, headers=headers, timeout=10)
        assert "4096" in refused(response, 400, code="request_too_large")
        assert httpx.post(url, json={"messages": HELLO}).status_code == 200


def test_oversized_body_is_not_kept_in_memory():
    async def app(scope, receive, send):
        raise AssertionError("the app was called")

    async def receive():
        return {"type": "http.request", "body": bytes(1 << 20), "more_body": True}

    sent = []

    async def send(message):
        sent.append(message)

    tracemalloc.start()
    try:
        limit = BodyLimit(app, limit=4096, patience=10, on_error=ErrorResponses().response)
        scope = {"type": "http", "path": "/", "headers": [], "agentmem.request_id": "r"}
        asyncio.run(limit(scope, receive, send))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert sent[0]["status"] == 400


def test_client_that_asks_before_it_sends_is_refused_before_it_sends(engine, settings):
    with (
        listening(engine, settings) as address,
        socket.create_connection(address, timeout=5) as sock,
    ):
        sock.sendall(f"{POST}Expect: 100-continue\r\nContent-Length: 99999999\r\n\r\n".encode())
        assert sock.recv(100).startswith(b"HTTP/1.1 400")


def test_model_without_a_template_says_so(engine, chat):
    engine.tokenizer = tiny_tokenizer(template=None)
    assert "chat template" in refused(chat(), 400, "messages")


def test_messages_that_the_template_refuses_are_made_to_fit(engine, chat):
    assert chat(messages=[{"role": "assistant", "content": "hello"}]).status_code == 200
    prompt = engine.tokenizer.decode(engine.requests[0].tokens)
    assert prompt.index("user") < prompt.index("assistant") < prompt.index("hello")


# errors


def test_engine_error_before_the_first_word_is_an_http_status_also_for_a_stream(engine, chat):
    engine.words, engine.error = (), Busy("The queue is full.")
    response = chat(stream=True)
    assert refused(response, 429, code="queue_full") == "The queue is full."
    assert response.headers["retry-after"] == "1"


def test_engine_error_in_mid_stream_is_the_streams_last_line(engine, settings, chat):
    engine.error = EngineFailed("The disk is gone.")
    last = chat(stream=True).text.removesuffix("\n\n").split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_failed"
    with listening(engine, settings) as address, sdk(address) as client:
        stream = client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
        with pytest.raises(openai.APIError, match="The disk is gone"):
            list(stream)
    assert refused(chat(), 503, code="engine_failed") == "The disk is gone."


@pytest.mark.parametrize("stream", [True, False])
def test_unexpected_error_is_a_500_that_tells_nothing_inside(engine, chat, stream):
    engine.words, engine.error = (), KeyError("secret")
    assert "secret" not in refused(chat(stream=stream), 500, code="internal_error")


def test_unexpected_error_is_logged_with_its_traceback(engine, settings, caplog):
    engine.error = KeyError("secret")
    with listening(engine, settings) as address:
        assert httpx.post(
            f"http://127.0.0.1:{address[1]}/v1/chat/completions", json={"messages": HELLO}
        ).is_error
    assert "KeyError: 'secret'" in caplog.text


def test_unknown_routes_and_methods_are_errors_in_openais_shape(call):
    refused(call("GET", "/v2/nothing"), 404, code="not_found")
    refused(call("GET", "/docs"), 404)
    refused(call("GET", "/v1/chat/completions"), 405, code="method_not_allowed")
    refused(call("GET", "/v1/models/other"), 404, "model", "model_not_found")


def test_sane_request_ids_are_echoed_and_others_replaced(call):
    assert (
        call("GET", "/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    )
    assert (
        call("GET", "/health", headers={"x-request-id": "a b<script>"})
        .headers["x-request-id"]
        .startswith("req_")
    )


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *(
            ("localhost", 200),
            ("LOCALHOST:8000", 200),
            ("127.0.0.1:1", 200),
            ("[::1]:8000", 200),
            ("[::1]", 200),
        ),
        *(
            ("box.local", 200),
            ("evil.example", 400),
            ("localhost.evil.example", 400),
            ("127.0.0.1.evil", 400),
        ),
        *(("", 400), ("[::1]evil", 400), ("evil.example:127.0.0.1", 400)),
    ],
)
def test_only_our_own_host_names_are_served(call, host, status):
    response = call("GET", "/health", headers={"host": host})
    assert response.status_code == status
    if status == 400:
        refused(response, 400, code="host_not_allowed")


# the other routes


@pytest.mark.parametrize(
    ("state", "status"), [("ok", 200), ("degraded", 200), ("failed", 503), ("stopping", 503)]
)
def test_health_is_503_when_failed_or_stopping(engine, call, state, status):
    engine.status = state
    response = call("GET", "/health")
    assert (response.status_code, response.json()["status"]) == (status, state)


@pytest.mark.parametrize(
    ("path", "agent_id"), [("alice", "alice"), ("..%2Fx", "../x"), ("%C3%BC%2F🦊", "ü/🦊")]
)
def test_agent_is_listed_until_it_is_deleted(call, path, agent_id):
    listed = call("GET", "/v1/agents").json()["data"]
    assert agent_id in [a["agent_id"] for a in listed]
    assert {"tier", "tokens", "branches", "ram_bytes", "disk_bytes", "created", "last_used"} < set(
        listed[0]
    )
    assert call("POST", f"/v1/agents/{path}/prefetch").json() == {
        "agent_id": agent_id,
        "restored_bytes": 100,
    }
    assert call("DELETE", f"/v1/agents/{path}").json() == {"agent_id": agent_id, "deleted": True}
    assert agent_id not in [a["agent_id"] for a in call("GET", "/v1/agents").json()["data"]]
    refused(call("DELETE", f"/v1/agents/{path}"), 404, "agent_id", "agent_not_found")
    refused(call("POST", f"/v1/agents/{path}/prefetch"), 404, "agent_id", "agent_not_found")


def test_openapi_describes_the_request(call):
    schemas = call("GET", "/openapi.json").json()["components"]["schemas"]
    assert "agent_id" in schemas["ChatCompletionRequest"]["properties"]


# clients that go away, and answers that take long


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("first_delay", [30, 0])
def test_client_that_goes_away_cancels_its_sequence_within_a_second(
    engine, settings, stream, first_delay
):
    engine.first_delay, engine.delay = first_delay, 0.01
    engine.words = ("word ",) * 10_000
    with listening(engine, settings) as address:
        sock = post(address, {"stream": stream})
        assert until(lambda: engine.requests)
        if stream and not first_delay:
            assert b"HTTP/1.1 200" in sock.recv(1000)
        time.sleep(0.1)
        assert engine.cancelled == 0
        sock.close()
        assert until(lambda: engine.cancelled == 1)


def test_client_that_stops_reading_and_goes_away_cancels_its_sequence(engine, settings):
    engine.words = ("word " * 1000,) * 100_000
    with listening(engine, settings) as address:
        sock = post(address, {"stream": True})
        assert b"HTTP/1.1 200" in sock.recv(1000)
        time.sleep(0.3)  # the buffers are full, the stream stands still
        assert engine.cancelled == 0
        sock.close()
        assert until(lambda: engine.cancelled == 1)


def test_sdk_that_leaves_a_stream_cancels_its_sequence(engine, settings):
    engine.words, engine.delay = ("word ",) * 10_000, 0.01
    with listening(engine, settings) as address, sdk(address) as client:
        with client.chat.completions.create(model="tiny", messages=HELLO, stream=True) as stream:
            next(iter(stream))
        assert until(lambda: engine.cancelled == 1)


def test_long_prefill_starts_the_stream_with_pings(engine, settings, monkeypatch):
    monkeypatch.setattr(sse, "FIRST_EVENT_WAIT", 0.05)
    monkeypatch.setattr(sse, "PING_INTERVAL", 0.05)
    engine.first_delay = 0.3
    with listening(engine, settings) as address:
        with post(address, {"stream": True}, "Connection: close\r\n") as sock:
            raw = b"".join(iter(lambda: sock.recv(65536), b"")).decode()
        assert raw.count(": ping\n\n") >= 2
        assert raw.index(": ping\n\n") < raw.index("data: {")
        with sdk(address) as client:
            stream = client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
            assert "".join(c.choices[0].delta.content or "" for c in stream) == "Hello wörld"
            engine.words, engine.error = (), Busy("The queue is full.")
            with pytest.raises(openai.APIError, match="queue is full"):
                list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True))


# the process

SERVE = """
import json, sys
from agentmem.config import Settings
from agentmem.server.run import serve
from support.fake_engine import FakeEngine
engine = FakeEngine(words=("word ",) * 100_000, delay=0.05, first_delay=float(sys.argv[1]))
async def start():
    return engine
code = serve(start, Settings(port=0), lambda url: print(url, flush=True))
print(json.dumps([engine.log, engine.cancelled]))
sys.exit(code)
"""


@contextlib.contextmanager
def process(first_delay=0):
    """A server of its own; yields the process and its (host, port)."""
    command = [sys.executable, "-c", SERVE, str(first_delay)]
    child = subprocess.Popen(
        command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True
    )
    try:
        url = child.stdout.readline().strip()
        yield child, ("127.0.0.1", int(url.rpartition(":")[2]))
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_open_streams_with_an_error_and_the_process_with_0(number):
    with process() as (child, address), sdk(address) as client:
        idle = socket.create_connection(address)
        stream = iter(client.chat.completions.create(model="tiny", messages=HELLO, stream=True))
        next(stream)
        child.send_signal(number)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert json.loads(child.communicate(timeout=10)[0]) == [["drain", "stop"], 0]
        assert child.returncode == 0
        idle.close()


def test_second_signal_drops_open_requests_and_still_stops_the_engine():
    with process(first_delay=60) as (child, address), post(address, {}) as waiting:
        time.sleep(0.3)
        child.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(1)
        child.send_signal(signal.SIGTERM)
        assert json.loads(child.communicate(timeout=5)[0]) == [["drain", "stop"], 1]
        assert child.returncode == 0
        with contextlib.suppress(ConnectionResetError):
            assert waiting.recv(10) == b""


def test_port_in_use_is_one_line_before_the_engine_starts():
    async def start():
        raise AssertionError("the engine was started")

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            StartupError, match=f"^port {port} is in use: choose another with --port$"
        ):
            run.serve(start, Settings(port=port), print)


def test_host_that_cannot_be_listened_on_is_a_startup_error():
    async def start():
        raise AssertionError("the engine was started")

    with pytest.raises(StartupError, match=r"can't listen on 192\.0\.2\.1"):
        run.serve(start, Settings(host="192.0.2.1", port=0, insecure=True), print)
