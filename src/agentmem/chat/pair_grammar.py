"""The grammar of arguments that a model writes as pairs of a key and a value.

WrittenForm.pairs says which text stands around them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from .json_schema import Schema
from .messages import ToolCall
from .written_form import CallStyle, Kind, WrittenForm, parts_of

_MAX_PROPERTIES = 40
_PLAIN = re.compile(r"[\w.-]+")  # names that mean nothing in any form
# what a model may write for a string, and what is then no string to a careless reader
_PROBES = ("12", "null", "true", "[1]", "x y")
_DEFINITIONS = ("$defs", "definitions")
_HELD = ("minLength", "maxLength", "pattern", "format")


@dataclass(frozen=True)
class Argument:
    key: str
    kind: Kind
    schema: Schema
    is_required: bool
    choices: tuple[str, ...] = ()  # of a string; none: any text


def arguments_of(style: CallStyle, tool: dict[str, Any], schema: Schema) -> list[Argument] | None:
    """Return a tool's arguments as its model writes them; None: pairs can't hold to its schema.

    `schema` is the one of its arguments, made fit. Where a text is not read as the string that the
    schema wants, JSON must do.
    """
    properties = schema.get("properties", {})
    required = schema.get("required", [])
    beside = {"properties", "required", "type", "additionalProperties", "title", "description"}
    beside |= set(_DEFINITIONS)
    is_plain = (
        set(schema) <= beside and len(properties) <= _MAX_PROPERTIES and _text_end(style.form)
    )
    names = [tool["function"]["name"], *properties]
    if not is_plain or not all(_PLAIN.fullmatch(name) for name in names):
        return None
    if not isinstance(required, list) or not set(required) <= set(properties):
        return None
    found = []
    for key, inner in properties.items():
        one = _argument(key, inner, schema, is_required=key in required)
        if one is None or (one.kind == "text" and not _is_kept(style, tool, one)):
            return None
        found.append(one)
    return found


def _argument(key: str, inner: Any, schema: Schema, *, is_required: bool) -> Argument | None:
    if not isinstance(inner, dict):
        return None
    values = [inner["const"]] if "const" in inner else inner.get("enum")
    kinds = _kinds(inner)
    if isinstance(values, list):
        kinds = {"string" if isinstance(value, str) else "other" for value in values}
    if kinds == {"other"}:
        defs: Schema = {name: schema[name] for name in _DEFINITIONS if name in schema}
        return Argument(key, "json", {**inner, **defs}, is_required)
    if kinds != {"string"} or any(name in inner for name in _HELD):
        return None
    choices = tuple(values) if isinstance(values, list) else ()
    return Argument(key, "text", inner, is_required, choices)


def _kinds(schema: Schema) -> set[str]:
    """Return whether a value may be a string or something else; neither: it can't be told."""
    given = schema.get("type")
    types = [given] if isinstance(given, str) else given
    if isinstance(types, list) and types:
        return {"string" if one == "string" else "other" for one in types}
    return set()


def _is_kept(style: CallStyle, tool: dict[str, Any], argument: Argument) -> bool:
    """Return whether the model's parser takes any text for the string that it is."""
    name = tool["function"]["name"]
    for text in argument.choices or _PROBES:
        said = {argument.key: text}
        parts = parts_of(style.form.text(name, [said]), style.markup, [tool])
        if [part.arguments for part in parts if isinstance(part, ToolCall)] != [said]:
            return False
    return True


@dataclass(frozen=True)
class Writer:
    """What makes rules of texts: `literal` of one as it is, `until` of any up to an end."""

    literal: Callable[[str], str]
    until: Callable[[str, str], str]
    json: Callable[[Schema], str]


def pair_rules(
    form: WrittenForm, name: str, arguments: Sequence[Argument], writer: Writer, prefix: str
) -> Mapping[str, str]:
    """Return the rules of a call from its tool's name to the end of its last argument.

    The first is `prefix`; others, named after it, stand for what may follow each argument: those
    after it in their order, of which each may be left out that is not required.
    """
    assert form.pairs is not None
    ends = _text_end(form)
    rules: dict[str, str] = {}

    def value(at: int, argument: Argument) -> str:
        if argument.kind == "json":
            return writer.json(argument.schema)
        if argument.choices:
            said = " | ".join(writer.literal(one) for one in argument.choices)
            return f"({said}) {writer.literal(ends)}"
        if ends[0] in "\"'":
            return f"/[^{ends[0]}\\\\\\x00-\\x1f\\x7f-\\x9f]*/ {writer.literal(ends)}"
        return writer.until(ends, f"{prefix}_text_{at}")

    def following(at: int, last: Kind) -> str:
        assert form.pairs is not None
        drop = len(ends) if last == "text" else 0
        choices = []
        for i, argument in enumerate(arguments[at:], start=at):
            key = form.pairs.join[last][drop:] + argument.key + form.pairs.middle[argument.kind]
            choices.append(f"{writer.literal(key)} {prefix}_{i}")
            if argument.is_required:
                return " | ".join(choices)
        return " | ".join([*choices, writer.literal(form.pairs.end[last][drop:])])

    rules[prefix] = f"{writer.literal(name)} ({following(0, 'none')})"
    for i, argument in enumerate(arguments):
        rules[f"{prefix}_{i}"] = f"{value(i, argument)} ({following(i + 1, argument.kind)})"
    return rules


def _text_end(form: WrittenForm) -> str:
    """Return what every string ends with, whatever comes next."""
    assert form.pairs is not None
    pairs = zip(form.pairs.join["text"], form.pairs.end["text"], strict=False)
    return "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
