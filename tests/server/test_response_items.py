"""The items of a Responses answer: reasoning, text, calls; and what a client sends back of it."""

import asyncio
import json

import httpx
import openai
import pytest
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from agentmem.config import Settings
from agentmem.server.api.response_items import to_messages
from agentmem.server.app import create_app
from support.chat.families import tool_calling
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
    messages = to_messages(items)
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


ASKED = {"role": "user", "content": "weather?"}
CALLED = {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": "{}"}
IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AA=="}
NO_IMAGE = "[image left out: only text can be read]"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": [{**CALLED, "name": ""}]}, "input.0.name"),
        ({"input": [{**CALLED, "call_id": 5}]}, "input.0.call_id"),
        ({"input": [ASKED, {**CALLED, "arguments": {"city": "Paris"}}]}, "input.1.arguments"),
        ({"input": [CALLED, {"type": "function_call_output", "output": 5}]}, "input.1.output"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role"),
        ({"input": [{"role": "user"}]}, "input.0.content"),
        ({"input": [ASKED, {"role": "user", "content": [IMAGE]}]}, "input.1.content.0"),
        (
            {"input": [{"role": "user", "content": [IMAGE]}, {"role": "developer", "content": ""}]},
            "input.0.content.0",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": 5}]}]},
            "input.0.content.0.text",
        ),
        ({"input": "weather? " * 5000}, "input"),
        ({"include": ["reasoning.encrypted_content", "message.reasoning.logprobs"]}, "include.1"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{**WEATHER, "name": ""}]}, "tools.0.name"),
        ({"tools": [WEATHER, {"type": "custom", "name": 5}]}, "tools.1.name"),
        (
            {"tools": [{"type": "namespace", "name": "n", "tools": [{**WEATHER, "name": 5}]}]},
            "tools.0.tools.0.name",
        ),
        ({"tools": [{**WEATHER, "parameters": {"maximum": float("nan")}}]}, "tools"),
    ],
)
def test_what_is_new_and_cannot_be_read_is_refused_by_its_name(call, body, param):
    _, (answer,) = call(("POST", "/responses", {"input": "hi", **body}, []))
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def called(name, arguments, call_id="c1"):
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


@pytest.mark.parametrize(
    ("items", "name", "arguments", "result"),
    [
        (
            [
                {"type": "custom_tool_call", "call_id": "c1", "name": "patch", "input": "*** Do"},
                {"type": "custom_tool_call_output", "call_id": "c1", "output": "done"},
            ],
            *("patch", '{"input": "*** Do"}', "done"),
        ),
        (
            [
                {**CALLED, "namespace": "mcp__town", "arguments": '{"city": '},
                {"type": "function_call_output", "call_id": "c1", "output": None},
            ],
            *("mcp__town__get_weather", '{"city": ', ""),
        ),
        (
            [
                {**CALLED, "arguments": {"city": "Paris"}},
                {"type": "function_call_output", "call_id": "c1", "output": [IMAGE, "rain"]},
            ],
            *("get_weather", '{"city": "Paris"}', NO_IMAGE + "rain"),
        ),
        (
            [
                {"type": "local_shell_call", "call_id": "c1", "action": {"command": ["ls"]}},
                {"type": "local_shell_call_output", "id": "c1", "output": "a.txt"},
            ],
            *("local_shell", '{"command": ["ls"]}', "a.txt"),
        ),
        (
            [
                {"type": "shell_call", "call_id": "c1", "action": {"commands": ["ls"]}},
                {"type": "shell_call_output", "call_id": "c1", "output": [{"stdout": "a.txt"}]},
            ],
            *("shell", '{"commands": ["ls"]}', '{"stdout": "a.txt"}\n'),
        ),
        (
            [
                {"type": "apply_patch_call", "call_id": "c1", "operation": {"path": "a"}},
                {"type": "apply_patch_call_output", "call_id": "c1", "status": "failed"},
            ],
            *("apply_patch", '{"path": "a"}', "failed"),
        ),
        (
            [
                {"type": "tool_search_call", "call_id": "c1", "arguments": {"query": "x"}},
                {"type": "tool_search_output", "call_id": "c1", "tools": []},
            ],
            *("tool_search", '{"query": "x"}', "[]"),
        ),
        (
            [{"type": "web_search_call", "id": "c1", "status": "completed", "action": {"q": "x"}}],
            *("web_search", '{"q": "x"}', "completed"),
        ),
        (
            [
                {
                    "type": "mcp_call",
                    "id": "c1",
                    "server_label": "town",
                    "name": "f",
                    "arguments": "{}",
                    "output": "rain",
                }
            ],
            *("town__f", "{}", "rain"),
        ),
        (
            [
                {
                    "type": "code_interpreter_call",
                    "id": "c1",
                    "code": "1",
                    "outputs": [{"type": "logs", "logs": "1"}],
                }
            ],
            *("code_interpreter", '{"code": "1"}', "1"),
        ),
        (
            [{"type": "image_generation_call", "id": "c1", "result": "AAAA", "prompt": "a cat"}],
            *("image_generation", '{"prompt": "a cat"}', NO_IMAGE),
        ),
        (
            [
                {"type": "computer_call", "call_id": "c1", "action": {"type": "screenshot"}},
                {
                    "type": "computer_call_output",
                    "call_id": "c1",
                    "output": {"type": "computer_screenshot", "image_url": "data:"},
                },
            ],
            *(
                "computer",
                '{"type": "screenshot"}',
                "[computer_screenshot left out: only text can be read]",
            ),
        ),
    ],
)
def test_every_kind_of_call_and_its_result_are_those_of_a_tool(items, name, arguments, result):
    messages = to_messages([ASKED, *items, ASKED])
    assert messages == [
        ASKED,
        {"role": "assistant", "content": None, "tool_calls": [called(name, arguments)]},
        {"role": "tool", "tool_call_id": "c1", "content": result},
        ASKED,
    ]


@pytest.mark.parametrize(
    "item",
    [
        {"type": "item_reference", "id": "msg_1"},
        {"type": None, "id": "msg_1"},
        {"type": "item_reference", "id": "msg_" + "0" * 34},
        {"type": "compaction", "encrypted_content": "x"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
        {"type": "something_of_next_year", "payload": {"x": 1}},
    ],
)
def test_an_item_without_anything_to_read_changes_nothing_that_the_model_sees(call, item):
    engine, answers = call(
        ("POST", "/responses", {"input": [ASKED, ASKED]}, ["Rain."]),
        ("POST", "/responses", {"input": [ASKED, item, ASKED]}, ["Rain."]),
    )
    assert [a.status_code for a in answers] == [200, 200], answers[1].text
    assert engine.requests[0].tokens == engine.requests[1].tokens


def test_a_reference_is_the_item_that_it_refers_to(call):
    first = {"input": [ASKED], "tools": [WEATHER], "agent_id": "a"}

    def more(answers, *, by_reference):
        output = answers[0].json()["output"]
        said = [{"type": "item_reference", "id": item["id"]} for item in output]
        result = {"type": "function_call_output", "call_id": output[-1]["call_id"], "output": "ok"}
        items = [ASKED, *(said if by_reference else output), result]
        return {"input": items, "tools": [WEATHER], "agent_id": "a"}

    engine, answers = call(
        ("POST", "/responses", first, [THOUGHT, "So. ", CALL]),
        ("POST", "/responses", lambda answers: more(answers, by_reference=True), ["Rain."]),
        ("POST", "/responses", lambda answers: more(answers, by_reference=False), ["Rain."]),
    )
    assert [a.status_code for a in answers] == [200] * 3, answers[1].text
    assert engine.requests[1].tokens == engine.requests[2].tokens


def test_what_an_old_message_holds_besides_text_is_noted():
    said = {
        "type": "message",
        "id": "m1",
        "status": "completed",
        "phase": "commentary",
        "role": "assistant",
        "content": [
            {"type": "output_text", "text": "So", "annotations": [{}], "logprobs": []},
            {"type": "refusal", "refusal": " no."},
        ],
    }
    messages = to_messages(
        [
            {"role": "user", "content": [IMAGE, {"type": "input_text", "text": "see"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
            said,
            {"role": "user", "content": [{"type": "input_file", "file_id": "f"}, {"what": "ever"}]},
            {"role": "critic", "content": "x"},
            {"role": "tool", "content": None},
            ASKED,
        ]
    )
    assert messages == [
        {"role": "user", "content": NO_IMAGE + "see"},
        {"role": "assistant", "content": "So no.", "reasoning_content": "hm"},
        {
            "role": "user",
            "content": '[file left out: only text can be read]{"what": "ever"}\n',
        },
        {"role": "user", "content": "x"},
        {"role": "tool", "tool_call_id": "call_6", "content": ""},
        ASKED,
    ]


def test_results_without_ids_are_those_of_the_calls_that_have_none_yet():
    calls = [
        {"type": "function_call", "name": name, "arguments": "{}", "call_id": call_id}
        for name, call_id in (("f", None), ("g", "c2"))
    ]
    results = [{"type": "function_call_output", "output": text} for text in ("1", "2")]
    _, asked, first, second = to_messages([ASKED, *calls, *results])
    assert [call["id"] for call in asked["tool_calls"]] == ["call_2", "c2"]
    assert [first["tool_call_id"], second["tool_call_id"]] == ["call_2", "c2"]


PATCH = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edits files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: begin hunk+ end"},
}
TOWN = {"type": "namespace", "name": "mcp__town", "description": "d", "tools": [WEATHER]}


@pytest.mark.parametrize(
    ("name", "arguments", "item"),
    [
        (
            *("apply_patch", {"input": "*** Begin\n"}),
            {"type": "custom_tool_call", "name": "apply_patch", "input": "*** Begin\n"},
        ),
        (
            *("mcp__town__get_weather", {"city": "Paris"}),
            {
                "type": "function_call",
                "name": "get_weather",
                "namespace": "mcp__town",
                "arguments": '{"city": "Paris"}',
            },
        ),
        (
            *("loaded__patch", {"input": "x"}),
            {"type": "custom_tool_call", "name": "patch", "namespace": "loaded", "input": "x"},
        ),
    ],
)
def test_a_call_is_answered_as_the_kind_of_tool_that_the_client_has(call, name, arguments, item):
    loaded = {"type": "namespace", "name": "loaded", "tools": [PATCH | {"name": "patch"}]}
    asked = [
        {"type": "tool_search_call", "call_id": "t1", "arguments": {"query": "x"}},
        {"type": "tool_search_output", "call_id": "t1", "tools": [loaded]},
        ASKED,
    ]
    said = "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"
    body = {"tools": [PATCH, {"type": "web_search"}, TOWN], "agent_id": "a"}

    def again(answers):
        result = {"call_id": answers[0].json()["output"][0]["call_id"], "output": "ok"}
        result["type"] = item["type"] + "_output"
        return {**body, "input": [*asked, *answers[0].json()["output"], result]}

    engine, (whole, second, streamed) = call(
        ("POST", "/responses", {**body, "input": asked}, [said]),
        ("POST", "/responses", again, ["Done."]),
        ("POST", "/responses", {**body, "input": asked, "stream": True}, [said]),
    )
    assert whole.status_code == second.status_code == 200, second.text
    [made] = whole.json()["output"]
    Response.model_validate(whole.json())
    assert {field: made[field] for field in item} == item
    prompts = [engine.tokenizer.decode(request.tokens) for request in engine.requests]
    assert (
        "start: begin hunk+ end" in prompts[0] and '"name": "mcp__town__get_weather"' in prompts[0]
    )
    assert said in prompts[1]  # it goes on from what was answered
    found = events(streamed)
    for event in found:
        EVENT.validate_python(event)
    [done] = [event["item"] for event in found if event["type"] == "response.output_item.done"]
    assert {field: done[field] for field in item} == item


def test_tools_that_come_later_are_told_where_they_come(call):
    asked = [ASKED, {"type": "additional_tools", "role": "developer", "tools": [TOWN]}, ASKED]
    engine, (answer,) = call(("POST", "/responses", {"input": asked}, ["Rain."]))
    assert answer.status_code == 200, answer.text
    assert "mcp__town__get_weather" in engine.tokenizer.decode(engine.requests[0].tokens)


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
    tool = {**WEATHER, "parameters": deep, "strict": False}
    responses = {"input": "hi", "tools": [tool], "agent_id": "b"}
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
