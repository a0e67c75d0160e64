"""The items of a Responses answer: reasoning, text, calls; and what a client sends back of it."""

import asyncio
import json

import httpx
import openai
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import json_tools
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from agentmem.config import Settings
from agentmem.server.api.responses_wire import InputItem, _messages
from agentmem.server.app import create_app
from support.chat.families import load
from support.fake_engine import FakeEngine

EVENT = TypeAdapter(ResponseStreamEvent)
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": True,
}
THOUGHT = "<think>\nhm\n</think>\n\n"
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def tool_calling(family: str) -> TokenizerWrapper:
    """Return the tokenizer that mlx-lm makes of a model with this template."""
    tokenizer = load(family)
    marks = {
        "tool_call_start": json_tools.tool_call_start,
        "tool_call_end": json_tools.tool_call_end,
    }
    ends = tokenizer.eos_token_ids
    return TokenizerWrapper(
        tokenizer._tokenizer, eos_token_ids=ends, tool_parser=json_tools.parse_tool_call, **marks
    )


@pytest.fixture
def call(tmp_path):
    """Requests to one app whose engine says these words, one list for each."""

    def call(*requests):
        engine = FakeEngine(max_context=4096)
        engine.tokenizer = tool_calling("qwen3")

        async def all_of_them():
            app = create_app(engine, Settings(home=tmp_path), None)
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            answers = []
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost:8000/v1"
            ) as client:
                for method, path, body, words in requests:
                    engine.words = words
                    path = path(answers) if callable(path) else path
                    body = body(answers) if callable(body) else body
                    # with NaN and lone surrogates, if so wanted
                    content = json.dumps(body) if body else None
                    headers = {"content-type": "application/json"}
                    answers.append(
                        await client.request(method, path, content=content, headers=headers)
                    )
            return answers

        return engine, asyncio.run(all_of_them())

    return call


def events(response: httpx.Response) -> list[dict]:
    blocks = [block for block in response.text.split("\n\n") if block and not block.startswith(":")]
    return [json.loads(block.split("\n")[1].removeprefix("data: ")) for block in blocks]


def test_reasoning_text_and_calls_are_items_whose_events_openais_sdk_puts_together(call):
    body = {"input": "weather?", "tools": [WEATHER, {"type": "web_search"}], "stream": True}
    _, (answer,) = call(("POST", "/responses", body, [*THOUGHT, "Let me ", "see. ", CALL]))
    found = events(answer)
    state = ResponseStreamState(input_tools=openai.omit, text_format=openai.omit)
    for event in found:
        state.handle_event(EVENT.validate_python(event))
    response = found[-1]["response"]
    Response.model_validate(response)
    assert response["status"] == "completed"
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    assert [item["type"] for item in response["output"]] == [
        "reasoning",
        "message",
        "function_call",
    ]
    assert [item.type for item in state._completed_response.output] == [
        item["type"] for item in response["output"]
    ]
    assert response["output"][0]["content"][0]["text"] == "hm"
    assert state._completed_response.output_text == "Let me see."
    assert json.loads(response["output"][2]["arguments"]) == {"city": "Paris"}
    assert all(item["status"] == "completed" for item in response["output"])
    kinds = [e["type"].removeprefix("response.") for e in found]
    assert kinds[-5:-1] == [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]


@pytest.mark.parametrize(
    "words", [[THOUGHT, "So. ", CALL], ["So. ", CALL, "\nAnd ", CALL, " there."]]
)
def test_a_chain_through_tool_calls_renders_as_the_same_conversation_sent_whole(call, words):
    first = {"input": "weather?", "tools": [WEATHER], "agent_id": "a"}

    def result(answers):
        ids = [
            item["call_id"]
            for item in answers[0].json()["output"]
            if item["type"] == "function_call"
        ]
        return [
            {"type": "function_call_output", "call_id": call_id, "output": "rain"}
            for call_id in ids
        ]

    def chained(answers):
        return {
            "input": result(answers),
            "tools": [WEATHER],
            "previous_response_id": answers[0].json()["id"],
        }

    def whole(answers):
        said = [
            {"role": "user", "content": "weather?"},
            *answers[0].json()["output"],
            *result(answers),
        ]
        return {"input": said, "tools": [WEATHER], "store": False}

    engine, answers = call(
        ("POST", "/responses", first, words),
        ("POST", "/responses", chained, ["Rain."]),
        ("POST", "/responses", whole, ["Rain."]),
        ("GET", "/agents/a/transcript", None, []),
    )
    assert [a.status_code for a in answers] == [200] * 4, [a.text for a in answers]
    assert engine.requests[1].tokens == engine.requests[2].tokens
    roles = [m["role"] for m in answers[3].json()["messages"]]
    assert roles == ["user", "assistant", *["tool"] * words.count(CALL), "assistant"]
    assert answers[3].json()["messages"][1].get("reasoning_content") == (
        "hm" if THOUGHT in words else None
    )


def test_a_chat_client_that_drops_the_reasoning_still_goes_on_from_its_last_turn(call):
    def more(answers):
        message = answers[0].json()["choices"][0]["message"]
        said = [{"role": "assistant", "content": [{"type": "text", "text": message["content"]}]}]
        return {"messages": [*asked, *said, {"role": "user", "content": "and?"}], "agent_id": "a"}

    asked = [{"role": "user", "content": "weather?"}]
    _, answers = call(
        ("POST", "/chat/completions", {"messages": asked, "agent_id": "a"}, [THOUGHT, "Rain. "]),
        ("POST", "/chat/completions", more, ["Sun."]),
        ("GET", "/agents/a/transcript", None, []),
    )
    shown = answers[2].json()
    assert [turn["messages"] for turn in shown["turns"]] == [2, 2]
    assert shown["messages"][1]["reasoning_content"] == "hm"


def test_context_for_an_agent_with_tools_and_instructions_is_the_prefix_of_its_next_prompt(call):
    def later(answers):
        return {
            "input": "and now?",
            "instructions": "be brief",
            "tools": [WEATHER],
            "agentmem": {"continue": True},
            "agent_id": "a",
        }

    first = {"input": "weather?", "instructions": "be brief", "tools": [WEATHER], "agent_id": "a"}
    engine, answers = call(
        ("POST", "/responses", first, ["Rain."]),
        ("POST", "/agents/a/context", {"text": "It stopped."}, []),
        ("POST", "/responses", later, ["Dry."]),
    )
    assert [a.status_code for a in answers] == [200] * 3, [a.text for a in answers]
    told, asked = engine.requests[1].tokens, engine.requests[2].tokens
    assert asked[: len(told)] == told and engine.requests[1].params.max_tokens == 0


def test_items_that_are_one_answer_become_one_message():
    items = [
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}],
        },
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "hm"}],
        },
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "So"}],
        },
        {
            "type": "function_call",
            "id": "fc_1",
            "call_id": "c1",
            "name": "f",
            "arguments": "{}",
            "status": "completed",
        },
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
        {
            "type": "function_call_output",
            "call_id": "c1",
            "output": [{"type": "input_text", "text": "1"}],
        },
        {"type": "function_call_output", "call_id": "c2", "output": "2"},
        {"type": "reasoning", "summary": [], "encrypted_content": "xyz"},
        {"type": "message", "role": "assistant", "content": "one"},
        {"type": "message", "role": "assistant", "content": "two"},
    ]
    messages = _messages([InputItem.model_validate(item) for item in items])
    assert [(m["role"], m["content"]) for m in messages] == [
        ("user", "ab"),
        ("assistant", "So"),
        ("tool", "1"),
        ("tool", "2"),
        ("assistant", "one"),
        ("assistant", "two"),
    ]
    assert messages[1]["reasoning_content"] == "hm"
    assert [c["id"] for c in messages[1]["tool_calls"]] == ["c1", "c2"]


def test_a_chat_that_continues_keeps_the_tools_it_began_with_unless_it_says_otherwise(call):
    tool = {
        "type": "function",
        "function": {name: WEATHER[name] for name in ("name", "description", "parameters")},
    }
    asked, more = ([{"role": "user", "content": text}] for text in ("weather?", "and now?"))
    go_on = {"messages": more, "agent_id": "a", "agentmem": {"continue": True}}
    engine, answers = call(
        (
            "POST",
            "/chat/completions",
            {"messages": asked, "agent_id": "a", "tools": [tool]},
            ["Rain."],
        ),
        ("POST", "/chat/completions", go_on, ["Sun."]),
        ("POST", "/chat/completions", {**go_on, "tools": []}, ["Sun."]),
    )
    assert [a.status_code for a in answers] == [200] * 3
    first, kept, dropped = (engine.tokenizer.decode(request.tokens) for request in engine.requests)
    assert kept.startswith(first) and "get_weather" not in dropped


TEXT = "input.0.content.0.text"
CALLED = {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": "{}"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": [{"role": "user", "content": "\ud800"}]}, "input.0.content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "\ud800"}]}]},
            TEXT,
        ),
        (
            {
                "input": [
                    {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "\ud800"}]}
                ]
            },
            TEXT,
        ),
        ({"input": [{**CALLED, "name": ""}]}, "input.0.name"),
        ({"input": [{**CALLED, "arguments": "{"}]}, "input.0.arguments"),
        ({"input": [{**CALLED, "arguments": '{"city": NaN}'}]}, "input.0.arguments"),
        ({"input": "weather? " * 5000}, "input"),
        ({"include": ["reasoning.encrypted_content", "message.output_text.logprobs"]}, "include.1"),
        ({"tools": [{**WEATHER, "name": ""}]}, "tools.0.name"),
        ({"tools": [{**WEATHER, "parameters": {"maximum": float("nan")}}]}, "tools"),
    ],
)
def test_what_cannot_be_read_is_refused_by_the_name_that_it_has_in_this_format(call, body, param):
    _, (answer,) = call(("POST", "/responses", {"input": "hi", **body}, []))
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_zero_turns_off_what_is_a_number_and_false_what_is_a_switch(call):
    _, answers = call(
        ("POST", "/responses", {"input": "hi", "top_logprobs": 0, "background": False}, ["Hi"]),
        (
            "POST",
            "/chat/completions",
            {"messages": [{"role": "user", "content": "hi"}], "top_logprobs": 0},
            ["Hi"],
        ),
        ("POST", "/responses", {"input": "hi", "top_logprobs": False}, []),
    )
    assert [a.status_code for a in answers] == [200, 200, 400]


def test_what_was_taken_can_be_shown_however_deep_it_is(call):
    deep = json.loads('{"a": ' * 400 + "1" + "}" * 400)
    said = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": deep}}
    messages = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "tool_calls": [said]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    responses = {"input": "hi", "tools": [{**WEATHER, "parameters": deep}], "agent_id": "b"}
    _, answers = call(
        ("POST", "/chat/completions", {"messages": messages, "agent_id": "a"}, ["Rain."]),
        ("GET", "/agents/a/transcript", None, []),
        ("POST", "/responses", responses, ["Hi"]),
        ("GET", lambda answers: f"/responses/{answers[-1].json()['id']}", None, []),
    )
    assert [a.status_code for a in answers] == [200] * 4
    assert answers[1].json()["messages"][1]["tool_calls"] == [said]
    assert answers[3].json() == answers[2].json()


def test_a_response_is_shown_under_its_own_id_alone_also_after_what_was_said_before_it_was_replaced(
    call,
):
    _, answers = call(
        ("POST", "/agents/a/context", {"text": "Rain.", "key": "report"}, []),
        (
            "POST",
            "/responses",
            {"input": "weather?", "agent_id": "a", "agentmem": {"continue": True}},
            ["Rain."],
        ),
        ("POST", "/agents/a/context", {"text": "Sun.", "key": "report"}, []),
        ("GET", "/agents/a/transcript", None, []),
        ("GET", lambda answers: f"/responses/{answers[1].json()['id']}", None, []),
        ("GET", lambda answers: f"/responses/{answers[3].json()['turn']}", None, []),
        ("GET", lambda answers: f"/responses/{answers[1].json()['id']}?stream=true", None, []),
    )
    shown = answers[3].json()
    assert [message["content"] for message in shown["messages"]] == ["Sun.", "weather?", "Rain."]
    assert answers[4].json() == answers[1].json()
    assert answers[5].status_code == 404
    assert answers[6].json()["error"]["param"] == "stream"
