"""The form in which a model writes its tool calls, found by having its template render some.

A call that is written in it renders to the same text when it comes back as history.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Literal, cast

from .answer_parser import AnswerParser, AnswerPart, Content
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
_NO_ARGUMENTS: dict[str, Any] = {}
_TEXT: dict[str, Any] = {"city": "Paris"}
_NUMBER: dict[str, Any] = {"days": 77}
_JSON = {"city": "Paris", "spans": [1, 2]}
_OTHER_JSON = {"city": "Rome", "spans": [3, 4]}
_SEPARATORS = ((", ", ": "), (",", ":"))
_ID = re.compile(r'(,\s?"id":\s?")call0000\d(")')


@dataclass(frozen=True)
class WrittenForm:
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
    pairs: "Pairs | None" = None  # where arguments are no JSON object; `middle` is empty then

    def text(self, name: str, arguments: Sequence[dict[str, Any]]) -> str:
        """Return calls of one tool as the model writes them."""
        said = [name + self.middle + self._written(one) for one in arguments]
        return self.opening + (self.between or "").join(said) + self.closing

    def _written(self, arguments: dict[str, Any]) -> str:
        if self.pairs is None:
            return self.json(arguments)
        text = ""
        last: Kind = "none"
        for key, value in arguments.items():
            kind: Kind = "text" if isinstance(value, str) else "json"
            said = value if isinstance(value, str) else self.json(value)
            text += self.pairs.join[last] + key + self.pairs.middle[kind] + said
            last = kind
        return text + self.pairs.end[last]

    def json(self, value: Any) -> str:
        """Return a value as the model writes it."""
        return json.dumps(value, ensure_ascii=False, separators=self.separators)


# of the argument that was written last; none: there is none before
Kind = Literal["none", "text", "json"]


@dataclass(frozen=True)
class Pairs:
    """Text around a call's arguments where each is a key and a value of its own.

    For example, of GLM's `<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n`. A string is
    written as it is, all else as JSON.
    """

    join: Mapping[Kind, str]  # from an argument, or the tool's name, to the next key
    middle: Mapping[Kind, str]  # from a key to its value
    end: Mapping[Kind, str]  # after the last argument


# what a model of any kind is made to write where nothing better is known
GENERIC = WrittenForm('{"name": "', '", "arguments": ', "}", between='}\n{"name": "')
# gpt-oss' own, where the template renders no calls
HARMONY = WrittenForm("<|channel|>commentary to=functions.", " <|constrain|>json<|message|>", "")


@dataclass(frozen=True)
class CallStyle:
    """How a model's calls are written, and read again."""

    form: WrittenForm
    markup: Markup  # it reads them: the model's own, if that can


def call_style(
    template: ChatTemplate, specials: Collection[str], ends: Collection[str]
) -> CallStyle:
    """Return the style of a template's calls.

    It is GENERIC where no form was found. `specials` are the texts of special tokens; `ends` those
    that end an answer.
    """
    probe = _Probe(template, specials, ends)
    found = probe.json_form() or probe.pairs_form()
    for form in (found, HARMONY):
        if form is not None and _is_read(form, template.markup):
            return CallStyle(form, template.markup)
    if found is not None and found.pairs is None:
        style = CallStyle(found, _markup_of(found, template.markup))
        if _is_read(style.form, style.markup):
            return style
    return generic_style(template.markup)


def generic_style(markup: Markup) -> CallStyle:
    """Return the form GENERIC and what reads it, with reasoning as `markup` has it."""
    return CallStyle(GENERIC, _markup_of(GENERIC, markup))


def _markup_of(form: WrittenForm, markup: Markup) -> Markup:
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


def _parse(form: WrittenForm, text: str) -> list[Any]:
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


class _Probe:
    """What a template makes of calls."""

    def __init__(self, template: ChatTemplate, specials: Collection[str], ends: Collection[str]):
        self._template = template
        names = "|".join(re.escape(text) for text in sorted(specials, key=len, reverse=True))
        self._pieces = re.compile(f"({names})|(?s:.)" if names else "(?s:.)")
        self._ends = ends
        asked = template.rendered([_USER], tools=[_TOOL], add_generation_prompt=True)
        self._asked = asked or ""
        answered = template.rendered([_USER, Message("assistant", "hello")]) or ""
        self._end = answered.rpartition("hello")[2]

    def json_form(self) -> WrittenForm | None:
        """Return the form of calls whose arguments are a JSON object."""
        one = self._rendered([_JSON])
        if one is None:
            return None
        for separators in _SEPARATORS:
            said = json.dumps(_JSON, ensure_ascii=False, separators=separators)
            if (at := one.rfind(said)) >= 0:
                break
        else:
            return None
        opened = self._opened(one, at)
        if opened is None:
            return None
        before, lead, opening = opened
        id_before, id_after, closing = _without_id(self._without_end(one[at + len(said) :]))
        form = WrittenForm(
            opening,
            one[len(before) + len(_NAME) : at],
            closing,
            separators=separators,
            lead=lead,
            id_before=id_before,
            id_after=id_after,
        )
        texts = [_NAME + form.middle + form.json(one) for one in (_JSON, _OTHER_JSON)]
        two = self._rendered([_JSON, _OTHER_JSON])
        found = _within(two, before + texts[0], texts[1])
        if found is None:
            return form
        id_before, _, between = _without_id(found)
        return replace(form, between=between) if id_before == form.id_before else form

    def pairs_form(self) -> WrittenForm | None:
        """Return the form of calls whose arguments are pairs of a key and a value."""
        rendered = self._rendered([_TEXT]) or ""
        opened = self._opened(rendered, rendered.rfind("city"))
        if opened is None:
            return None
        before, lead, opening = opened
        before += _NAME
        number = self._rendered([_NUMBER])
        texts = self._rendered([_TEXT | {"region": "North"}])
        mixed = self._rendered([_NUMBER | _TEXT])
        join = _all(
            none=_within(rendered, before, "city"),
            text=_within(texts, before, "region", after="Paris"),
            json=_within(mixed, before, "city", after="77"),
        )
        middle = _all(
            text=_within(rendered, before, "Paris", after="city"),
            json=_within(number, before, "77", after="days"),
        )
        tails = _all(
            none=self._tail(_NO_ARGUMENTS, before),
            text=self._tail(_TEXT, before, "Paris"),
            json=self._tail(_NUMBER, before, "77"),
        )
        if join is None or middle is None or tails is None:
            return None
        nexts = _all(
            none=self._next(_NO_ARGUMENTS, before),
            text=self._next(_TEXT, before, "Paris"),
            json=self._next(_NUMBER, before, "77"),
        )
        form = WrittenForm(opening, "", "", lead=lead, pairs=Pairs(join, middle, tails))
        return form if nexts is None else self._with_ends(form, tails, nexts)

    def _with_ends(
        self, form: WrittenForm, tails: Mapping[Kind, str], nexts: Mapping[Kind, str]
    ) -> WrittenForm:
        """Return the form with what ends a call told from what ends the last of them.

        `tails` stand between an argument and the answer's end, `nexts` and the next call's name.
        """
        assert form.pairs is not None
        same = {kind: self._common(tail, nexts[kind]) for kind, tail in tails.items()}
        closings = {tail[same[kind] :] for kind, tail in tails.items()}
        betweens = {text[same[kind] :] for kind, text in nexts.items()}
        if len(closings) > 1 or len(betweens) > 1:
            return form
        pairs = replace(form.pairs, end={kind: tails[kind][: same[kind]] for kind in tails})
        return replace(form, closing=closings.pop(), between=betweens.pop(), pairs=pairs)

    def _tail(self, arguments: dict[str, Any], before: str, after: str = "") -> str | None:
        rest = _within(self._rendered([arguments]), before, "", after=after)
        return None if rest is None else self._without_end(rest)

    def _next(self, arguments: dict[str, Any], before: str, after: str = "") -> str | None:
        two = self._rendered([arguments, {"region": "North"}])
        return _within(two, before, _NAME, after=after)

    def _rendered(self, arguments: Sequence[dict[str, Any]]) -> str | None:
        calls = tuple(ToolCall(id, _NAME, one) for id, one in zip(_IDS, arguments, strict=False))
        said = Message("assistant", "", tool_calls=calls)
        text = self._template.rendered([_USER, said], tools=[_TOOL])
        if text is not None:
            return text
        results = [Message("tool", "rain", _NAME, tool_call_id=call.id) for call in calls]
        return self._template.rendered([_USER, said, *results], tools=[_TOOL])

    def _opened(self, rendered: str, at: int) -> tuple[str, str, str] | None:
        """Return the text before a call's name, and its end: blanks, and what opens the call.

        `at`: where its arguments are.
        """
        if at < 0:
            return None
        start = self._where_answer_begins(rendered[:at])
        name = rendered.rfind(_NAME, start, at)
        if name < 0:
            return None
        opening = rendered[start:name]
        lead = opening[: len(opening) - len(opening.lstrip())]
        if self._template.markup.initial == "header":
            lead = ""  # the blank is part of the header
        return rendered[:name], lead, opening.removeprefix(lead)

    def _where_answer_begins(self, rendered: str) -> int:
        """Return where in a rendered text the answer begins, after the reasoning.

        The prompt may open the reasoning where the rendered text has none.
        """
        at = self._common(self._asked, rendered)
        markup = self._template.markup
        reasoning = markup.edges.get("reasoning", ()) if markup.think_start else ()
        for end in [text for text, to in reasoning if to != "tool"]:
            if (found := rendered.rfind(end, at)) >= 0:
                at = max(at, found + len(end))
        return at

    def _common(self, one: str, other: str) -> int:
        """Count the characters that two texts begin with alike, special tokens as wholes."""
        pieces = [[match.group() for match in self._pieces.finditer(t)] for t in (one, other)]
        same = takewhile(lambda pair: pair[0] == pair[1], zip(*pieces, strict=False))
        return sum(len(piece) for piece, _ in same)

    def _without_end(self, tail: str) -> str:
        """Return what follows a call's arguments up to the end of the answer."""
        found = [tail.find(end) for end in self._ends if end and end in tail]
        if found:
            return tail[: min(found)]
        return tail.removesuffix(self._end) if self._end else tail


def _within(text: str | None, before: str, until: str, *, after: str = "") -> str | None:
    """Return what stands in a text that begins with `before`, from `after` up to `until`."""
    if text is None or not text.startswith(before):
        return None
    rest = text[len(before) :]
    if after:
        _, found, rest = rest.partition(after)
        if not found:
            return None
    if not until:
        return rest
    inner, found, _ = rest.partition(until)
    return inner if found else None


def _all(**found: str | None) -> dict[Kind, str] | None:
    """Return texts by their kinds; None: one was not found."""
    texts = {cast(Kind, kind): text for kind, text in found.items() if text is not None}
    return texts if len(texts) == len(found) else None


def _without_id(text: str) -> tuple[str, str, str]:
    """Return what stands before and after a call's id, and the text without these."""
    match = _ID.match(text)
    if match is None:
        return "", "", text
    return match.group(1), match.group(2), text[match.end() :]


def _is_read(form: WrittenForm, markup: Markup) -> bool:
    """Return whether the answer parser finds the calls of a text in this form."""
    said = [_JSON] if form.between is None else [_JSON, _NO_ARGUMENTS, _NUMBER, _OTHER_JSON]
    parts = parts_of(form.text(_NAME, said), markup, [_TOOL])
    calls = [part for part in parts if isinstance(part, ToolCall)]
    is_said = any(isinstance(part, Content) and part.text.strip() for part in parts)
    return not is_said and [call.arguments for call in calls] == said


def parts_of(text: str, markup: Markup, tools: list[dict[str, Any]]) -> list[AnswerPart]:
    """Return the parts of a whole answer."""
    parser = AnswerParser(markup, tools)
    return [*parser.feed(text), *parser.finish()]
