"""Forced calls of models that write arguments as pairs: in their own form, where that can hold to
the schema, else as JSON.
"""

import pytest
from jsonschema import Draft202012Validator

from agentmem.chat.grammar import ToolChoice, constraint
from agentmem.chat.messages import Message, ToolCall
from agentmem.chat.template import ChatTemplate
from agentmem.chat.written_form import GENERIC, parts_of
from support.chat_tokenizers import QWEN3, chat_tokenizer
from support.grammars import draw, served_tokenizer, shape_of

SEEDS = range(12)
_JSON_CALL = QWEN3[
    QWEN3.index("            {{- '<tool_call>") : QWEN3.index(
        "        {%- endfor %}\n        {{- '<|im_end|>"
    )
]
_EACH = "{%- for k, v in tool_call.arguments.items() %}"


def template(call, before="", after=""):
    """QWEN3 with another way of writing calls."""
    start = "        {%- for tool_call in message.tool_calls or [] %}\n"
    blank = "            {%- if message.content or not loop.first %}{{- '\\n' }}{%- endif %}\n"
    changed = QWEN3.replace(_JSON_CALL, call)
    if before:
        wrapped = "        {%- if message.tool_calls %}{{- '" + before + "' }}{%- endif %}\n"
        changed = changed.replace(start + blank, wrapped + start)
        end = "        {%- endfor %}\n        {{- '<|im_end|>"
        ended = "{%- endfor %}{%- if message.tool_calls %}{{- '" + after + "' }}{%- endif %}\n"
        changed = changed.replace(end, ended + "        {{- '<|im_end|>")
    return changed


CODER = template(
    "{{- '<tool_call>\\n<function=' + tool_call.name + '>\\n' }}" + _EACH
    + "{{- '<parameter=' + k + '>\\n' + (v if v is string else v|tojson) + '\\n</parameter>\\n' }}"
    + "{%- endfor %}{{- '</function>\\n</tool_call>' }}\n"
)  # fmt: skip
MINIMAX = template(
    "{{- '<invoke name=\"' + tool_call.name + '\">\\n' }}" + _EACH
    + "{{- '<parameter name=\"' + k + '\">' + (v if v is string else v|tojson)"
    + " + '</parameter>\\n' }}{%- endfor %}{{- '</invoke>\\n' }}\n",
    "\\n<minimax:tool_call>\\n",
    "</minimax:tool_call>",
)  # fmt: skip
PYTHONIC = template(
    "{{- '<|tool_call_start|>[' + tool_call.name + '(' }}" + _EACH
    + "{{- k + '=' + (v|tojson) }}{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}"
    + "{{- ')]<|tool_call_end|>' }}\n"
)  # fmt: skip
MARKS = {
    CODER: ("<tool_call>", "</tool_call>", "<think>", "</think>"),
    MINIMAX: ("<minimax:tool_call>", "</minimax:tool_call>", "<think>", "</think>"),
    PYTHONIC: ("<|tool_call_start|>", "<|tool_call_end|>"),
}
MODELS = {"glm": None, "coder": CODER, "minimax": MINIMAX, "pythonic": PYTHONIC}
REQUIRED = ToolChoice("required")


def tokenizer_of(model):
    made = MODELS[model]
    if made is None:
        return served_tokenizer(model)
    return chat_tokenizer(made, "<|im_start|>", "<|im_end|>", *MARKS[made])


def tool(name, properties, required=()):
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    function = {"name": name, "description": "", "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [
    tool(
        "get",
        {
            "n": {"type": "integer", "minimum": 1, "maximum": 50},
            "kind": {"type": "string", "enum": ["x y", "12"]},
            "spans": {"type": "array", "items": {"enum": ["a", 'b"c']}, "maxItems": 2},
            "flag": {"type": ["boolean", "integer"]},
        },
        ["n"],
    ),
    tool("none", {}),
    tool("optional", {"a": {"type": "boolean"}, "b": {"$ref": "#/$defs/b"}}),
]
TOOLS[2]["function"]["parameters"] |= {"$defs": {"b": {"type": "integer"}}}
TOOLS[2]["function"]["parameters"]["properties"]["b"] = {"type": "array", "maxItems": 0}


def calls_of(tokenizer, tools, choice=REQUIRED, seeds=SEEDS):
    """What is drawn and read of it, for each seed whose answer ends."""
    found = constraint(shape_of(tokenizer), tools, choice, None, in_reasoning=False)
    for seed in seeds:
        drawn = draw(tokenizer, found.grammar, seed)
        if drawn.ended:
            parts = parts_of(drawn.text, found.markup, tools)
            yield drawn.text, [part for part in parts if isinstance(part, ToolCall)]


@pytest.mark.parametrize("model", MODELS)
def test_calls_are_written_in_the_models_own_form_and_validate(model):
    tokenizer = tokenizer_of(model)
    form = shape_of(tokenizer).calls.form
    assert form.pairs is not None and form.between is not None
    schemas = {one["function"]["name"]: one["function"]["parameters"] for one in TOOLS}
    template = ChatTemplate(tokenizer)
    names = set()
    for text, calls in calls_of(tokenizer, TOOLS):
        assert calls
        for call in calls:
            names.add(call.name)
            Draft202012Validator(schemas[call.name]).validate(call.arguments)
        said = [Message("user", "hi"), Message("assistant", "", tool_calls=tuple(calls))]
        rendered = template.rendered(said, tools=TOOLS)
        assert text[text.index(form.opening) :] in rendered
    assert names == set(schemas)


@pytest.mark.parametrize("model", ["glm", "pythonic"])
def test_texts_are_free_where_the_parser_keeps_them(model):
    tokenizer = tokenizer_of(model)
    tools = [tool("say", {"text": {"type": "string"}, "n": {"type": "integer"}}, ["text"])]
    form = shape_of(tokenizer).calls.form
    texts = set()
    for text, calls in calls_of(tokenizer, tools, seeds=range(30)):
        assert calls and form.opening in text
        for call in calls:
            texts.add(call.arguments["text"])
            assert isinstance(call.arguments["text"], str)
    assert len(texts) > 3


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "properties",
    [
        {"a": {"type": "string", "maxLength": 3}},
        {"a": {"type": "string", "pattern": "^a+$"}},
        {"a b": {"type": "integer", "minimum": 1, "maximum": 9}},
        {"a": {"anyOf": [{"type": "string", "maxLength": 2}, {"type": "null"}]}},
        {f"p{i}": {"type": "boolean"} for i in range(50)},
    ],
)
def test_what_pairs_can_not_hold_to_is_called_in_json(model, properties):
    tokenizer = tokenizer_of(model)
    tools = [tool("get", properties, list(properties)[:1])]
    schema = tools[0]["function"]["parameters"]
    num_calls = 0
    for text, calls in calls_of(tokenizer, tools, ToolChoice("required", max_calls=1)):
        assert GENERIC.opening in text
        num_calls += len(calls)
        for call in calls:
            Draft202012Validator(schema).validate(call.arguments)
    assert num_calls
