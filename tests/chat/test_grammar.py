"""Grammars of answers: what is drawn from them is what was asked for, whatever the family."""

import json
from dataclasses import replace

import pytest
from jsonschema import Draft202012Validator

from agentmem.chat.answer_parser import AnswerParser, Content
from agentmem.chat.grammar import (
    AUTO,
    ToolChoice,
    any_json_content,
    choice_content,
    constraint,
    json_content,
    lark_content,
    regex_content,
    text_grammar,
)
from agentmem.chat.messages import Message, ToolCall
from agentmem.chat.template import ChatTemplate
from agentmem.chat.written_form import GENERIC
from agentmem.errors import InvalidRequest
from support.chat.families import FAMILIES
from support.chat_tokenizers import HARMONY, LLAMA3, QWEN3, QWEN3_THINKING, chat_tokenizer
from support.grammars import accepts, draw, matcher_tokenizer, served_tokenizer, shape_of

SEEDS = range(6)
REQUIRED = ToolChoice("required")


def tool(name, parameters):
    return {
        "type": "function",
        "function": {"name": name, "description": "", "parameters": parameters},
    }


TOOLS = [
    tool(
        "get",
        {
            "type": "object",
            "properties": {
                "n": {"type": "integer", "minimum": 1, "maximum": 50},
                "who": {"type": "string", "maxLength": 9},
                "list": {"type": "array", "items": {"enum": ["a", 'b"c']}, "maxItems": 2},
            },
            "required": ["n"],
        },
    ),
    tool("get_weather", {"properties": {"city": {"enum": ["Paris", "Zürich"]}}}),
    tool("none", {"type": "object", "properties": {}}),
]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "string", "maxLength": 5}},
    "required": ["a"],
}


def held(tokenizer, tools=(), choice=AUTO, content=None, *, in_reasoning=False):
    return constraint(shape_of(tokenizer), list(tools), choice, content, in_reasoning=in_reasoning)


def parts_of(tokenizer, found, drawn, tools=TOOLS, *, in_reasoning=False):
    parser = AnswerParser(found.markup, tools, in_reasoning=in_reasoning)
    return [*parser.feed(drawn.text), *parser.finish(cut=not drawn.ended)]


def content_of(parts):
    assert not any(isinstance(part, ToolCall) for part in parts)
    return "".join(part.text for part in parts if isinstance(part, Content))


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_are_those_of_llguidance(family):
    tokenizer = served_tokenizer(family)
    theirs = matcher_tokenizer(tokenizer)
    added = tokenizer.get_added_vocab()
    special = {text for text, token in added.items() if theirs.is_special_token(token)}
    assert set(shape_of(tokenizer).specials) == special


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("in_reasoning", [False, True])
def test_a_forced_call_is_read_and_its_arguments_validate(family, in_reasoning):
    tokenizer = served_tokenizer(family)
    if in_reasoning and not tokenizer.has_thinking:
        pytest.skip("it does not think")
    found = held(tokenizer, TOOLS, REQUIRED, in_reasoning=in_reasoning)
    schemas = {one["function"]["name"]: one["function"]["parameters"] for one in TOOLS}
    num_calls = 0
    for seed in SEEDS:
        drawn = draw(tokenizer, found.grammar, seed)
        parts = parts_of(tokenizer, found, drawn, in_reasoning=in_reasoning)
        calls = [part for part in parts if isinstance(part, ToolCall)]
        num_calls += len(calls)
        for call in calls:
            Draft202012Validator(schemas[call.name]).validate(call.arguments)
        if drawn.ended:
            assert calls
            assert not content_of([part for part in parts if not isinstance(part, ToolCall)])
    assert num_calls >= 3


@pytest.mark.parametrize(
    "family", sorted(set(FAMILIES) - {"gemma3", "glm", "smollm2", "mistral-v1"})
)
def test_a_forced_call_renders_to_what_the_model_wrote(family):
    """So that the cached tokens of the answer are those of the history that comes back."""
    tokenizer = served_tokenizer(family)
    form = shape_of(tokenizer).calls.form
    assert form != GENERIC
    template = ChatTemplate(tokenizer)
    found = held(tokenizer, TOOLS[:2], ToolChoice("required", max_calls=1))
    for seed in SEEDS:
        drawn = draw(tokenizer, found.grammar, seed)
        parts = parts_of(tokenizer, found, drawn)
        calls = tuple(part for part in parts if isinstance(part, ToolCall))
        assert calls or not drawn.ended
        said = [Message("user", "hello"), Message("assistant", "", tool_calls=calls)]
        rendered = template.rendered(said, tools=TOOLS) if calls else None
        if rendered is not None:
            written = drawn.text[drawn.text.rindex(form.opening) :]
            if form.id_before and form.id_before not in written:
                written = written.removesuffix(form.closing)  # the server chose the id
            assert written in rendered


def test_a_named_function_is_the_only_one_and_is_called_once():
    for family in ("qwen3", "mistral", "gemma3", "deepseek"):
        tokenizer = served_tokenizer(family)
        choice = ToolChoice("required", ("get_weather",), max_calls=1)
        found = held(tokenizer, TOOLS, choice)
        for seed in SEEDS:
            parts = parts_of(tokenizer, found, draw(tokenizer, found.grammar, seed))
            calls = [part.name for part in parts if isinstance(part, ToolCall)]
            assert calls in (["get_weather"], [])


def test_several_calls_where_they_are_wanted():
    counts = set()
    for family in ("qwen3", "mistral", "gemma3", "deepseek"):
        tokenizer = served_tokenizer(family)
        for choice in (REQUIRED, ToolChoice("required", max_calls=1)):
            found = held(tokenizer, TOOLS, choice)
            for seed in SEEDS:
                drawn = draw(tokenizer, found.grammar, seed, ends=0.3)
                parts = parts_of(tokenizer, found, drawn)
                num_calls = sum(isinstance(part, ToolCall) for part in parts)
                counts.add((choice.max_calls, min(num_calls, 2)))
    assert (0, 2) in counts and (1, 1) in counts and (1, 2) not in counts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("in_reasoning", [False, True])
def test_content_is_pure_json_that_validates(family, in_reasoning):
    tokenizer = served_tokenizer(family)
    if in_reasoning and not tokenizer.has_thinking:
        pytest.skip("it does not think")
    content = json_content(SCHEMA, "response_format")
    found = held(tokenizer, content=content, in_reasoning=in_reasoning)
    num_ended = 0
    for seed in SEEDS:
        drawn = draw(tokenizer, found.grammar, seed)
        if not drawn.ended:
            continue
        num_ended += 1
        said = content_of(parts_of(tokenizer, found, drawn, [], in_reasoning=in_reasoning))
        Draft202012Validator(SCHEMA).validate(json.loads(said))
        assert said.strip("\n")[0] == "{" and said[-1] == "}"
    assert num_ended >= 3


@pytest.mark.parametrize("family", FAMILIES)
def test_with_tools_an_answer_is_what_was_asked_for_or_calls(family):
    tokenizer = served_tokenizer(family)
    found = held(tokenizer, TOOLS, AUTO, choice_content(["yes", "no way"], "choice"))
    seen = set()
    for seed in range(12):
        drawn = draw(tokenizer, found.grammar, seed)
        parts = parts_of(tokenizer, found, drawn)
        calls = [part for part in parts if isinstance(part, ToolCall)]
        if drawn.ended and not calls and family != "glm":
            assert content_of(parts).strip("\n") in ("yes", "no way")
        seen.add(bool(calls))
    assert False in seen


@pytest.mark.parametrize(
    ("content", "good", "bad"),
    [
        (regex_content(r"[a-c]{2}/\d+", "regex"), "ab/12", "ab/12x"),
        (choice_content(["yes", 'n"o\n'], "choice"), 'n"o\n', "maybe"),
        (lark_content('start: "a"+ NUM\nNUM: /[0-9]+/\n', "grammar"), "aa7", "7"),
        (lark_content('root ::= "x" [0-9]+ "y"', "grammar"), "x12y", "xy"),
        (any_json_content("response_format"), '{"a": [1, {"b": null}]}', "[1]"),
        (json_content({"type": "array", "items": {"type": "null"}}, "json"), "[null]", "[1]"),
    ],
)
def test_contents_of_each_kind(content, good, bad):
    tokenizer = served_tokenizer("qwen3")
    whole = held(tokenizer, content=content).grammar
    for grammar in (whole, text_grammar(content)):
        assert accepts(tokenizer, grammar, good)
        assert not accepts(tokenizer, grammar, bad)
    assert accepts(tokenizer, whole, f"<think>\nhm <b>\n</think>\n\n{good}")
    assert not accepts(tokenizer, text_grammar(content), f"<think>\n</think>\n\n{good}")


def test_reasoning_that_the_prompt_opened_must_end_first():
    tokenizer = chat_tokenizer(QWEN3_THINKING)
    content = json_content(SCHEMA, "response_format")
    grammar = held(tokenizer, content=content, in_reasoning=True).grammar
    assert accepts(tokenizer, grammar, 'hm\n</think>\n\n{"a": 1}')
    assert not accepts(tokenizer, grammar, '{"a": 1}')


def test_reasoning_that_the_prompt_closed_is_not_opened_again():
    for tokenizer, tail in ((chat_tokenizer(QWEN3), "\n\n"), (served_tokenizer("glm"), "")):
        found = constraint(
            shape_of(tokenizer),
            [],
            AUTO,
            choice_content(["yes"], "choice"),
            in_reasoning=False,
            prompt_end=f"<think></think>{tail}",
        )
        assert accepts(tokenizer, found.grammar, "yes")
        assert accepts(tokenizer, found.grammar, "\nyes") == (tail == "")
        assert not accepts(tokenizer, found.grammar, "<think>hm</think>yes")


def test_reasoning_whose_marks_are_no_tokens_ends_with_their_text():
    plain = chat_tokenizer(QWEN3)
    shape = shape_of(plain)
    bare = replace(shape, specials={})
    content = choice_content(["yes"], "choice")
    grammar = constraint(bare, [], AUTO, content, in_reasoning=True).grammar
    tokenizer = served_tokenizer("smollm2")  # which spells <think> by its letters
    assert accepts(tokenizer, grammar, "hm <b> </thin\n</think>\n\nyes")
    assert not accepts(tokenizer, grammar, "hm</think>\n\nno")
    assert not accepts(tokenizer, grammar, "yes")


def test_a_content_may_begin_with_the_blank_that_the_template_puts_there():
    for family, blank in (("mistral", True), ("llama3", False), ("smollm2", False)):
        tokenizer = served_tokenizer(family)
        grammar = held(tokenizer, content=json_content(SCHEMA, "p")).grammar
        assert accepts(tokenizer, grammar, '{"a": 1}')
        assert accepts(tokenizer, grammar, ' {"a": 1}') == blank
        detokenizer = tokenizer.detokenizer
        for token in tokenizer.encode('<s> {"a": 1}', add_special_tokens=False)[1:]:
            detokenizer.add_token(token)
        detokenizer.finalize()
        assert not blank or detokenizer.text == '{"a": 1}'


def test_harmony_thinks_in_analysis_and_answers_in_final():
    tokenizer = served_tokenizer("gpt-oss")
    grammar = held(tokenizer, content=json_content(SCHEMA, "p")).grammar
    final = '<|channel|>final<|message|>{"a": 1}'
    thought = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    assert accepts(tokenizer, grammar, final)
    assert accepts(tokenizer, grammar, thought + final)
    assert not accepts(tokenizer, grammar, '{"a": 1}')
    forced = held(tokenizer, TOOLS, REQUIRED).grammar
    call = ' to=functions.get<|channel|>commentary json<|message|>{"n": 1}'
    assert accepts(tokenizer, forced, thought + call)
    assert not accepts(tokenizer, forced, final)
    assert shape_of(chat_tokenizer(HARMONY)).calls.form.between is None


def test_strict_tools_are_held_to_their_schema_wherever_they_are_called():
    free = chat_tokenizer(QWEN3)
    assert held(free, TOOLS).grammar is None
    grammar = held(free, TOOLS, ToolChoice(strict=frozenset(["get"]))).grammar
    call = '<tool_call>\n{{"name": "get", "arguments": {}}}\n</tool_call>'
    assert accepts(free, grammar, "I look.\n" + call.format('{"n": 1}'))
    assert accepts(free, grammar, "No {call}.")
    assert not accepts(free, grammar, "I look.\n" + call.format('{"m": 1}'))
    llama = chat_tokenizer(LLAMA3)
    grammar = held(llama, TOOLS, ToolChoice(strict=frozenset(["get"]))).grammar
    assert accepts(llama, grammar, '{"name": "get", "parameters": {"n": 1}}')
    assert accepts(llama, grammar, "It is {n}.")
    assert not accepts(llama, grammar, '{"name": "get", "parameters": {"m": 1}}')


def test_allowed_tools_are_the_only_ones():
    tokenizer = chat_tokenizer(QWEN3)
    grammar = held(tokenizer, TOOLS, ToolChoice("auto", ("get",))).grammar
    call = '<tool_call>\n{{"name": "{}", "arguments": {{{}}}}}\n</tool_call>'
    assert accepts(tokenizer, grammar, call.format("get", '"n": 1'))
    assert not accepts(tokenizer, grammar, call.format("none", ""))


def test_what_a_tools_schema_has_that_is_not_supported_is_let_go_unless_it_is_strict():
    tokenizer = served_tokenizer("qwen3")
    odd = {"type": "object", "properties": {"a": {"not": {"type": "null"}, "type": "string"}}}
    for schema in (odd, {"type": "object", "properties": {"a": {"pattern": "("}}}):
        tools = [tool("f", schema)]
        assert draw(tokenizer, held(tokenizer, tools, REQUIRED).grammar, 1).tokens
        strict = ToolChoice("required", strict=frozenset(["f"]))
        with pytest.raises(InvalidRequest) as e:
            held(tokenizer, tools, strict)
        assert e.value.param == "tools" and "#" in e.value.message


@pytest.mark.parametrize(
    ("choice", "tools"),
    [(REQUIRED, []), (ToolChoice("required", ("gone",)), TOOLS), (ToolChoice("auto", ("x",)), [])],
)
def test_a_choice_that_is_not_there_is_refused(choice, tools):
    with pytest.raises(InvalidRequest) as e:
        held(served_tokenizer("qwen3"), tools, choice)
    assert e.value.param == "tool_choice"


@pytest.mark.parametrize("name", ["a b", 'say "hi"', "ü🦊", "get.it/now", "a\\b"])
def test_names_of_any_kind_are_called(name):
    for family in ("qwen3", "llama3", "gemma3", "mistral"):
        tokenizer = served_tokenizer(family)
        tools = [tool(name, {"type": "object", "properties": {}})]
        found = held(tokenizer, tools, ToolChoice("required", max_calls=1))
        for seed in SEEDS:
            drawn = draw(tokenizer, found.grammar, seed)
            parts = parts_of(tokenizer, found, drawn, tools)
            calls = [(p.name, p.arguments) for p in parts if isinstance(p, ToolCall)]
            assert calls == [(name, {})] or not drawn.ended


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (regex_content, "("),
        (regex_content, "(?=a)b"),
        (regex_content, ""),
        (regex_content, 7),
        (choice_content, []),
        (choice_content, "yes"),
        (choice_content, ["yes", ""]),
        (choice_content, ["x"] * 2000),
        (lark_content, "start: nothing"),
        (lark_content, "root ::= ("),
        (lark_content, "x" * 100_000),
        (json_content, [1]),
        (json_content, {"type": "string", "pattern": "("}),
    ],
)
def test_what_can_not_be_read_is_refused_with_its_field(make, value):
    with pytest.raises(InvalidRequest) as e:
        make(value, "structured_outputs.x")
    assert e.value.param == "structured_outputs.x" and "\n" not in e.value.message
