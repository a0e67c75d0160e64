"""Structured output and forced calls over HTTP, in the words of each API.

The engine draws its answers at random from the grammar that it is asked to hold to, so that what
comes back is all that the grammar promises.
"""

import asyncio
import json
from dataclasses import replace

import httpx
import openai
import pytest
from jsonschema import Draft202012Validator
from openai.types.responses import Response
from pydantic import BaseModel

from agentmem.config import Settings
from agentmem.engine.api import Finished, TextDelta
from agentmem.server.app import create_app
from support.chat_tokenizers import LLAMA3, QWEN3, chat_tokenizer
from support.fake_engine import FakeEngine
from support.grammars import draw

HELLO = [{"role": "user", "content": "hello"}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Zürich"]}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "properties": {}}


def function(name, parameters=NOTHING, **more):
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


TOOLS = [function("weather", CITY), function("none"), function("other")]
FLAT_TOOLS = [{"type": "function", **tool["function"]} for tool in TOOLS]
BLOCK_TOOLS = [
    {"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]}
    for tool in TOOLS
]
ODD = {"type": "object", "properties": {"a": {"not": {"type": "null"}}}}


class Drawing(FakeEngine):
    """Says what its grammar allows, by the seed; ends early after `most` tokens."""

    max_context, vocab_size, seed, most = 100_000, 1000, 0, 400

    async def generate(self, request):
        text, reason = "Hello", "stop"
        if request.grammar is not None:
            drawn = draw(self.tokenizer, request.grammar, self.seed, most=self.most)
            text, reason = drawn.text, "stop" if drawn.ended else "length"
        self.words = [text[i : i + 5] for i in range(0, len(text), 5)]
        async for event in super().generate(request):
            if isinstance(event, TextDelta):
                yield event
            else:
                yield replace(event, reason=reason) if isinstance(event, Finished) else event


@pytest.fixture(params=[QWEN3, LLAMA3], ids=["qwen3", "llama3"])
def engine(request):
    return Drawing(tokenizer=chat_tokenizer(request.param))


@pytest.fixture
def app(engine, tmp_path):
    return create_app(engine, Settings(home=tmp_path), None)


@pytest.fixture
def post(app):
    def post(path, status=200, **body):
        async def one():
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
                return await http.post(path, json=body)

        answer = asyncio.run(one())
        assert answer.status_code == status, answer.text
        return answer.json()

    return post


@pytest.fixture
def sdk(app):
    def sdk(work):
        async def one():
            transport = httpx.ASGITransport(app)
            http = httpx.AsyncClient(transport=transport)
            async with openai.AsyncOpenAI(
                base_url="http://localhost/v1", api_key="none", max_retries=0, http_client=http
            ) as client:
                return await work(client)

        return asyncio.run(one())

    return sdk


def chat(post, status=200, **body):
    answer = post("/v1/chat/completions", status, messages=HELLO, **body)
    return answer["choices"][0] if status == 200 else answer["error"]


def respond(post, status=200, **body):
    answer = post("/v1/responses", status, input="hello", **body)
    if status == 200:
        Response.model_validate(answer)
        return answer
    return answer["error"]


def message(post, status=200, **body):
    given = {"model": "default", "messages": HELLO, "max_tokens": 400, **body}
    answer = post("/v1/messages", status, **given)
    return answer if status == 200 else answer["error"]


def output_text(response):
    (item,) = [item for item in response["output"] if item["type"] == "message"]
    return item["content"][0]["text"]


def block_text(message):
    (block,) = [block for block in message["content"] if block["type"] == "text"]
    return block["text"]


FORMATS = {
    "response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}},
    "structured_outputs": {"json": CITY},
    "guided_json": json.dumps(CITY),
}


@pytest.mark.parametrize("field", FORMATS)
@pytest.mark.parametrize("strict", [True, False, None])
def test_chat_content_validates_strict_or_not(post, field, strict):
    given = FORMATS[field]
    if field == "response_format":
        given = {**given, "json_schema": {**given["json_schema"], "strict": strict}}
    choice = chat(post, **{field: given})
    assert choice["finish_reason"] == "stop"
    Draft202012Validator(CITY).validate(json.loads(choice["message"]["content"]))


def test_responses_text_format_validates_and_is_told_again(post):
    form = {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}
    answer = respond(post, text={"format": form, "verbosity": "low"})
    Draft202012Validator(CITY).validate(json.loads(output_text(answer)))
    assert answer["text"]["format"] == form
    assert respond(post, text={"format": {"type": "text"}})["text"]["format"] == {"type": "text"}


@pytest.mark.parametrize("field", ["output_config", "output_format"])
def test_messages_output_format_validates(post, field):
    form = {"type": "json_schema", "schema": CITY}
    given = {"format": form} if field == "output_config" else form
    answer = message(post, **{field: given})
    assert answer["stop_reason"] == "end_turn"
    Draft202012Validator(CITY).validate(json.loads(block_text(answer)))


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"schema": CITY}}},
        {"structured_outputs": {"json": CITY, "disable_any_whitespace": True}},
        {"guided_json": CITY},
    ],
)
def test_completions_are_nothing_but_what_was_asked_for(post, body):
    answer = post("/v1/completions", prompt="hello", max_tokens=400, **body)
    Draft202012Validator(CITY).validate(json.loads(answer["choices"][0]["text"]))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"structured_outputs": {"choice": ["yes", "no way"]}}, {"yes", "no way"}),
        ({"structured_outputs": {"regex": "(yes|no)!"}}, {"yes!", "no!"}),
        ({"structured_outputs": {"grammar": 'root ::= "a" | "b"'}}, {"a", "b"}),
        ({"structured_outputs": {"grammar": 'start: "a" | "b"'}}, {"a", "b"}),
        ({"guided_choice": ["x"], "guided_decoding_backend": "outlines"}, {"x"}),
        ({"guided_regex": "[ab]"}, {"a", "b"}),
        ({"guided_grammar": 'root ::= "z"'}, {"z"}),
    ],
)
def test_vllms_ways_to_say_what_a_text_is(post, body, expected):
    assert chat(post, **body)["message"]["content"].strip("\n") in expected
    answer = post("/v1/completions", prompt="hello", max_tokens=100, **body)
    assert answer["choices"][0]["text"] in expected


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json_object": True}},
    ],
)
def test_json_mode_is_any_object(post, engine, body):
    for engine.seed in range(20):
        choice = chat(post, **body)
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["message"]["content"]), dict)
            break
    else:
        raise AssertionError("none ended")
    chat(post, response_format={"type": "text"}, structured_outputs={"json": None})
    assert engine.requests[-1].grammar is None


@pytest.mark.parametrize("mode", ["required", "any"])
def test_a_required_call_is_made_whatever_the_model(post, mode):
    choice = chat(post, tools=TOOLS, tool_choice=mode)
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    names = {call["function"]["name"] for call in choice["message"]["tool_calls"]}
    assert names <= {"weather", "none", "other"}
    answer = respond(post, tools=FLAT_TOOLS, tool_choice="required")
    assert [item["type"] for item in answer["output"]][-1] == "function_call"
    answer = message(post, tools=BLOCK_TOOLS, tool_choice={"type": "any"})
    assert answer["stop_reason"] == "tool_use"


def test_a_named_function_is_called_once(post, engine):
    named = {"type": "function", "function": {"name": "weather"}}
    for engine.seed in range(3):
        choice = chat(post, tools=TOOLS, tool_choice=named)
        assert choice["finish_reason"] == "tool_calls"
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "weather"
        Draft202012Validator(CITY).validate(json.loads(call["function"]["arguments"]))
        flat = {"type": "function", "name": "weather"}
        answer = respond(post, tools=FLAT_TOOLS, tool_choice=flat)
        (item,) = [item for item in answer["output"] if item["type"] == "function_call"]
        assert item["name"] == "weather" and answer["tool_choice"] == flat
        answer = message(post, tools=BLOCK_TOOLS, tool_choice={"type": "tool", "name": "weather"})
        (block,) = [block for block in answer["content"] if block["type"] == "tool_use"]
        Draft202012Validator(CITY).validate(block["input"])


def test_allowed_tools_are_the_only_ones(post, engine):
    entry = {"type": "function", "function": {"name": "none"}}
    allowed = {"mode": "required", "tools": [entry, {"type": "web_search"}]}
    for engine.seed in range(3):
        choice = chat(
            post, tools=TOOLS, tool_choice={"type": "allowed_tools", "allowed_tools": allowed}
        )
        assert {c["function"]["name"] for c in choice["message"]["tool_calls"]} == {"none"}
        flat = {"type": "allowed_tools", "mode": "required", "tools": [{"name": "none"}]}
        answer = respond(post, tools=FLAT_TOOLS, tool_choice=flat)
        called = [item["name"] for item in answer["output"] if item["type"] == "function_call"]
        assert set(called) == {"none"}


@pytest.mark.parametrize("engine", [QWEN3], indirect=True)
def test_one_call_where_parallel_ones_are_not_wanted(post, engine):
    for engine.seed in range(6):
        choice = chat(post, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
        assert len(choice["message"]["tool_calls"]) == 1
        one = {"type": "any", "disable_parallel_tool_use": True}
        answer = message(post, tools=BLOCK_TOOLS, tool_choice=one)
        assert sum(block["type"] == "tool_use" for block in answer["content"]) == 1


@pytest.mark.parametrize("engine", [QWEN3], indirect=True)
def test_strict_tools_are_held_to_their_schema_without_being_forced(post, engine):
    chat(post, tools=TOOLS)
    assert engine.requests[-1].grammar is None
    chat(post, tools=[function("weather", CITY, strict=True)])
    assert engine.requests[-1].grammar is not None
    respond(post, tools=[{**FLAT_TOOLS[0], "strict": True}])
    assert engine.requests[-1].grammar is not None
    message(post, tools=[{**BLOCK_TOOLS[0], "strict": True}])
    assert engine.requests[-1].grammar is not None
    refused = chat(post, 400, tools=[function("f", ODD, strict=True)])
    assert "#/properties/a/not" in refused["message"] and refused["param"] == "tools"
    chat(post, tools=[function("f", ODD)], tool_choice="required")


def test_an_answer_that_is_cut_says_so_and_hands_over_no_call(post, engine):
    engine.most = 12
    choice = chat(post, tools=TOOLS, tool_choice="required")
    assert choice["finish_reason"] == "length" and not choice["message"].get("tool_calls")
    answer = respond(post, tools=FLAT_TOOLS, tool_choice="required")
    assert answer["status"] == "incomplete"
    assert all(item["type"] != "function_call" for item in answer["output"])
    answer = message(post, tools=BLOCK_TOOLS, tool_choice={"type": "any"})
    assert answer["stop_reason"] in ("max_tokens", "model_context_window_exceeded")
    assert all(block["type"] != "tool_use" for block in answer["content"])


SCHEMA_PARAM = "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": ODD}}},
         SCHEMA_PARAM),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": [1]}}},
         SCHEMA_PARAM),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": "json"}, "response_format"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": ["json"]}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_choice": ["a"], "structured_outputs": {"regex": "a"}}, "guided_choice"),
    ],
)  # fmt: skip
def test_what_can_not_be_held_to_is_refused_by_its_field(post, body, param):
    for path, more in (("chat/completions", {"messages": HELLO}), ("completions", {"prompt": "x"})):
        error = post(f"/v1/{path}", 400, **more, **body)["error"]
        assert error["param"] == param and param in error["message"]
        if body.get("response_format") is not None and param == SCHEMA_PARAM:
            assert "#" in error["message"] or "JSON schema" in error["message"]


def test_what_can_not_be_held_to_is_refused_by_responses_and_messages_too(post):
    form = {"type": "json_schema", "name": "x", "schema": ODD}
    error = respond(post, 400, text={"format": form})
    assert error["param"] == "text.format.schema" and "#/properties/a/not" in error["message"]
    error = respond(post, 400, text={"format": {"type": "xml"}})
    assert error["param"] == "text.format"
    error = message(post, 400, output_config={"format": form})
    assert "output_config.format.schema: #/properties/a/not" in error["message"]
    for given in ({"type": "json_schema"}, {"type": "text"}, "json", {}):
        error = message(post, 400, output_config={"format": given})
        assert error["message"].startswith("output_config.format")


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        ({"type": "function", "function": {"name": "gone"}}, "tool_choice"),
        ({"type": "function"}, "tool_choice"),
        ({"type": "function", "function": {"name": 7}}, "tool_choice"),
        ({"type": "file_search"}, "tool_choice"),
        ("weather", "tool_choice"),
        (7, "tool_choice"),
        ([], "tool_choice"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "all", "tools": TOOLS}},
         "tool_choice.allowed_tools.mode"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
         "tool_choice.allowed_tools.tools"),
        ({"type": "allowed_tools", "allowed_tools": 7}, "tool_choice.allowed_tools.mode"),
    ],
)  # fmt: skip
def test_choices_that_make_no_sense_are_refused(post, engine, choice, param):
    assert chat(post, 400, tools=TOOLS, tool_choice=choice)["param"] == param
    assert engine.requests == []


def test_a_call_can_not_be_forced_where_there_are_no_tools(post):
    for tools in (None, [], [{"type": "web_search"}]):
        assert chat(post, 400, tools=tools, tool_choice="required")["param"] == "tool_choice"
        assert respond(post, 400, tools=tools, tool_choice="required")["param"] == "tool_choice"
        error = message(post, 400, tool_choice={"type": "any"})
        assert error["message"].startswith("tool_choice")
    error = message(post, 400, tools=BLOCK_TOOLS, tool_choice={"type": "tool"})
    assert error["message"].startswith("tool_choice")
    chat(post, tools=[], tool_choice="none")


class Day(BaseModel):
    name: str
    hours: list[int] = []
    mood: str | None = None


class Plan(BaseModel):
    days: list[Day]
    best: Day


def test_openais_parse_gives_models(sdk, engine):
    async def parse(client):
        return await client.chat.completions.parse(
            model="default", messages=HELLO, response_format=Plan
        )

    for engine.seed in range(20):
        try:
            parsed = sdk(parse).choices[0].message.parsed
            break
        except openai.LengthFinishReasonError:
            continue
    assert isinstance(parsed, Plan)

    async def parse_response(client):
        return await client.responses.parse(model="default", input="hello", text_format=Plan)

    assert isinstance(sdk(parse_response).output_parsed, Plan)


def test_openais_parse_gives_arguments_of_strict_tools(sdk, engine):
    async def parse(client):
        tool = openai.pydantic_function_tool(Day, name="day")
        return await client.chat.completions.parse(
            model="default", messages=HELLO, tools=[tool], tool_choice="required"
        )

    for engine.seed in range(20):
        try:
            (call, *_) = sdk(parse).choices[0].message.tool_calls
            break
        except openai.LengthFinishReasonError:
            continue
    assert isinstance(call.function.parsed_arguments, Day)


def test_a_stream_tells_the_same(sdk):
    async def stream(client):
        async with client.chat.completions.stream(
            model="default", messages=HELLO, tools=TOOLS[:1], tool_choice="required"
        ) as events:
            async for _ in events:
                pass
            return await events.get_final_completion()

    choice = sdk(stream).choices[0]
    assert choice.finish_reason == "tool_calls"
    Draft202012Validator(CITY).validate(json.loads(choice.message.tool_calls[0].function.arguments))


def test_an_answer_that_goes_on_makes_a_whole_with_what_was_begun(post, engine):
    begun = '{"city": "Z'
    asked = [*HELLO, {"role": "assistant", "content": begun}]
    form = {"type": "json_schema", "schema": CITY}
    for engine.seed in range(3):
        answer = message(post, messages=asked, output_config={"format": form})
        whole = begun + block_text(answer)
        assert json.loads(whole)["city"] == "Zürich"
    asked[-1]["content"] = "Here it is: "
    answer = message(post, messages=asked, output_config={"format": form})
    Draft202012Validator(CITY).validate(json.loads(block_text(answer)))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat", {"messages": HELLO}),
        ("generate", {"prompt": "hello"}),
        ("generate", {"prompt": "hello", "raw": True}),
        ("generate", {"prompt": "hello", "context": [1, 2, 3]}),
    ],
)
def test_ollamas_format_is_held_to(post, engine, path, body):
    num_whole = 0
    for engine.seed in range(4):
        given = {"stream": False, "format": CITY, **body}
        answer = post(f"/api/{path}", model="default", **given)
        if answer["done_reason"] == "stop":
            num_whole += 1
            said = answer["message"]["content"] if path == "chat" else answer["response"]
            Draft202012Validator(CITY).validate(json.loads(said))
        post(f"/api/{path}", model="default", **{**given, "format": "json"})
        assert engine.requests[-1].grammar is not None
        post(f"/api/{path}", model="default", **{**given, "format": ""})
        assert engine.requests[-1].grammar is None
    assert num_whole
    error = post(f"/api/{path}", 400, model="default", **{**given, "format": ODD})["error"]
    assert error.startswith("format: #/properties/a/not")
    assert post(f"/api/{path}", 400, model="default", **{**given, "format": "xml"})["error"]
