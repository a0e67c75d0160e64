"""Reasoning, content and tool calls of an answer's text, however it is cut into deltas."""

import importlib
import pkgutil
import time

import mlx_lm.tool_parsers
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper

from agentmem.chat.answer_parser import AnswerParser, Content, Reasoning
from agentmem.chat.markup import Markup
from agentmem.chat.messages import ToolCall
from support.chat_tokenizers import CHATML, HARMONY, LLAMA3, QWEN3, chat_tokenizer

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {}}}
    for name in ("f", "get_weather")
]
F = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
PARSERS = [module.name for module in pkgutil.iter_modules(mlx_lm.tool_parsers.__path__)]


def markup_of(template):
    return Markup.of(chat_tokenizer(template))


def markup_with(parser):
    """Return that of a model without reasoning whose calls this parser of mlx-lm's reads."""
    module = importlib.import_module(f"mlx_lm.tool_parsers.{parser}")
    plain = chat_tokenizer(CHATML)._tokenizer
    marks = {"tool_call_start": module.tool_call_start, "tool_call_end": module.tool_call_end}
    return module, Markup.of(TokenizerWrapper(plain, tool_parser=module.parse_tool_call, **marks))


def parse(text, markup=None, size=1, tools=TOOLS, cut=False, **options):
    """The parts, as pairs; what follows one another of a kind is one."""
    parser = AnswerParser(markup or markup_of(QWEN3), tools, **options)
    parts = [part for i in range(0, len(text), size) for part in parser.feed(text[i : i + size])]
    found = []
    for part in [*parts, *parser.finish(cut=cut)]:
        if isinstance(part, ToolCall):
            found.append((part.name, part.arguments))
        elif found and found[-1][0] is type(part):
            found[-1] = (type(part), found[-1][1] + part.text)
        else:
            found.append((type(part), part.text))
    return found


def every_way(text, *args, **options):
    one, *others = (parse(text, *args, size=size, **options) for size in (1, 2, 5, 10_000))
    assert others == [one] * 3
    return one


CALLED = ("f", {"a": 1})


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        ("\n\nHi \n", [(Content, "\n\nHi \n")]),
        ("<think>\nhm\n</think>\n\nHi", [(Reasoning, "hm"), (Content, "Hi")]),
        ("\n<think>\n\n</think>\n\nHi", [(Content, "Hi")]),
        ("<think>never ends", [(Reasoning, "never ends")]),
        ("Write <think> first</think>", [(Content, "Write <think> first</think>")]),
        ("a < b <thin", [(Content, "a < b <thin")]),
        (f"<think>hm</think>\n\n{F}", [(Reasoning, "hm"), CALLED]),
        (f"Let me see.\n{F}\n{F}\n", [(Content, "Let me see."), CALLED, CALLED]),
        (f"<think>hm\n{F}", [(Reasoning, "hm"), CALLED]),
        (f"{F} Done.", [CALLED, (Content, " Done.")]),
        (
            "See\n<tool_call>nope</tool_call> end ",
            [(Content, "See\n<tool_call>nope</tool_call> end ")],
        ),
        (f"<tool_call>{F}", [(Content, "<tool_call>"), CALLED]),
        ("<think>Say <tool_call>?</think>Hi", [(Reasoning, "Say <tool_call>?"), (Content, "Hi")]),
        ('<tool_call>{"name": "f"', [(Content, '<tool_call>{"name": "f"')]),
        ('<tool_call>{"name": "f"}</tool_call>', [("f", {})]),
        ('<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', [("f", {})]),
        (
            '<tool_call>{"name": "f", "parameters": {"b": "\\u00e9"}}</tool_call>',
            [("f", {"b": "é"})],
        ),
    ],
)
def test_parts_of_an_answer_are_told_apart_however_it_is_cut(text, parts):
    assert every_way(text) == parts


@pytest.mark.parametrize(
    "inside",
    [
        *(
            "{",
            "[]",
            "7",
            "null",
            '{"name": 7}',
            '{"name": ""}',
            '{"name": "f", "arguments": []}',
            '{"name": "\\ud800"}',
        ),
        *('{"name": "f", "arguments": {"a": NaN}}', '{"name": "f", "id": 7}', "[" * 100_000),
        '{"name": "f", "arguments": {"a": "\\ud800"}}',  # no body could hold it
    ],
)
def test_markup_that_is_no_tool_call_is_text(inside):
    text = f"<tool_call>{inside}</tool_call>"
    assert parse(text, size=1000) == [(Content, text)]


def test_without_tools_their_markup_is_text_to_the_character():
    text = f"<think>hm</think>Hi\n \n{F}\n"
    assert every_way(text, tools=[]) == [(Reasoning, "hm"), (Content, f"Hi\n \n{F}\n")]


def test_prompt_that_opens_the_reasoning_begins_the_answer_within_it():
    assert every_way("hm\n</think>\n\nHi", in_reasoning=True) == [
        (Reasoning, "hm"),
        (Content, "Hi"),
    ]


def test_calls_beyond_the_limit_are_left_out():
    assert every_way(f"{F}\n{F}\nHi", max_calls=1) == [CALLED, (Content, "Hi")]


def test_answer_that_was_cut_within_a_tool_call_gives_its_text():
    _, glm = markup_with("glm47")
    text = "<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value><arg_key>b"
    assert every_way(text, glm, cut=True) == [(Content, text)]
    assert every_way(text, glm) == [("f", {"a": 1})]


def test_an_answer_full_of_what_is_no_call_is_read_in_no_time_and_calls_before_it_are_calls():
    start = "<tool_call>"
    text = F + start * 30_000
    for cut in (False, True):
        began = time.process_time()
        assert parse(text, size=len(text), cut=cut) == [CALLED, (Content, start * 30_000)]
        assert time.process_time() - began < 2  # read again from each of them, it takes 8


_CALLED = {
    "json_tools": F,
    "qwen3_coder": "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n"
    "</tool_call>",
    "glm47": "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
    "mistral": '[TOOL_CALLS]f[ARGS]{"a": 1}',
    "pythonic": "<|tool_call_start|>[f(a=1)]<|tool_call_end|>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0"
    '<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|><|tool_calls_section_end|>',
    "gemma4": "<|tool_call>call:f{a:1}<tool_call|>",
    "longcat": '<longcat_tool_call>{"name": "f", "arguments": {"a": 1}}</longcat_tool_call>',
    "function_gemma": "<start_function_call>call:f{a:1}<end_function_call>",
}


@pytest.mark.parametrize("parser", _CALLED)
def test_calls_are_read_in_the_formats_that_mlx_lm_reads(parser):
    ((name, arguments),) = every_way(_CALLED[parser], markup_with(parser)[1])
    assert (name, {k: int(v) for k, v in arguments.items()}) == CALLED


def test_several_calls_in_one_span_are_several():
    text = "<|tool_call_start|>[f(a=1), f(a=2)]<|tool_call_end|>"
    assert every_way(text, markup_with("pythonic")[1]) == [CALLED, ("f", {"a": 2})]


def test_ids_of_calls_differ_and_are_the_models_where_it_gives_them():
    parser = AnswerParser(markup_of(QWEN3), TOOLS)
    one, other = parser.feed(F + F)
    assert one.id.startswith("call_") and one.id != other.id
    kimi = AnswerParser(markup_with("kimi_k2")[1], TOOLS)
    assert kimi.feed(_CALLED["kimi_k2"])[0].id == "functions.f:0"
    mistral = AnswerParser(markup_with("mistral")[1], TOOLS)
    mistral.feed(_CALLED["mistral"])
    assert len(mistral.finish()[0].id) == 9


JUNK = [
    *(
        "",
        "{",
        "}",
        "[",
        '"',
        "<",
        "f",
        "f:0",
        "f()",
        "[f(",
        "[f(a={1})]",
        "[f(a=1e999)]",
        "f{a:",
        "f x",
        "call:f{a",
    ),
    *(
        "<function=f>",
        "<function=f><parameter=a></function>",
        "<arg_key>a",
        "[]",
        "null",
        "[1]",
        '{"name": []}',
    ),
    *(
        "f[ARGS]",
        "f[ARGS][",
        "functions.f:0<|tool_call_argument_begin|>[",
        "(" * 500,
        "\0",
        "\ud800",
        "call:f{a:<escape>}",
    ),
]


@pytest.mark.parametrize("parser", PARSERS)
def test_no_parser_fails_at_what_a_model_writes_and_nothing_is_lost(parser):
    module, markup = markup_with(parser)
    for junk in JUNK:
        text = f"{module.tool_call_start}{junk}{module.tool_call_end}"
        parts = parse(text, markup, size=1000)
        assert parts == [(Content, text)] or any(isinstance(name, str) for name, _ in parts), (
            junk,
            parts,
        )


ANALYSIS = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
TO_F = 'to=functions.f {}<|constrain|>json<|message|>{{"a": 1}}'


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (f"{ANALYSIS}<|channel|>final<|message|>Hi", [(Reasoning, "hm"), (Content, "Hi")]),
        (f"{ANALYSIS}<|channel|>commentary {TO_F.format('')}", [(Reasoning, "hm"), CALLED]),
        (
            f"{ANALYSIS} {TO_F.format('<|channel|>commentary ')}<|call|>",
            [(Reasoning, "hm"), CALLED],
        ),
        (
            f"<|channel|>commentary<|message|>Pre<|end|><|start|>assistant {TO_F.format('')}",
            [(Content, "Pre"), CALLED],
        ),
        ("no channel at all", [(Content, "no channel at all")]),
    ],
)
def test_gpt_oss_channels_are_reasoning_content_and_calls(text, parts):
    assert every_way(text, markup_of(HARMONY)) == parts


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"name": "f", "parameters": {"a": 1}}', [CALLED]),
        ('<|python_tag|>{"name": "f", "parameters": {"a": 1}}', [CALLED]),
        ('{ "type": "function", "name": "f", "parameters": {"a": 1} }', [CALLED]),
        ('{"name": "Alice", "age": 3}', [(Content, '{"name": "Alice", "age": 3}')]),
        ("{1, 2} is a set", [(Content, "{1, 2} is a set")]),
        ('{"name": "f"', [(Content, '{"name": "f"')]),
        ('Say {"name": "f"}', [(Content, 'Say {"name": "f"}')]),
    ],
)
def test_llamas_calls_are_answers_that_are_json(text, parts):
    assert every_way(text, markup_of(LLAMA3)) == parts
    assert every_way(text, markup_of(LLAMA3), tools=[]) == [(Content, text)]


def test_models_without_markup_say_text_to_the_character():
    for template in (CHATML, LLAMA3):
        text = f" <think>hm</think> {F}\n\n"
        assert every_way(text, markup_of(template)) == [(Content, text)]


@given(
    st.lists(
        st.sampled_from(
            [" ", "\n", "a", "b", "<", "<tool_call>", "</tool_call>", "<tool", "{", "<think>"]
        )
    )
)
def test_no_text_is_lost_where_nothing_is_called_or_thought(pieces):
    text = "x" + "".join(pieces)
    assert parse(text) == parse(text, size=3) == [(Content, text)]
