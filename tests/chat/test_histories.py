"""Any history in any family's template: it renders, and what everybody said is in the prompt."""

import asyncio
import json

import pytest

from agentmem.chat.messages import Chat
from agentmem.chat.normalise import function_tools, normalise
from agentmem.chat.renderer import ChatRenderer
from agentmem.errors import InvalidRequest
from agentmem.server.api.chat_messages import to_messages
from support.chat.families import FAMILIES, tokenizer_of
from support.chat_tokenizers import (
    CHATML,
    GEMMA2,
    GEMMA3,
    GEMMA4,
    HARMONY,
    LLAMA3,
    PARTS,
    QWEN3,
    chat_tokenizer,
)
from support.odd_histories import ASK, FORMS, GO_ON, SHAPES, SYSTEM, TOOL, YES, call, calling, image

SMALL = {
    "chatml": CHATML,
    "gemma2": GEMMA2,
    "gemma3-small": GEMMA3,
    "gemma4": GEMMA4,
    "gpt-oss-small": HARMONY,
    "llama3-small": LLAMA3,
    "parts": PARTS,
    "qwen3-small": QWEN3,
}
TEMPLATES = [*FAMILIES, *SMALL]


def tokenizer(family):
    return chat_tokenizer(SMALL[family]) if family in SMALL else tokenizer_of(family)


@pytest.fixture(scope="module", params=TEMPLATES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def renderer(family):
    return ChatRenderer(tokenizer(family), 1 << 20)


def prompt_of(renderer, history, tools=(TOOL,), **options):
    chat = Chat(to_messages(history), tools=function_tools(tools), options=options)
    tokens = asyncio.run(renderer.prompt(chat)).tokens
    return renderer._tokenizer.decode(tokens)


def is_in(text, prompt):
    """Whether a text stands in a prompt, as it is or as JSON has it."""
    said = text.strip()
    escaped = [json.dumps(said, ensure_ascii=ascii)[1:-1] for ascii in (True, False)]
    return any(one in prompt for one in (said, *escaped))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tools", [[TOOL], []], ids=["tools", "no tools"])
def test_every_history_renders_and_what_everybody_said_is_in_it(renderer, shape, tools):
    history = SHAPES[shape]
    prompt = prompt_of(renderer, history, tools)
    for message in normalise(to_messages(history)):
        content = message.content
        if message.role == "tool" and content.startswith("{"):
            assert "grey" in prompt  # an object may be laid out anew
        else:
            assert is_in(content, prompt), message
        for called in message.tool_calls:
            assert called.name in prompt
            for value in called.arguments.values():
                assert is_in(value, prompt) if isinstance(value, str) else str(value)[:1] in prompt
        if message.role == "user" and message.name:
            assert message.name in prompt
    if tools:
        assert TOOL["function"]["description"] in prompt


TURNS = [SYSTEM, ASK, calling(call()), {"role": "tool", "tool_call_id": "c1", "content": "rain"}]


@pytest.mark.parametrize("length", [2, 4, 6])
def test_a_history_that_goes_on_begins_as_before(family, renderer, length):
    """What was computed of one request is of use to the next one."""
    # Mistral's template has the system's text, as it has the tools, with what the user says last
    begins = [] if family == "mistral" else [SYSTEM]
    length -= family == "mistral"
    said = [
        *begins,
        *TURNS[1:],
        YES,
        GO_ON,
        {**YES, "content": "That then."},
        {**ASK, "content": "Why?"},
    ]
    # where a template knows tools, it is its own affair where it puts them
    tools = [TOOL] if renderer._template._describes_tools else []
    shorter = prompt_of(renderer, said[:length], tools)
    longer = prompt_of(renderer, said[: length + 2], tools)
    common = next(
        (i for i, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), len(shorter)
    )
    asked = renderer._template.asks_for_answer({})
    assert common >= len(shorter) - len(asked) - 1


def test_speakers_are_told_apart_where_the_template_does_not(renderer):
    history = [{**ASK, "name": "ann"}, {**YES, "name": "clerk"}, {**GO_ON, "name": "bob"}]
    prompt = prompt_of(renderer, history, ())
    assert prompt.index("ann") < prompt.index("weather") < prompt.index("bob")


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (5, "messages.1.content"),
        (None, "messages.1.content"),
        ([{"type": "text", "text": 5}], "messages.1.content"),
        ([7], "messages.1.content"),
        ([image()], "messages.1.content"),
        ([{"type": "text", "text": "x"}, {"type": "input_audio"}], "messages.1.content"),
    ],
)
def test_the_newest_message_may_be_refused_for_what_it_is(content, param):
    with pytest.raises(InvalidRequest) as e:
        to_messages([ASK, {"role": "user", "content": content}])
    assert e.value.param == param
    to_messages([{"role": "user", "content": content}, YES, GO_ON])


def test_a_role_that_nobody_knows_is_refused_where_it_is_new():
    with pytest.raises(InvalidRequest) as e:
        to_messages([ASK, {"role": "king", "content": "x"}])
    assert e.value.param == "messages.1.role"
    assert to_messages([{"role": "king", "content": "x"}, ASK])[0]["role"] == "user"


def test_messages_are_kept_with_what_a_prompt_is_made_of_alone():
    (_, kept, _) = to_messages(FORMS["fields of others"])
    assert kept == {"role": "assistant", "content": YES["content"]}


def schema(properties=None, **parameters):
    given = {"properties": properties, "type": "object"} if properties is not None else {}
    function = {"name": "f", "description": "d", "parameters": given | parameters}
    return {"type": "function", "function": function}


SCHEMAS = {
    "no type": schema({"a": {"description": "any"}}),
    "types": schema({"a": {"type": ["string", "null"]}}),
    "anyOf": schema({"a": {"anyOf": [{"type": "string"}, {"type": "null"}]}}),
    "named items": schema({"items": {"type": "string"}}),
    "named type": schema({"type": {"type": "string"}, "keys": {"type": "string"}}),
    "no properties": schema(type="object"),
    "properties null": schema(type="object", properties=None),
    "empty": schema(),
    "nested null": schema({"a": {"type": "object", "properties": None}}),
    "true": schema({"a": True}),
    "properties a list": schema([]),
    "enum of numbers": schema({"a": {"type": "integer", "enum": [1, 2]}}),
    "array": schema({"a": {"type": "array"}}),
    "ref": schema({"a": {"$ref": "#/$defs/x"}}, **{"$defs": {"x": {"type": "string"}}}),
    "no description": {"type": "function", "function": {"name": "f"}},
    "parameters null": {"type": "function", "function": {"name": "f", "parameters": None}},
    "no type of tool": {"function": {"name": "f", "parameters": {}}},
    "unicode name": {"type": "function", "function": {"name": "mcp__büro.ablage/öffnen"}},
    "half an emoji": {"type": "function", "function": {"name": "f", "description": "\ud83d"}},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_of_a_tool_is_told(renderer, name):
    tool = SCHEMAS[name]
    prompt = prompt_of(renderer, [ASK], [tool, {"type": "web_search"}])
    assert tool["function"]["name"] in prompt


def test_a_model_whose_template_knows_no_tools_calls_them_in_words():
    renderer = ChatRenderer(chat_tokenizer(GEMMA3), 1 << 20)
    prompt = prompt_of(renderer, SHAPES["call and result"])
    assert prompt.startswith("<start_of_turn>user\n# Tools\n")
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n' in prompt
    assert "<tool_response>\nrain over Bergen\n</tool_response><end_of_turn>" in prompt
    assert renderer.markup.tool_calls('{"name": "get_weather", "arguments": {}}', [TOOL])


def test_results_stand_beside_the_calls_where_a_template_reads_them_there():
    prompt = prompt_of(ChatRenderer(chat_tokenizer(GEMMA4), 1 << 20), SHAPES["call and result"])
    assert 'response:get_weather{"rain over Bergen"}' in prompt
    assert "<|im_start|>tool\n" not in prompt
