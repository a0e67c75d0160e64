"""Anthropic's blocks to messages of a chat, and an answer's parts to blocks and events."""

import json

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter, ValidationError

from agentmem.chat.answer_parser import Content, Reasoning
from agentmem.chat.messages import ToolCall
from agentmem.engine.api import Finished, RequestStats
from agentmem.errors import AgentMemError, Busy, ContextLengthExceeded, InvalidRequest
from agentmem.server.api.message_blocks import client_tools, function_tools, to_messages
from agentmem.server.api.message_events import GrowingMessage
from agentmem.server.api.messages import MessagesRequest, anthropic_error, error_event
from agentmem.transcripts.conversation import is_prefill

EVENT = TypeAdapter(RawMessageStreamEvent)
HELLO = [{"role": "user", "content": "hello"}]
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Zürich"}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1"}
STATS = RequestStats(100, 7, 60, "hot", 0, 0.0, 1.0, 2.0, 0.0)
NO_IMAGE = "[image left out: only text can be read]"
BILLING = "x-anthropic-billing-header: cc_version=2.1.177.01c; cc_entrypoint=cli; cch={};"


def text(words, **more):
    return {"type": "text", "text": words, **more}


def request(messages=HELLO, **body):
    return MessagesRequest.model_validate(
        {"model": "m", "max_tokens": 9, "messages": messages} | body
    )


def read(*messages, **body):
    body = request(list(messages), **body)
    return to_messages(body.messages, body.system)


def said(role, content):
    return {"role": role, "content": content}


# -- from blocks to messages


def test_a_string_and_its_only_block_are_one_message():
    cached = text("hello", cache_control={"type": "ephemeral"})
    assert read(said("user", "hello")) == read(said("user", [cached])) == HELLO
    assert read(said("system", "s"), *HELLO) == read(said("system", [text("s")]), *HELLO)
    assert read(*HELLO, system="s") == read(*HELLO, system=[text("s")])
    assert read(*HELLO, said("assistant", "a")) == read(*HELLO, said("assistant", [text("a")]))


def test_what_claude_code_bills_by_is_no_part_of_any_system_prompt():
    plain = read(*HELLO, system=[text("You are Claude Code."), text("\nBe brief.")])
    for cch in ("36ee5", "0aaa9"):
        billing = text(BILLING.format(cch))
        told = [billing, text("You are Claude Code."), text("\nBe brief.")]
        assert read(*HELLO, system=told) == plain
        assert read(*HELLO, system=[billing]) == HELLO
        assert read(said("system", [billing]), *HELLO) == HELLO
        joined = BILLING.format(cch) + "\nYou are Claude Code.\nBe brief."
        assert read(*HELLO, system=joined) == plain
    assert read(said("user", BILLING))[0]["content"] == BILLING


def test_a_round_of_tools_is_read_in_order():
    thought = {"type": "thinking", "thinking": "hm", "signature": "s"}
    hidden = {"type": "redacted_thinking", "data": "x"}
    messages = read(
        *HELLO,
        said("assistant", [thought, hidden, text("I look."), CALL]),
        said("user", [RESULT | {"content": [text("rain"), text(" all day")]}, text("so?")]),
        system="s",
    )
    arguments = '{"city": "Zürich"}'
    call = {"id": "toolu_1", "type": "function"}
    call["function"] = {"name": "weather", "arguments": arguments}
    assert messages == [
        said("system", "s"),
        *HELLO,
        said("assistant", "I look.") | {"reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "toolu_1", "content": "rain all day"},
        said("user", "so?"),
    ]


def test_a_result_may_be_a_string_or_nothing_and_an_empty_error_says_that_it_is_one():
    contents = [
        read(*HELLO, said("assistant", [CALL]), said("user", [RESULT | more]))[-1]["content"]
        for more in (
            {"content": "rain"},
            {},
            {"is_error": True},
            {"content": "x", "is_error": True},
        )
    ]
    assert contents == ["rain", "", "error", "x"]
    assert read(*HELLO, said("assistant", [CALL]))[-1]["content"] is None


def test_an_image_is_refused_where_it_is_new_and_noted_in_history_and_results():
    with pytest.raises(InvalidRequest, match="image") as e:
        read(*HELLO, said("assistant", "a"), said("user", [text("see"), IMAGE]))
    assert e.value.param == "messages.2.content.1"
    old = read(said("user", [text("see "), IMAGE]), said("assistant", "a"), *HELLO)
    assert old[0]["content"] == "see [image left out: only text can be read]"
    result = read(*HELLO, said("assistant", [CALL]), said("user", [RESULT | {"content": [IMAGE]}]))
    assert result[-1]["content"] == "[image left out: only text can be read]"


def test_documents_and_search_results_of_text_are_text():
    document = {"type": "document", "title": "T", "source": {"type": "text", "data": "words"}}
    found = {"type": "search_result", "title": "T", "source": "u", "content": [text("words")]}
    assert read(said("user", [document]))[0]["content"] == "T\nwords"
    assert read(said("user", [found]))[0]["content"] == "T\nu\nwords\n"
    pdf = {"type": "document", "source": {"type": "base64", "data": "AA=="}}
    with pytest.raises(InvalidRequest, match="document"):
        read(said("user", [pdf]))


@pytest.mark.parametrize(
    ("param", "messages", "body"),
    [
        ("messages.0.content", [said("user", 7)], {}),
        ("messages.0.content.0", [said("user", ["x"])], {}),
        ("messages.0.content.0.text", [said("user", [{"type": "text"}])], {}),
        ("messages.1.content", [*HELLO, {"role": "user"}], {}),
        ("messages.0.content.0.tool_use_id", [said("user", [RESULT | {"tool_use_id": 5}])], {}),
        ("messages.1.role", [*HELLO, said("tool", "x")], {}),
        ("messages.1.content.0", [*HELLO, said("user", [IMAGE]), said("system", "late")], {}),
        ("system", HELLO, {"system": 7}),
        ("system.0", HELLO, {"system": [IMAGE]}),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_name(param, messages, body):
    with pytest.raises(InvalidRequest) as e:
        read(*messages, **body)
    assert e.value.param.startswith(param)
    assert e.value.message.startswith(param)


@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": -2},
        {"max_tokens": None},
        {"temperature": -1},
        {"messages": []},
        {"messages": ["x"]},
        {"messages": {"role": "user", "content": "x"}},
        {"stop_sequences": [5]},
        {"tool_choice": {"type": "all"}},
        {"tool_choice": {"type": "tool"}},
        {"output_config": "json"},
        {"mcp_servers": [{"type": "url"}]},
        {"container": "c"},
    ],
)
def test_what_is_nonsense_or_would_not_be_honoured_is_refused(body):
    with pytest.raises(ValidationError):
        request(**body)


def test_hints_and_unknown_fields_are_accepted():
    body = request(
        thinking={"type": "adaptive", "display": "summarized"},
        context_management={"edits": []},
        output_config={"effort": "high"},
        mcp_servers=[],
        container={},
        betas=["compact-2026-01-12"],
        service_tier="auto",
        speed=None,
        tomorrow=1,
    )
    assert body.options == {"enable_thinking": True}
    off = request(thinking={"type": "disabled"})
    assert (off.options, request().options) == ({"enable_thinking": False}, {})


def test_an_answer_goes_on_with_what_the_assistant_has_begun_to_say():
    thought = {"type": "thinking", "thinking": "hm", "signature": "s"}
    assert is_prefill(read(*HELLO, said("assistant", "The")))
    assert is_prefill(read(*HELLO, said("assistant", [thought, text("The")])))
    for last in ("", [], [thought], [CALL], [text("I look."), CALL]):
        assert not is_prefill(read(*HELLO, said("assistant", last)))
    assert not is_prefill(read(*HELLO)) and not is_prefill([])


def called(name, arguments, call_id="t1"):
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def result(content, call_id="t1"):
    return {"role": "tool", "tool_call_id": call_id, "content": content}


@pytest.mark.parametrize(
    ("kind", "content", "read_as"),
    [
        (
            "web_search_tool_result",
            [{"type": "web_search_result", "title": "T", "url": "u", "encrypted_content": "x"}],
            '{"type": "web_search_result", "title": "T", "url": "u"}\n',
        ),
        (
            "web_search_tool_result",
            {"type": "web_search_tool_result_error", "error_code": "unavailable"},
            '{"type": "web_search_tool_result_error", "error_code": "unavailable"}',
        ),
        (
            "code_execution_tool_result",
            {"type": "code_execution_result", "stdout": "1", "return_code": 0},
            '{"type": "code_execution_result", "stdout": "1", "return_code": 0}',
        ),
        ("mcp_tool_result", [text("rain"), IMAGE], f"rain{NO_IMAGE}"),
        ("tool_result", None, ""),
    ],
)
def test_what_anthropic_ran_is_called_and_answered_like_any_tool(kind, content, read_as):
    made = {"type": "server_tool_use", "id": "t1", "name": "search", "input": {"query": "x"}}
    answered = {"type": kind, "tool_use_id": "t1", "content": content}
    messages = read(
        *HELLO, said("assistant", [text("I look."), made, answered, text("Rain.")]), *HELLO
    )
    assert messages == [
        *HELLO,
        said("assistant", "I look.") | {"tool_calls": [called("search", '{"query": "x"}')]},
        result(read_as),
        said("assistant", "Rain."),
        *HELLO,
    ]


@pytest.mark.parametrize(
    ("content", "read_as"),
    [
        (None, ""),
        ([], ""),
        (7, "7"),
        (["so"], "so"),
        ([None], ""),
        ([{"type": "text"}], ""),
        ([{"text": "so"}], "so"),
        ([text("so ", citations=None, cache_control=None), IMAGE], f"so {NO_IMAGE}"),
        (
            [{"type": "container_upload", "file_id": "f"}],
            NO_IMAGE.replace("image", "container_upload"),
        ),
        (
            [{"type": "compaction", "content": "all that was", "encrypted_content": "x"}],
            "all that was",
        ),
        ([{"type": "of_next_year", "what": "ever"}], '{"type": "of_next_year", "what": "ever"}\n'),
    ],
)
@pytest.mark.parametrize("role", ["user", "assistant", "critic"])
def test_any_content_of_history_is_read(role, content, read_as):
    [message, _, _] = read(said(role, content), said("assistant", "a"), *HELLO)
    assert message == said("assistant" if role == "assistant" else "user", read_as)


def test_what_only_anthropics_servers_can_read_is_left_out():
    hidden = [
        {"type": "redacted_thinking", "data": "x"},
        {"type": "fallback", "from": {"model": "a"}, "to": {"model": "b"}},
    ]
    [_, answer, _] = read(*HELLO, said("assistant", [*hidden, text("Rain.")]), *HELLO)
    assert answer == said("assistant", "Rain.")


def test_calls_and_results_of_any_form_find_one_another():
    calls = [
        {"type": "tool_use", "name": "f", "input": "cut {"},
        {"type": "tool_use", "id": "t2", "input": None},
        {"type": "mcp_tool_use", "id": "t3", "name": "g", "input": [1], "server_name": "s"},
    ]
    results = [
        {"type": "tool_result", "content": [{"type": "tool_reference", "tool_name": "g"}]},
        RESULT | {"tool_use_id": "t3", "content": "3"},
        RESULT | {"tool_use_id": None, "content": [IMAGE]},
    ]
    [_, asked, *answers] = read(*HELLO, said("assistant", calls), said("user", results))
    assert asked["tool_calls"] == [
        called("f", "cut {", "call_1"),
        called("tool", "{}", "t2"),
        called("g", "[1]", "t3"),
    ]
    assert answers == [
        result('{"type": "tool_reference", "tool_name": "g"}\n', "call_1"),
        result("3", "t3"),
        result(NO_IMAGE, "t2"),
    ]


def test_a_deferred_tool_is_told_where_a_message_refers_to_it():
    tools = [{"name": name, "input_schema": {}} for name in "fgh"]
    tools[1]["defer_loading"] = True
    found = client_tools(tools)
    assert [tool["function"]["name"] for tool in found.functions] == ["f", "h"]
    [late] = found.deferred
    reference = {"type": "tool_reference", "tool_name": "g"}
    added = {"type": "tool_addition", "tool": {"type": "tool_reference", "name": "g"}}
    body = request(
        [
            *HELLO,
            said("assistant", [CALL]),
            said("user", [RESULT | {"content": [reference]}]),
            said("system", [added]),
        ]
    )
    [_, _, answer, told] = to_messages(body.messages, body.system, found.deferred)
    assert json.loads(answer["content"]) == late
    assert json.loads(told["content"])["tool"] == late
    searched = [*tools, {"type": "tool_search_tool_bm25", "name": "s"}]
    assert client_tools(searched).deferred == []
    assert len(client_tools(searched).functions) == 3


def test_tools_that_come_later_are_told_where_they_come():
    tool = {"type": "tool_definition", "definition": {"name": "f", "input_schema": {}}}
    added = {"type": "tool_addition", "tool": tool, "cache_control": {"type": "ephemeral"}}
    [_, told] = read(*HELLO, said("system", [text("Also: "), added]))
    assert told["role"] == "system" and told["content"].startswith("Also: ")
    assert json.loads(told["content"].removeprefix("Also: ")) == {
        "type": "tool_addition",
        "tool": tool,
    }


def test_only_the_clients_own_tools_are_offered():
    schema = {"type": "object", "properties": {}}
    own = {"name": "weather", "input_schema": schema, "cache_control": {"type": "ephemeral"}}
    theirs = {"type": "web_search_20250305", "name": "web_search"}
    [tool] = function_tools([own, theirs])
    assert tool["function"] == {"name": "weather", "description": "", "parameters": schema}
    assert function_tools([own | {"type": "custom", "description": "d"}])[0]["function"][
        "description"
    ]
    for broken, param in (({"input_schema": 1}, "input_schema"), ({"name": 1}, "name")):
        with pytest.raises(InvalidRequest) as e:
            function_tools([own | broken])
        assert e.value.param == f"tools.0.{param}"


# -- from parts to blocks


def events(growing, parts, finished):
    """All events of an answer, each of them one of Anthropic's."""
    lines = [*growing.begin()]
    for part in parts:
        lines += growing.add(part)
    lines += growing.finish(finished, {"cache": "hot"})
    found = []
    for line in lines:
        name, data = line.removesuffix("\n\n").split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] != "ping":
            EVENT.validate_python(event, strict=False)
        found.append(event)
    return found


def growing(*, max_tokens=9, marks_cache=False):
    return GrowingMessage("m", 100, max_tokens=max_tokens, marks_cache=marks_cache)


def test_an_answer_of_every_kind_of_part_comes_as_a_block_each():
    answer = growing()
    call = ToolCall("call_1", "weather", {"city": "Zürich"})
    parts = [Reasoning("h"), Reasoning("m"), Content("I "), Content("look."), call, Content("!")]
    found = events(answer, parts, Finished("stop", STATS))
    assert [e["type"].removeprefix("content_block_") for e in found] == [
        *("message_start", "ping"),
        *("start", "delta", "delta", "delta", "stop"),
        *("start", "delta", "delta", "stop"),
        *("start", "delta", "stop"),
        *("start", "delta", "stop"),
        *("message_delta", "message_stop"),
    ]
    assert [e["index"] for e in found if e["type"] == "content_block_start"] == [0, 1, 2, 3]
    kinds = [e["delta"]["type"] for e in found if e["type"] == "content_block_delta"]
    assert kinds == [
        *("thinking_delta", "thinking_delta", "signature_delta"),
        *("text_delta", "text_delta", "input_json_delta", "text_delta"),
    ]
    message = Message.model_validate(answer.body, strict=True)
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "text"]
    assert (message.content[0].thinking, message.content[1].text) == ("hm", "I look.")
    assert message.content[2].input == {"city": "Zürich"}
    assert message.stop_reason == found[-2]["delta"]["stop_reason"] == "tool_use"
    again = read(*HELLO, {"role": "assistant", "content": answer.body["content"]})[-1]
    assert (again["content"], again["reasoning_content"]) == ("I look.!", "hm")


def test_no_sign_of_life_comes_before_the_message_starts():
    answer = growing()
    lines = [*answer.ping(), *answer.ping(), *answer.begin(), *answer.add(Content("a"))]
    names = [line.split("\n")[0].removeprefix("event: ") for line in lines]
    assert names == ["message_start", "ping", "ping", "content_block_start", "content_block_delta"]


@pytest.mark.parametrize(
    ("finished", "max_tokens", "reason"),
    [
        (Finished("stop", STATS), 9, "end_turn"),
        (Finished("length", STATS), 7, "max_tokens"),
        (Finished("length", STATS), 9, "model_context_window_exceeded"),
        (Finished("stop", STATS, "END"), 9, "stop_sequence"),
    ],
)
def test_why_an_answer_ended_is_told_in_anthropics_words(finished, max_tokens, reason):
    answer = growing(max_tokens=max_tokens)
    delta = events(answer, [Content("a")], finished)[-2]["delta"]
    assert (delta["stop_reason"], delta["stop_sequence"]) == (reason, finished.stop_string)
    assert answer.body["stop_sequence"] == finished.stop_string


def test_a_prewarm_is_a_message_without_content():
    answer = growing(max_tokens=0)
    stats = RequestStats(100, 0, 60, "hot", 0, 0.0, 1.0, 2.0, 0.0)
    found = events(answer, [], Finished("length", stats))
    assert [e["type"] for e in found[2:]] == ["message_delta", "message_stop"]
    assert (answer.body["content"], answer.body["stop_reason"]) == ([], "max_tokens")


def test_the_three_kinds_of_input_tokens_add_up_to_the_prompt():
    marked, plain = growing(marks_cache=True), growing()
    for answer in (marked, plain):
        [*_, delta, _] = events(answer, [], Finished("stop", STATS))
        assert delta["usage"] == answer.body["usage"]
    kinds = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    assert [marked.body["usage"][kind] for kind in kinds] == [0, 40, 60]
    assert [plain.body["usage"][kind] for kind in kinds] == [40, 0, 60]


@pytest.mark.parametrize(
    "body",
    [
        {"cache_control": {"type": "ephemeral"}},
        {"system": [text("s", cache_control={"type": "ephemeral"})]},
        {"messages": [said("user", [text("s", cache_control={"type": "ephemeral"})])]},
        {"tools": [{"name": "x", "cache_control": {"type": "ephemeral"}}]},
    ],
)
def test_a_client_that_says_where_to_cache_is_told_what_was_written(body):
    assert request(**body).marks_cache and not request().marks_cache


# -- errors


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (409, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
    ],
)
def test_the_type_of_an_error_follows_from_its_status(status, kind):
    error = AgentMemError("no \ud800")
    error.status = status
    body = anthropic_error(error, "req_1")
    assert body["error"] == {"type": kind, "message": "no \\ud800"}
    assert (body["type"], body["request_id"]) == ("error", "req_1")


def test_a_prompt_that_is_too_long_is_called_so_and_ends_a_stream():
    name, data = error_event(ContextLengthExceeded(90, 64), "req_1").strip().split("\n")
    error = json.loads(data.removeprefix("data: "))
    assert name == "event: error" and error["error"]["message"].startswith(
        "prompt is too long: 90 tokens > 64 maximum"
    )
    assert error["type"] == "error" and error["request_id"] == "req_1"
    assert "overloaded" not in error_event(Busy("queue"), "r")
