"""The grammar of a whole answer, for llguidance: what a request asks of its content and its calls.

It describes the answer as the model writes it, reasoning and markers included:

    start: thought? (content | calls)

Reasoning is free; what was asked for begins after it. Special tokens are written by their ids, as
in <[151657]>, everything else as text.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from ..errors import InvalidRequest
from . import json_schema
from .json_schema import Schema
from .markup import Markup
from .messages import Message
from .pair_grammar import Argument, Writer, arguments_of, pair_rules
from .template import ChatTemplate
from .written_form import GENERIC, CallStyle, WrittenForm, call_style, generic_style

MAX_CALLS = 16  # of a forced answer: else a weak model would go on and on
_MAX_MADE = 64  # constraints that are remembered
_MAX_CHOICES = 1000
_MAX_CHARACTERS = 64 * 1024  # of a regular expression, of choices together, of a grammar
_MAX_THOUGHTS = 4  # messages of gpt-oss' analysis
_USER = Message("user", "hello")
_ANSWER = Message("assistant", "hello")
_ANY_TEXT = r"/(.|\n)*/"


@dataclass(frozen=True)
class ContentFormat:
    """What an answer's content must be: a rule of a grammar, and the grammars that it names."""

    rule: str
    param: str  # the field of the request that asks for it
    grammars: tuple[Mapping[str, Any], ...] = ()
    schema: Schema | None = None  # where it is one, made fit


@dataclass(frozen=True)
class ToolChoice:
    """Which tools an answer may or must call."""

    mode: Literal["none", "auto", "required"] = "auto"
    names: tuple[str, ...] | None = None  # None: any
    strict: frozenset[str] = frozenset()  # those whose arguments are held to their schema
    max_calls: int = 0  # 0: no limit
    param: str = "tool_choice"

    @property
    def is_narrow(self) -> bool:
        """Whether calls may be held to something."""
        return self.mode == "required" or self.names is not None or bool(self.strict)


AUTO = ToolChoice()


@dataclass(frozen=True)
class AnswerShape:
    """What of a model the grammar of its answers depends on."""

    markup: Markup
    calls: CallStyle
    specials: Mapping[str, int]  # special tokens' ids by their texts, as llguidance knows them
    # that a content begins with, and that is no part of it to the detokenizer: SentencePiece's
    blank: str = ""


@dataclass(frozen=True)
class Constraint:
    """What an answer is held to, and how it is read."""

    grammar: str | None  # as llguidance reads it; None: the answer is free
    markup: Markup


def answer_shape(template: ChatTemplate, tokenizer: Any) -> AnswerShape:
    """Return the shape of the answers of a template's model; `tokenizer`: a TokenizerWrapper.

    It probes the template: to be called in the tokenizer's thread.
    """
    specials = special_tokens(tokenizer)
    ends = [tokenizer.decode([token]) for token in tokenizer.eos_token_ids]
    asked = template.rendered([_USER], add_generation_prompt=True) or ""
    answered = template.rendered([_USER, _ANSWER]) or ""
    begins_blank = answered.startswith(f"{asked} {_ANSWER.content}")
    drops_blank = getattr(tokenizer.detokenizer, "trim_space", False)
    return AnswerShape(
        template.markup,
        call_style(template, specials, ends),
        specials,
        blank=" " if begins_blank and drops_blank else "",
    )


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the ids of the tokens that llguidance takes for special, by their texts.

    They are no text to it: a grammar names them by their ids. See GrammarCompiler.
    """
    special = {}
    for id, token in tokenizer.added_tokens_decoder.items():
        text = token.content
        in_brackets = text.startswith("<") and text.endswith(">")
        if token.special or in_brackets or id in tokenizer.eos_token_ids:
            special[text] = id
    return special


# -- what a content may be


def json_content(schema: Any, param: str, *, compact: bool = False) -> ContentFormat:
    """Return the format of JSON that validates against a schema.

    InvalidRequest names what of it is not supported.
    """
    fitted = json_schema.fit(schema, param)
    if (refused := json_schema.refusal(fitted)) is not None:
        path, why = refused
        raise InvalidRequest(f"{param}: {path}: {why}", param=param)
    rule = _json_rule(json_schema.with_layout(fitted, compact=compact))
    return ContentFormat(rule, param, schema=fitted)


def any_json_content(param: str) -> ContentFormat:
    """Return the format of JSON mode: any object."""
    return json_content({"type": "object"}, param)


def regex_content(regex: Any, param: str) -> ContentFormat:
    """Return the format of a text that a regular expression matches as a whole."""
    return _checked_lark(LLMatcher.grammar_from_regex(_text(regex, param)), param)


def choice_content(choices: Any, param: str) -> ContentFormat:
    """Return the format of a text that is one of several."""
    is_list = isinstance(choices, list) and all(isinstance(one, str) for one in choices)
    if not is_list or not 1 <= len(choices) <= _MAX_CHOICES or not all(choices):
        message = f"{param}: must be a list of 1 to {_MAX_CHOICES} strings, none of them empty"
        raise InvalidRequest(message, param=param)
    _text("".join(choices), param)
    return ContentFormat(" | ".join(_quote(one) for one in dict.fromkeys(choices)), param)


def lark_content(grammar: Any, param: str) -> ContentFormat:
    """Return the format of a text of a grammar, in llguidance's Lark or in llama.cpp's GBNF."""
    text = _text(grammar, param)
    try:
        lark = any_to_lark(text)
    except Exception as e:  # its converter is a script: it raises whatever went wrong
        raise InvalidRequest(f"{param}: can't be read as GBNF: {_line(e)}", param=param) from e
    return _checked_lark(LLMatcher.grammar_from_lark(lark), param)


def _checked_lark(grammar: str, param: str) -> ContentFormat:
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    # without a tokenizer it knows no special token; the engine's compiler has one
    if is_error and "special token" not in messages[0].lower():
        raise InvalidRequest(f"{param}: {_line(messages[0])}", param=param)
    if grammar.startswith("{"):
        (inner,) = json.loads(grammar)["grammars"]
        lark = inner["lark_grammar"]
    else:
        lark = grammar
    named = {"name": "given", "lark_grammar": lark}
    return ContentFormat("@given", param, (named,))


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InvalidRequest(f"{param}: must be a string, and not empty", param=param)
    if len(value) > _MAX_CHARACTERS:
        message = f"{param}: is {len(value)} characters long; the most is {_MAX_CHARACTERS}"
        raise InvalidRequest(message, param=param)
    return value


# -- the answer


def constraint(
    shape: AnswerShape,
    tools: Sequence[dict[str, Any]],
    choice: ToolChoice,
    content: ContentFormat | None,
    *,
    in_reasoning: bool,
    prompt_end: str = "",
) -> Constraint:
    """Return what an answer is held to.

    `tools` are in OpenAI's chat format; `in_reasoning`: the prompt ends in it; `prompt_end`: its
    last text. InvalidRequest: a call is asked for that can't be, or a strict tool's schema is not
    supported.
    """
    allowed = callable_tools(tools, choice)
    is_forced = choice.mode == "required"
    is_narrow = choice.names is not None or any(_name(tool) in choice.strict for tool in allowed)
    if is_forced:
        content = None
    elif content is None and not (allowed and is_narrow):
        return Constraint(None, shape.markup)
    held = _held_tools(shape.calls, allowed, choice)
    style = shape.calls
    if held is None:
        style = generic_style(shape.markup)
        held = _held_tools(style, allowed, choice) or []
    # a form that the model does not know by itself is for calls that are forced
    is_own = style.form != GENERIC
    if content is None and not is_forced and not is_own:
        return Constraint(None, shape.markup)
    lark = _Lark(shape, style.form)
    body = []
    markup = shape.markup
    if content is not None:
        body.append(lark.content(content.rule))
    if allowed and (is_forced or is_own):
        markup = style.markup
        calls = _calls(lark, held, choice)
        is_free = content is None and not is_forced
        body += lark.free_or(calls) if is_free else [calls]
    elif allowed:
        body += lark.own_calls()
    lark.rules["start"] = lark.after_thought(
        " | ".join(body), prompt_end, in_reasoning=in_reasoning
    )
    top = {"name": "answer", "lark_grammar": lark.text}
    grammar = json.dumps({"grammars": [top, *(content.grammars if content else ())]})
    return Constraint(grammar, markup)


class Constraints:
    """Constraints of one model's answers. Those made lately are remembered: agents ask again."""

    def __init__(self, template: ChatTemplate, tokenizer: Any):
        """`tokenizer` is an mlx_lm TokenizerWrapper."""
        self._template = template
        self._tokenizer = tokenizer
        self._made: OrderedDict[str, Constraint] = OrderedDict()

    def of(
        self,
        tools: Sequence[dict[str, Any]],
        choice: ToolChoice,
        content: ContentFormat | None,
        *,
        in_reasoning: bool,
        prompt_end: str,
    ) -> Constraint:
        """Return a constraint, see `constraint`. To be called in the tokenizer's thread."""
        end = _thought_end(self._template.markup) or ""
        is_closed = bool(end) and prompt_end.rstrip().endswith(end)
        closed = prompt_end[prompt_end.rindex(end) :] if is_closed else ""
        asked = [choice.mode, choice.names, sorted(choice.strict), choice.max_calls, choice.param]
        form = [content.rule, content.grammars] if content is not None else None
        key = json.dumps([tools, asked, form, in_reasoning, closed])
        if key in self._made:
            self._made.move_to_end(key)
            return self._made[key]
        made = constraint(
            self._shape, tools, choice, content, in_reasoning=in_reasoning, prompt_end=closed
        )
        self._made[key] = made
        if len(self._made) > _MAX_MADE:
            self._made.popitem(last=False)
        return made

    @cached_property
    def _shape(self) -> AnswerShape:
        return answer_shape(self._template, self._tokenizer)


def text_grammar(content: ContentFormat) -> str:
    """Return the grammar of a text that is nothing but the content, as llguidance reads it."""
    top = {"name": "answer", "lark_grammar": f"start: {content.rule}\n"}
    return json.dumps({"grammars": [top, *content.grammars]})


def callable_tools(tools: Sequence[dict[str, Any]], choice: ToolChoice) -> Sequence[dict[str, Any]]:
    """Return the tools that may be called. InvalidRequest: a choice that is not among them."""
    if choice.mode == "none":
        return []
    names = [_name(tool) for tool in tools]
    for name in choice.names or ():
        if name not in names:
            message = f"{choice.param}: there is no tool {name[:200]!r}"
            raise InvalidRequest(message, param=choice.param)
    if choice.names is not None:
        tools = [tool for tool in tools if _name(tool) in choice.names]
    if choice.mode == "required" and not tools:
        message = f"{choice.param}: a call can't be forced where there are no tools to be called"
        raise InvalidRequest(message, param=choice.param)
    return tools


@dataclass(frozen=True)
class _Held:
    """A tool and what its arguments are held to."""

    name: str
    schema: Schema
    pairs: Sequence[Argument] | None = None


def _held_tools(
    style: CallStyle, tools: Sequence[dict[str, Any]], choice: ToolChoice
) -> list[_Held] | None:
    """Return what the arguments of tools are held to; None: the style can't for one of them."""
    found = []
    for i, tool in enumerate(tools):
        schema = _arguments(tool, i, choice)
        pairs = None
        if style.form.pairs is not None:
            pairs = arguments_of(style, tool, schema)
            if pairs is None:
                return None
        found.append(_Held(_name(tool), schema, pairs))
    return found


def _calls(lark: "_Lark", tools: Sequence[_Held], choice: ToolChoice) -> str:
    form = lark.form
    each = []
    for i, tool in enumerate(tools):
        if tool.pairs is not None:
            writer = Writer(lark.literal, lark.until, partial(_laid_out, form))
            lark.rules |= pair_rules(form, tool.name, tool.pairs, writer, f"call_{i}")
            each.append(f"call_{i}")
            continue
        name = tool.name
        if form.opening.endswith('"'):
            name = _quote(name)[1:-1]
        lark.rules[f"arguments_{i}"] = _laid_out(form, tool.schema)
        each.append(f"{lark.literal(name + form.middle)} arguments_{i}")
    one = f"({' | '.join(each)})"
    if form.id_before:
        id = f"{_quote(form.id_before)} /[a-zA-Z0-9]{{9}}/ {_quote(form.id_after)}"
        one = f"{one} ({id})?"
    lark.rules["call"] = one
    lark.rules["calls"] = lark.literal(form.opening) + " call"
    if form.between is not None and choice.max_calls != 1:
        more = (choice.max_calls or MAX_CALLS) - 1
        lark.rules["calls"] += f" ({lark.literal(form.between)} call){{0,{more}}}"
    lark.rules["calls"] += " " + lark.literal(form.closing)
    return "calls"


def _arguments(tool: dict[str, Any], index: int, choice: ToolChoice) -> Schema:
    """Return the schema of a tool's arguments, made fit: they are an object.

    What of a tool's schema is not supported is let go, unless the tool is strict.
    """
    function = tool["function"]
    param = f"tools.{index}.{function['name'][:64]}.parameters"
    is_strict = function["name"] in choice.strict
    try:
        schema = {**json_schema.fit(function["parameters"], param), "type": "object"}
    except InvalidRequest:
        if is_strict:
            raise
        return {"type": "object"}
    if is_strict and (refused := json_schema.refusal(schema)) is not None:
        path, why = refused
        raise InvalidRequest(f"{param}: {path}: {why}", param="tools")
    for lenient in (False, True):
        laid_out = json_schema.with_layout(schema, lenient=lenient)
        if json_schema.can_hold(json.dumps(laid_out)):
            return laid_out if lenient else schema
    return {"type": "object"}


def _laid_out(form: WrittenForm, schema: Schema) -> str:
    lenient = bool(schema.get("x-guidance", {}).get("lenient"))
    laid_out = json_schema.with_layout(schema, separators=form.separators, lenient=lenient)
    return _json_rule(laid_out)


def _name(tool: dict[str, Any]) -> str:
    name: str = tool["function"]["name"]
    return name


class _Lark:
    """A grammar in llguidance's Lark as it grows."""

    def __init__(self, shape: AnswerShape, form: WrittenForm):
        """`form` is that of the calls."""
        self.shape = shape
        self.form = form
        self.rules: dict[str, str] = {}
        names = sorted(shape.specials, key=len, reverse=True)
        self._specials = re.compile(f"({'|'.join(map(re.escape, names))})" if names else r"(?!)()")

    @property
    def text(self) -> str:
        # forced tokens are no use here, and go wrong where only a special one may follow
        options = '%llguidance {"no_forcing": true}\n'
        return options + "".join(f"{name}: {rule}\n" for name, rule in self.rules.items())

    def literal(self, text: str) -> str:
        """Return what stands for a text, with special tokens in it."""
        pieces = [piece for piece in self._specials.split(text) if piece]
        specials = self.shape.specials
        said = [f"<[{specials[p]}]>" if p in specials else _quote(p) for p in pieces]
        return " ".join(said) or '""'

    def until(self, end: str, name: str) -> str:
        """Return what stands for any text up to the first `end`, which is included."""
        first = self._specials.match(end)
        if first is not None:
            return f"{_ANY_TEXT} {self.literal(end)}"
        marker, special, rest = [*self._specials.split(end, maxsplit=1), "", ""][:3]
        self.rules[f"{name}[lazy]"] = f"/(.|\\n)*/ {_quote(marker)}"
        return f"{name} {self.literal(special + rest)}" if special else name

    def content(self, rule: str) -> str:
        """Return what stands for the content, with what the model's markup wants around it."""
        self.rules["content"] = rule
        if self._is_harmony:
            return f"{self.literal('<|channel|>final<|message|>')} content"
        # where the form's lead is that blank, it stands before all that may be said
        blank = "" if self.shape.blank == self.form.lead else self.shape.blank
        return f"({_quote(blank)})? content" if blank else "content"

    def free_or(self, calls: str) -> list[str]:
        """Return the choices of any text, which may lead to calls, all of which are as told."""
        opening = self.form.opening
        if self._is_harmony:
            final = f"{self.literal('<|channel|>final<|message|>')} {_ANY_TEXT}"
            return [final, calls]
        if self._specials.match(opening):
            return [_ANY_TEXT, f"{_ANY_TEXT} {calls}"]
        if opening.startswith("{"):  # a call only at the beginning
            return [r"/\s*([^{\s](.|\n)*)?/", calls]
        pieces = self._specials.split(opening)
        self.rules["before_calls[lazy]"] = f"/(.|\\n)*/ {_quote(pieces[0])}"
        begun = self.rules["calls"]
        opened = self.literal(opening)
        assert begun.startswith(opened)
        rest = self.literal("".join(pieces[1:])) if len(pieces) > 1 else ""
        self.rules["calls"] = f"before_calls {rest} {begun.removeprefix(opened)}"
        return [_ANY_TEXT, calls]

    def own_calls(self) -> list[str]:
        """Return the choice of calls in marks that the model knows, whatever is in them."""
        edges = self.shape.markup.edges
        starts = [text for text, to in edges.get("content", ()) if to == "tool"]
        if not starts:
            return []
        ends = [text for text, _ in edges.get("tool", ())]
        inner = self.until(ends[0], "own_call") if ends else _ANY_TEXT
        return [f"({self.literal(starts[0])} {inner} /\\n?/)+"]

    def after_thought(self, body: str, prompt_end: str, *, in_reasoning: bool) -> str:
        """Return the rule of an answer that may begin, or begins, with reasoning.

        Blank lines are the template's: it puts them after reasoning, and none elsewhere.
        """
        lead = f"({_quote(self.form.lead)})?" if self.form.lead else ""
        if self._is_harmony:
            opened = self.literal("<|channel|>analysis<|message|>")
            thought = f"{opened} {_ANY_TEXT} {self.literal('<|end|><|start|>assistant')}"
            return f"({thought}){{0,{_MAX_THOUGHTS}}} ({body})"
        end = _thought_end(self.shape.markup)
        start = self.shape.markup.think_start
        if start is None or end is None:
            return f"{lead} ({body})"
        thought = f"{self.until(end, 'thought')} /\\n{{0,2}}/"
        if in_reasoning:
            return f"{thought} ({body})"
        if prompt_end.rstrip().endswith(end):
            blanks = "/\\n{0,2}/ " if prompt_end.endswith(end) else ""
            return f"{blanks}({body})"
        return f"(/\\n?/ {self.literal(start)} {thought})? ({body})"

    @property
    def _is_harmony(self) -> bool:
        return self.shape.markup.initial == "header" and "<|channel|>" in self.shape.specials


def _thought_end(markup: Markup) -> str | None:
    ends = [text for text, to in markup.edges.get("reasoning", ()) if to != "tool"]
    return ends[0] if ends else None


def _json_rule(schema: Schema) -> str:
    return f"%json {json.dumps(schema)}"


def _quote(text: str) -> str:
    """Return a text as Lark quotes it."""
    return json.dumps(text, ensure_ascii=False)


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300]
