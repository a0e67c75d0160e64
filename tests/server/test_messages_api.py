"""POST /v1/messages, as the anthropic SDK and Claude Code use it, against real server processes."""

import json

import anthropic
import httpx
import pytest
from anthropic.types import Message, ModelInfo, RawMessageStreamEvent
from pydantic import TypeAdapter

from support.chat_http import FLAGS, KEYS, transcript, write_keys
from support.server_process import ServerProcess
from support.speaking_model import write_speaking_model

EVENT = TypeAdapter(RawMessageStreamEvent)
CALL = '{"name": "weather", "arguments": {"city": "Paris"}}'
PIECES = [
    *("<think>", "\nhm\n", "</think>", "\n\nI ", "look.\n"),
    *("<tool_call>", "\n" + CALL + "\n", "</tool_call>"),
]
TOOL = {
    "name": "weather",
    "description": "The weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
HELLO = [{"role": "user", "content": "Weather in Paris?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server whose model thinks, says that it looks, and asks for the weather in Paris."""
    home = tmp_path_factory.mktemp("speaking")
    model = write_speaking_model(home / "model", PIECES)
    with ServerProcess(home / "home", *FLAGS, model=model) as server:
        yield server
        assert server.stop() == 0


def sdk(server, **options):
    given = {"api_key": "none", "max_retries": 0, **options}
    return anthropic.Anthropic(base_url=server.url.removesuffix("/v1"), **given)


def create(server, **body):
    with sdk(server) as client:
        given = {"model": "default", "max_tokens": 50, "messages": HELLO, **body}
        message = client.messages.create(**given)
    Message.model_validate(message.model_dump(exclude_unset=True))
    return message


def post(server, headers=None, **body):
    given = {"model": "default", "max_tokens": 50, "messages": HELLO, **body}
    response = server.client.post("/messages", json=given, headers=headers or {})
    assert response.status_code == 200, response.text
    return response.json()


def tokens_of(usage):
    return (
        usage["input_tokens"]
        + usage["cache_creation_input_tokens"]
        + usage["cache_read_input_tokens"]
    )


def test_the_sdk_reads_an_answer_of_thinking_text_and_a_call(server):
    message = create(server, tools=[TOOL])
    thinking, text, call = message.content
    assert (thinking.thinking, text.text) == ("hm", "I look.")
    assert (call.name, call.input) == ("weather", {"city": "Paris"})
    assert (message.stop_reason, message.stop_sequence) == ("tool_use", None)
    assert message.usage.output_tokens == len(PIECES) + 1
    assert message.agentmem["agent_id"] == "anonymous"


def test_without_tools_a_call_is_text(server):
    message = create(server)
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert CALL in message.content[1].text and message.stop_reason == "end_turn"
    offered = create(server, tools=[TOOL], tool_choice={"type": "none"})
    assert [block.type for block in offered.content] == ["thinking", "text"]


def test_a_stream_is_anthropics_and_adds_up_to_the_whole_answer(server):
    body = {"model": "default", "max_tokens": 50, "messages": HELLO, "tools": [TOOL]}
    found = []
    response = server.client.post("/messages", json=body | {"stream": True})
    for block in response.text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] != "ping":
            EVENT.validate_python(event)
        found.append(event)
    assert [e["type"] for e in found[:2]] == ["message_start", "ping"]
    assert [e["type"] for e in found[-2:]] == ["message_delta", "message_stop"]
    assert response.headers["content-type"].startswith("text/event-stream")
    with sdk(server) as client, client.messages.stream(**body) as stream:
        texts = "".join(stream.text_stream)
        message = stream.get_final_message()
    whole = create(server, tools=[TOOL])
    said = [block.model_dump(exclude={"id", "parsed_output"}) for block in message.content]
    assert said == [block.model_dump(exclude={"id"}) for block in whole.content]
    assert (texts, message.stop_reason) == ("I look.", "tool_use")
    assert message.usage.output_tokens == whole.usage.output_tokens
    assert tokens_of(found[0]["message"]["usage"]) == tokens_of(found[-2]["usage"])


def test_a_round_of_tools_goes_on_from_what_is_cached(server):
    life = {"tools": [TOOL], "extra_body": {"agent_id": "round"}}
    first = create(server, **life)
    said = {"role": "assistant", "content": [b.model_dump() for b in first.content]}
    result = {"type": "tool_result", "tool_use_id": first.content[-1].id, "content": "rain"}
    second = create(server, messages=[*HELLO, said, {"role": "user", "content": [result]}], **life)
    before = tokens_of(first.usage.model_dump()) + first.usage.output_tokens
    assert second.usage.cache_read_input_tokens == before - 1
    assert second.stop_reason == "tool_use"
    shown = transcript(server, "round")["messages"]
    assert [message["role"] for message in shown] == ["user", "assistant", "tool", "assistant"]
    assert shown[1]["reasoning_content"] == "hm" and shown[2]["content"] == "rain"


def test_what_ends_an_answer_is_told(server):
    cut = create(server, max_tokens=4, tools=[TOOL])
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 4)
    stopped = create(server, stop_sequences=["nothing", "look"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "look")
    assert stopped.content[-1].text.strip() == "I"
    assert create(server).stop_reason == "end_turn"


def test_only_one_call_where_parallel_calls_are_not_wanted(server):
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    message = create(server, tools=[TOOL], tool_choice=choice)
    assert [block.type for block in message.content].count("tool_use") == 1


def test_tokens_are_counted_as_a_request_would_use_them(server):
    asked = {"messages": HELLO, "system": "Be brief.", "tools": [TOOL]}
    with sdk(server) as client:
        counted = client.messages.count_tokens(model="default", **asked)
        off = client.messages.count_tokens(model="default", thinking={"type": "disabled"}, **asked)
    used = tokens_of(create(server, **asked).usage.model_dump())
    assert counted.input_tokens == used
    assert off.input_tokens > used  # the template closes the thinking that it opens


def test_a_prewarm_answers_nothing_and_fills_the_cache(server):
    life = {"system": "You are warm.", "extra_body": {"agent_id": "warm"}}
    warmed = create(server, max_tokens=0, **life)
    assert (warmed.content, warmed.usage.output_tokens) == ([], 0)
    answered = create(server, **life)
    assert answered.usage.cache_read_input_tokens == tokens_of(warmed.usage.model_dump()) - 1
    assert len(transcript(server, "warm")["turns"]) == 1


def test_a_prewarm_that_goes_on_leaves_no_turn_and_counts_as_all_that_was_said(server):
    agent = {"agent_id": "goes-on"}
    create(server, tools=[TOOL], extra_body=agent)
    going_on = {"messages": [{"role": "user", "content": "And in Rome?"}]}
    going_on["extra_body"] = agent | {"agentmem": {"continue": True}}
    with sdk(server) as client:
        counted = client.messages.count_tokens(model="default", **going_on)
    warmed = create(server, max_tokens=0, **going_on)
    assert counted.input_tokens == tokens_of(warmed.usage.model_dump())
    assert len(transcript(server, "goes-on")["turns"]) == 1
    assert create(server, **going_on).usage.cache_read_input_tokens == counted.input_tokens - 1
    assert len(transcript(server, "goes-on")["turns"]) == 2


def test_an_answer_goes_on_with_the_assistants_last_words(server):
    begun = [*HELLO, {"role": "assistant", "content": "Well then: "}]
    life = {"extra_body": {"agent_id": "begun"}}
    answered = create(server, messages=begun, **life)
    counted = create(server, messages=HELLO, max_tokens=0).usage.model_dump()
    said = "".join(block.text for block in answered.content if block.type == "text")
    [_, shown] = transcript(server, "begun")["messages"]
    assert shown["content"] == "Well then: " + said
    with sdk(server) as client:
        tokens = client.messages.count_tokens(model="default", messages=begun).input_tokens
    assert tokens == tokens_of(answered.usage.model_dump()) > tokens_of(counted)
    more = [*HELLO, {"role": "assistant", "content": shown["content"]}, *HELLO]
    create(server, messages=more, **life)
    assert len(transcript(server, "begun")["turns"]) == 2


def test_system_messages_may_stand_between_others(server):
    late = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    message = create(server, messages=[*HELLO, late])
    assert message.usage.input_tokens > create(server).usage.input_tokens


def claude_code(messages, cch, **body):
    """A request as Claude Code 2.1 sends it, but for the length of its system prompt."""
    billing = f"x-anthropic-billing-header: cc_version=2.1.177.{cch}; cc_entrypoint=cli; cch={cch};"
    cached = {"cache_control": {"type": "ephemeral"}}
    user = {"device_id": "d", "account_uuid": "", "session_id": "session-1"}
    return {
        "model": "default",
        "max_tokens": 50,
        "messages": messages,
        "system": [
            {"type": "text", "text": billing},
            {"type": "text", "text": "You are Claude Code, Anthropic's official CLI.", **cached},
            {"type": "text", "text": "\nYou help with software. " * 10, **cached},
        ],
        "tools": [TOOL | {"eager_input_streaming": True}],
        "metadata": {"user_id": json.dumps(user)},
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "medium"},
        "stream": True,
        **body,
    }


def stream_of(server, body):
    """The message that a stream adds up to, by the SDK's own rules for usage."""
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "claude-code-20250219"}
    headers |= {"x-claude-code-session-id": "session-1", "x-app": "cli"}
    response = server.client.post("/messages?beta=true", json=body, headers=headers)
    assert response.status_code == 200, response.text
    lines = [line for line in response.text.split("\n") if line.startswith("data: ")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    blocks = []
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append(event["content_block"])
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            if delta["type"] == "input_json_delta":
                blocks[-1]["input"] = json.loads(delta["partial_json"])
            else:
                name = delta["type"].removesuffix("_delta")
                blocks[-1][name] += delta[name]
    [end] = [event for event in events if event["type"] == "message_delta"]
    return blocks, end


def test_claude_codes_second_turn_is_cached_but_for_what_is_new(server):
    reminder = {"type": "text", "text": "<system-reminder>Today.</system-reminder>\n"}
    asked = {"type": "text", "text": "Weather?", "cache_control": {"type": "ephemeral"}}
    opening = {"role": "user", "content": [reminder]}
    blocks, first = stream_of(
        server, claude_code([opening, {"role": "user", "content": [asked]}], "36e")
    )
    assert first["usage"]["cache_read_input_tokens"] == 0
    opening["content"] = reminder["text"]  # a list one turn and a string the next
    result = {"type": "tool_result", "tool_use_id": blocks[-1]["id"], "content": "rain"}
    history = [
        opening,
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": blocks},
        {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
    ]
    _, second = stream_of(server, claude_code(history, "0aa"))
    before = tokens_of(first["usage"]) + first["usage"]["output_tokens"]
    usage = second["usage"]
    assert usage["cache_read_input_tokens"] == before - 1  # the last one sampled is in no cache
    assert usage["cache_creation_input_tokens"] == tokens_of(usage) - before + 1
    assert usage["input_tokens"] == 0
    assert second["agentmem"]["agent_id"] == "session-1" and second["agentmem"]["cache"] == "hot"
    shown = transcript(server, "session-1")
    assert len(shown["turns"]) == 2 and "billing" not in json.dumps(shown)


def test_a_tool_that_is_loaded_later_leaves_the_cache_as_it_is_and_can_be_called(server):
    loading = {"name": "load", "input_schema": {"type": "object"}}
    asked = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "load"}]}
    reference = {"type": "tool_reference", "tool_name": "weather"}
    loaded = {"type": "tool_result", "tool_use_id": "t", "content": [reference]}
    history = [*HELLO, asked]
    life = {"extra_body": {"agent_id": "loads"}}
    first = create(server, tools=[loading], messages=HELLO, max_tokens=0, **life)
    second = create(
        server,
        tools=[TOOL | {"defer_loading": True}, loading],
        messages=[*history, {"role": "user", "content": [loaded]}],
        **life,
    )
    prompt = tokens_of(first.usage.model_dump())
    assert second.usage.cache_read_input_tokens >= prompt - 10  # but for where an answer begins
    assert (second.content[-1].name, second.content[-1].input) == ("weather", {"city": "Paris"})


def test_a_subagent_is_an_agent_of_its_own(server):
    headers = {"x-claude-code-session-id": "session-2", "x-claude-code-agent-id": "sub-1"}
    assert post(server, headers)["agentmem"]["agent_id"] == "sub-1"
    headers.pop("x-claude-code-agent-id")
    assert post(server, headers)["agentmem"]["agent_id"] == "session-2"
    assert post(server, metadata={"user_id": "me"})["agentmem"]["agent_id"] == "me"


# -- errors


def error_of(status, call):
    with pytest.raises(anthropic.APIStatusError) as e:
        call()
    body = e.value.body
    assert e.value.status_code == status
    assert body["type"] == "error" and set(body["error"]) == {"type", "message"}
    assert body["request_id"] == e.value.request_id
    assert e.value.request_id.startswith("req_")
    return body["error"]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"max_tokens": -2}, "max_tokens"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages.0.content"),
        ({"tools": [TOOL | {"input_schema": 1}]}, "tools.0.input_schema"),
        ({"tool_choice": {"type": "all"}, "tools": [TOOL]}, "tool_choice.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"messages": [*HELLO, {"role": "user", "content": [IMAGE]}]}, "messages.1.content.0"),
    ],
)
def test_a_refusal_names_what_is_wrong(server, body, named):
    error = error_of(400, lambda: create(server, **body))
    assert error["type"] == "invalid_request_error" and named in error["message"]
    with sdk(server) as client:
        if "max_tokens" not in body and "metadata" not in body:
            counted = {"model": "default", "messages": HELLO, **body}
            if "output_config" not in body:
                error_of(400, lambda: client.messages.count_tokens(**counted))


def test_other_errors_have_anthropics_shape_too(server):
    error = error_of(404, lambda: create(server, model="claude-opus-9"))
    assert error["type"] == "not_found_error" and "claude-opus-9" in error["message"]
    too_long = [{"role": "user", "content": "x" * 5000}]
    error = error_of(400, lambda: create(server, messages=too_long))
    assert error["message"].startswith("prompt is too long: 50")
    broken = server.client.post("/messages", content=b"{", headers={"x-request-id": "mine"})
    assert (broken.status_code, broken.json()["request_id"]) == (400, "mine")
    assert broken.headers["request-id"] == broken.headers["x-request-id"] == "mine"
    wrong = httpx.get(server.url + "/messages")
    assert wrong.status_code == 405 and wrong.json()["type"] == "error"
    chat = server.client.post("/chat/completions", json={"messages": []})
    assert "type" in chat.json()["error"] and "request_id" not in chat.json()


def test_errors_about_models_have_the_shape_of_who_asks(server):
    with sdk(server) as client:
        assert client.models.retrieve("default").type == "model"
        error = error_of(404, lambda: client.models.retrieve("claude-opus-9"))
    assert error["type"] == "not_found_error"
    plain = server.client.get("/models/claude-opus-9")
    assert (plain.status_code, plain.json()["error"]["code"]) == (404, "model_not_found")


def test_a_body_that_is_too_large_is_called_so(tmp_path, server):
    flags = (*FLAGS, "--max-body", "4096")
    with ServerProcess(tmp_path / "home", *flags, model=server.home.parent / "model") as small:
        error = error_of(413, lambda: create(small, system="x" * 5000))
        assert error["type"] == "request_too_large" and "4096" in error["message"]
        assert small.client.post("/chat/completions", content=b"x" * 5000).status_code == 400
        assert small.stop() == 0


def test_a_key_is_asked_for_in_anthropics_shape(tmp_path, server):
    keys = write_keys(tmp_path / "keys.toml")
    flags = (*FLAGS, "--api-keys", str(keys))
    model = server.home.parent / "model"
    with ServerProcess(tmp_path / "home", *flags, model=model) as guarded:
        asked = {"model": "default", "max_tokens": 5, "messages": HELLO}
        with sdk(guarded) as client:
            error = error_of(401, lambda: client.messages.create(**asked))
        assert error["type"] == "authentication_error"
        with sdk(guarded, api_key=KEYS["a"]) as client:
            assert client.messages.create(**asked).type == "message"
        with sdk(guarded, api_key=None, auth_token=KEYS["b"]) as client:
            assert client.messages.create(**asked).type == "message"
        assert guarded.stop() == 0


# -- models


def test_models_are_listed_for_clients_of_both_families(server):
    with sdk(server) as client:
        page = client.models.list()
        [model] = page.data
        found = client.models.retrieve("default")
    listed = server.client.get("/models").json()
    ModelInfo.model_validate(listed["data"][0])
    assert (model.type, model.display_name, model.id) == ("model", found.display_name, found.id)
    assert listed["object"] == "list" and listed["has_more"] is False
    assert listed["first_id"] == listed["last_id"] == model.id
    assert listed["data"][0]["object"] == "model" and listed["data"][0]["owned_by"]
    assert model.created_at.timestamp() == listed["data"][0]["created"]
