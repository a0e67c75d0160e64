"""Requests as clients of other servers write them: what is meant is done, a wish passes."""

import asyncio
import json

import httpx
import pytest

from agentmem.config import Settings
from agentmem.server.api.thinking import thinking_options
from agentmem.server.app import create_app
from support.fake_engine import FakeEngine

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def post(engine, tmp_path):
    """Post a body, and return the response."""

    def post(body, path="/v1/chat/completions", headers=None, method="POST", **settings):
        app = create_app(engine, Settings(home=tmp_path, **settings), None)

        async def ask():
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost"
            ) as client:
                given = {"content-type": "application/json"} | (headers or {})
                content = json.dumps(body) if body is not None else None
                return await client.request(method, path, content=content, headers=given)

        return asyncio.run(ask())

    return post


def params(post, engine, **fields):
    response = post({"messages": HELLO, **fields})
    assert response.status_code == 200, response.text
    return engine.requests[-1].params


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"max_tokens": 8.0}, "max_tokens", 8),
        ({"max_tokens": "8"}, "max_tokens", 8),
        ({"max_tokens": "8.0"}, "max_tokens", 8),
        ({"max_tokens": None, "max_completion_tokens": 4}, "max_tokens", 4),
        ({"max_tokens": -1, "max_completion_tokens": 4}, "max_tokens", 4),
        ({"max_new_tokens": 3}, "max_tokens", 3),
        ({"max_tokens": 0}, "max_tokens", 0),
        ({"temperature": 1}, "temperature", 1.0),
        ({"temperature": "0.7"}, "temperature", 0.7),
        ({"temperature": 3}, "temperature", 3.0),
        ({"temperature": None}, "temperature", 1.0),
        ({"top_p": 0}, "top_p", 0.0),
        ({"top_p": "0.9"}, "top_p", 0.9),
        ({"top_k": 40.0}, "top_k", 40),
        ({"top_k": -1}, "top_k", 0),
        ({"seed": -1}, "seed", 2**64 - 1),
        ({"seed": 42.0}, "seed", 42),
        ({"seed": 2**64 + 1}, "seed", 1),
        ({"stop": ""}, "stop", ()),
        ({"stop": ["", "a"]}, "stop", ("a",)),
        ({"stop": []}, "stop", ()),
        ({"stop": [f"x{i}" for i in range(17)]}, "stop", tuple(f"x{i}" for i in range(17))),
        ({"stop_token_ids": [3, 4.0]}, "stop_token_ids", (3, 4)),
        ({"presence_penalty": 5}, "presence_penalty", 5.0),
        ({"repeat_penalty": 1.1}, "repetition_penalty", 1.1),
        ({"logit_bias": {}}, "logit_bias", ()),
        ({"logit_bias": {"5": "-100"}}, "logit_bias", ((5, -100.0),)),
        ({"ignore_eos": "true"}, "ignore_eos", True),
    ],
)
def test_a_number_is_taken_as_it_is_meant(post, engine, fields, name, value):
    assert getattr(params(post, engine, **fields), name) == value


@pytest.mark.parametrize("limit", [-1, "-1", 10**9, 2**70])
def test_a_limit_beyond_the_context_is_none(post, engine, limit):
    given = params(post, engine, max_tokens=limit).max_tokens
    assert given == engine.max_context - len(engine.requests[-1].tokens)


def test_a_bias_may_name_a_text(post, engine):
    biased = params(post, engine, logit_bias={"hello": -7, "3": 1}).logit_bias
    tokens = engine.tokenizer.encode("hello", add_special_tokens=False)
    assert biased == ((3, 1.0), *((token, -7.0) for token in tokens))


@pytest.mark.parametrize(("stream", "is_stream"), [("false", False), ("True", True), (1, True)])
def test_a_switch_may_be_a_word(post, stream, is_stream):
    told = post({"messages": HELLO, "stream": stream})
    assert told.headers["content-type"].startswith("text/event-stream") is is_stream


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_effort": "medium"},
        {"verbosity": "low"},
        {"cache_prompt": True, "id_slot": -1, "num_ctx": 8192, "options": {"num_ctx": 8}},
        {"keep_alive": "5m", "session_id": "s", "chat_id": "c", "litellm_session_id": "x"},
        {"stream_options": {"include_usage": True, "new": 1}},
        {"stream": False, "stream_options": {"include_usage": True}},
        {"best_of": 1, "echo": False, "skip_special_tokens": False, "typical_p": 1.0, "tfs_z": 1},
        {"mirostat": 0, "transforms": [], "provider": {}, "usage": {"include": True}},
        {"functions": None, "function_call": None, "response_format": None, "truncation": "auto"},
        {"extra_body": {}, "prediction": {"type": "content", "content": "x"}, "unheard_of": [1]},
        {"metadata": {"user_id": 7}, "user": 7, "store": "false", "service_tier": 3},
        {"metadata": "text"},
    ],
)
def test_a_wish_passes(post, fields):
    response = post({"messages": HELLO, **fields})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("wishes", "options"),
    [
        ([None, None], {}),
        ([False], {"enable_thinking": False}),
        ([None, True, False], {"enable_thinking": True}),
        ([{"type": "disabled"}], {"enable_thinking": False}),
        ([{"type": "enabled", "budget_tokens": 10}], {"enable_thinking": True}),
        ([{"effort": "high"}], {"enable_thinking": True, "reasoning_effort": "high"}),
        ([{"enabled": False}], {"enable_thinking": False}),
        (["none"], {"enable_thinking": False}),
        ([7, "low"], {"enable_thinking": True, "reasoning_effort": "low"}),
        ([{}, {"summary": "auto"}], {}),
    ],
)
def test_each_way_to_ask_for_thinking_is_the_templates(wishes, options):
    assert thinking_options(*wishes) == options


NAMES = [
    "org/tiny",
    "tiny",
    "ORG/Tiny",
    "org/tiny/",
    "openai/org/tiny",
    "openai/tiny",
    "tiny:latest",
]


@pytest.mark.parametrize("name", [*NAMES, "default", "", None])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": HELLO}),
        ("/v1/completions", {"prompt": "hello"}),
        ("/v1/responses", {"input": "hello"}),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 4}),
    ],
)
def test_a_model_has_many_names(post, path, body, name):
    response = post({**body, "model": name}, path)
    assert response.status_code == 200, response.text


def test_another_model_is_not_found_unless_any_will_do(post):
    for name in ("gpt-4o-mini", "tiny2", "org/other", "latest"):
        body = {"messages": HELLO, "model": name}
        refused = post(body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (404, "model")
        assert post(body, any_model=True).status_code == 200


ORIGIN = "http://localhost:3000"
ASKS = {
    "origin": ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
    "access-control-request-private-network": "true",
}


def test_a_page_of_an_origin_that_is_named_may_ask(post):
    asked = post(None, headers=ASKS, method="OPTIONS", cors=[ORIGIN])
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == ORIGIN
    assert "authorization" in asked.headers["access-control-allow-headers"]
    assert asked.headers["access-control-allow-private-network"] == "true"
    assert "access-control-allow-credentials" not in asked.headers
    told = post({"messages": HELLO}, headers={"origin": ORIGIN}, cors=[ORIGIN])
    assert told.headers["access-control-allow-origin"] == ORIGIN
    assert "retry-after" in told.headers["access-control-expose-headers"]
    refused = post({"messages": 7}, headers={"origin": ORIGIN}, cors=[ORIGIN])
    assert refused.status_code == 400
    assert refused.headers["access-control-allow-origin"] == ORIGIN


@pytest.mark.parametrize("settings", [{}, {"cors": ["http://other.example"]}])
def test_no_other_page_may(post, settings):
    asked = post(None, headers=ASKS, method="OPTIONS", **settings)
    assert asked.status_code in (400, 405)
    assert "access-control-allow-origin" not in asked.headers
    foreign = post(None, headers=ASKS | {"host": "evil.example"}, method="OPTIONS", cors=[ORIGIN])
    assert foreign.status_code == 400 and "access-control-allow-origin" not in foreign.headers
