"""The form in which a model writes its tool calls, found by having its template render some.

A call that is written in it renders to the same text when it comes back as history.
"""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from .answer_parser import AnswerParser, Content
from .markup import Markup, State
from .messages import Message, ToolCall
from .template import ChatTemplate

_USER = Message("user", "hello")
_NAME = "get_weather"
_IDS = ("call00001", "call00002")  # nine letters, as Mistral's templates want them
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Its name."},
                "region": {"type": "string", "description": "Its name."},
                "days": {"type": "integer", "description": "How many."},
                "spans": {"type": "array", "items": {"type": "integer"}, "description": "Some."},
            },
            "required": [],
        },
    },
}
_JSON = {"city": "Paris", "spans": [1, 2]}
_OTHER_JSON = {"city": "Rome", "spans": [3, 4]}
_SEPARATORS = ((", ", ": "), (",", ":"))
_ID = re.compile(r'(,\s?"id":\s?")call0000\d(")')


@dataclass(frozen=True)
class CallForm:
    """Text around the names and the arguments of an answer's calls.

    For example, of Qwen's `<tool_call>\\n{"name": "f", "arguments": {}}\\n</tool_call>`: `opening`
    ends before f, `middle` stands before {}, and `closing` follows it. `id_before` and `id_after`
    stand around an id that the model may write after the arguments.
    """

    opening: str
    middle: str
    closing: str
    between: str | None = None  # from one call's arguments to the next one's name; None: one call
    separators: tuple[str, str] = _SEPARATORS[0]  # of items and of keys
    lead: str = ""  # blanks that the template puts before the first call
    id_before: str = ""
    id_after: str = ""

    def text(self, name: str, arguments: Sequence[dict[str, Any]]) -> str:
        """Return calls of one tool as the model writes them."""
        said = [
            name + self.middle + json.dumps(one, ensure_ascii=False, separators=self.separators)
            for one in arguments
        ]
        return self.opening + (self.between or "").join(said) + self.closing


# what a model of any kind is made to write where nothing better is known
GENERIC = CallForm('{"name": "', '", "arguments": ', "}", between='}\n{"name": "')
# gpt-oss' own, where the template renders no calls
HARMONY = CallForm("<|channel|>commentary to=functions.", " <|constrain|>json<|message|>", "")


@dataclass(frozen=True)
class CallStyle:
    """How a model's calls are written, and read again."""

    form: CallForm
    markup: Markup  # it reads them: the model's own, if that can


def call_style(
    template: ChatTemplate, specials: Collection[str], ends: Collection[str]
) -> CallStyle:
    """Return the style of a template's calls.

    It is GENERIC where no form was found. `specials` are the texts of special tokens; `ends` those
    that end an answer.
    """
    found = _probed(template, specials, ends)
    for form in (found, HARMONY):
        if form is not None and _is_read(form, template.markup):
            return CallStyle(form, template.markup)
    for form in (found, GENERIC):
        if form is not None and _is_read(form, markup := _markup_of(form, template.markup)):
            return CallStyle(form, markup)
    raise AssertionError("what is written in the form GENERIC is read")


def _markup_of(form: CallForm, markup: Markup) -> Markup:
    """Return a markup that reads calls in a form, and reasoning as `markup` has it."""
    edges: dict[State, list[tuple[str, State]]] = {"start": [], "content": [], "reasoning": []}
    for state, pairs in edges.items():
        pairs += [(text, to) for text, to in markup.edges.get(state, ()) if to != "tool"]
    for state in ("start", "content"):
        edges[state].append((form.opening, "tool"))

    def parse(text: str, tools: list[dict[str, Any]]) -> list[Any]:
        return _parse(form, text)

    kept = {state: tuple(pairs) for state, pairs in edges.items()}
    return Markup(kept, think_start=markup.think_start, parse=parse)


def _parse(form: CallForm, text: str) -> list[Any]:
    """Read calls, without what opens the first of them. ValueError: they are not in the form."""
    decoder = json.JSONDecoder()
    calls = []
    while True:
        name, middle, rest = text.partition(form.middle)
        if not middle:
            raise ValueError("a call without arguments")
        arguments, end = decoder.raw_decode(rest)
        if form.opening.endswith('"'):
            name = json.loads(f'"{name}"')
        calls.append({"name": name, "arguments": arguments})
        text = rest[end:]
        if form.between is not None and text.startswith(form.between):
            text = text[len(form.between) :]
        elif text.rstrip() == form.closing.rstrip():
            return calls
        else:
            raise ValueError("something after a call")


def _probed(
    template: ChatTemplate, specials: Collection[str], ends: Collection[str]
) -> CallForm | None:
    asked = template.rendered([_USER], tools=[_TOOL], add_generation_prompt=True)
    one = _rendered(template, [_JSON])
    if asked is None or one is None:
        return None
    for separators in _SEPARATORS:
        said = json.dumps(_JSON, ensure_ascii=False, separators=separators)
        if (at := one.rfind(said)) >= 0:
            break
    else:
        return None
    start = _where_answer_begins(template.markup, asked, one[:at], specials)
    name = one.rfind(_NAME, start, at)
    if name < 0:
        return None
    opening = one[start:name]
    tail = _without_end(one[at + len(said) :], template, ends)
    id_before, id_after, closing = _without_id(tail)
    lead = opening[: len(opening) - len(opening.lstrip())]
    if template.markup.initial == "header":
        lead = ""  # the blank is part of the header
    form = CallForm(
        opening.removeprefix(lead),
        one[name + len(_NAME) : at],
        closing,
        separators=separators,
        lead=lead,
        id_before=id_before,
        id_after=id_after,
    )
    return _with_between(form, template, one[:name])


def _with_between(form: CallForm, template: ChatTemplate, before: str) -> CallForm:
    """Return the form with what stands between two calls, if the template takes two."""
    two = _rendered(template, [_JSON, _OTHER_JSON])
    texts = [
        _NAME + form.middle + json.dumps(one, ensure_ascii=False, separators=form.separators)
        for one in (_JSON, _OTHER_JSON)
    ]
    if two is None or not two.startswith(before + texts[0]):
        return form
    rest = two[len(before + texts[0]) :]
    at = rest.find(texts[1])
    if at < 0:
        return form
    id_before, _, between = _without_id(rest[:at])
    if id_before != form.id_before:
        return form
    return CallForm(**{**vars(form), "between": between})


def _rendered(template: ChatTemplate, arguments: Sequence[dict[str, Any]]) -> str | None:
    calls = tuple(ToolCall(id, _NAME, one) for id, one in zip(_IDS, arguments, strict=False))
    said = Message("assistant", "", tool_calls=calls)
    if (text := template.rendered([_USER, said], tools=[_TOOL])) is not None:
        return text
    results = [Message("tool", "rain", _NAME, tool_call_id=call.id) for call in calls]
    text = template.rendered([_USER, said, *results], tools=[_TOOL])
    return text


def _where_answer_begins(
    markup: Markup, asked: str, rendered: str, specials: Collection[str]
) -> int:
    """Return where in a rendered text the answer begins, after the reasoning.

    `asked` is a prompt up to where an answer begins. It may open the reasoning, where the rendered
    text has none.
    """
    pattern = "|".join(re.escape(text) for text in sorted(specials, key=len, reverse=True))
    splitter = re.compile(f"({pattern})|(?s:.)" if pattern else "(?s:.)")
    pieces = [[match.group() for match in splitter.finditer(text)] for text in (asked, rendered)]
    same = takewhile(lambda pair: pair[0] == pair[1], zip(*pieces, strict=False))
    at = sum(len(piece) for piece, _ in same)
    reasoning = markup.edges.get("reasoning", ()) if markup.think_start else ()
    ends = [text for text, to in reasoning if to != "tool"]
    for end in ends:
        if (found := rendered.rfind(end, at)) >= 0:
            at = max(at, found + len(end))
    return at


def _without_end(tail: str, template: ChatTemplate, ends: Collection[str]) -> str:
    """Return what follows a call's arguments up to the end of the answer."""
    found = [tail.find(end) for end in ends if end and end in tail]
    if found:
        return tail[: min(found)]
    answered = template.rendered([_USER, Message("assistant", "hello")]) or ""
    end = answered.rpartition("hello")[2]
    return tail.removesuffix(end) if end else tail


def _without_id(text: str) -> tuple[str, str, str]:
    """Return what stands before and after a call's id, and the text without these."""
    match = _ID.match(text)
    if match is None:
        return "", "", text
    return match.group(1), match.group(2), text[match.end() :]


def _is_read(form: CallForm, markup: Markup) -> bool:
    """Return whether the answer parser finds the calls of a text in this form."""
    said = [_JSON] if form.between is None else [_JSON, _OTHER_JSON]
    parser = AnswerParser(markup, [_TOOL])
    parts = [*parser.feed(form.text(_NAME, said)), *parser.finish()]
    calls = [part for part in parts if isinstance(part, ToolCall)]
    is_said = any(isinstance(part, Content) and part.text.strip() for part in parts)
    return not is_said and [(call.name, call.arguments) for call in calls] == [
        (_NAME, arguments) for arguments in said
    ]
