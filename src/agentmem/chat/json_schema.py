"""JSON schemas as clients send them, made fit for llguidance.

What it can't hold an answer to is named by its path.
"""

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote

from llguidance import LLMatcher

from ..errors import InvalidRequest

Schema = dict[str, Any]

_MAX_CHARACTERS = 256 * 1024  # of a schema as JSON
_MAX_DEPTH = 100  # of a schema; llguidance's own reader ends at 128
_MAX_LOOKS = 2000  # at parts of a schema, for the one that can't be held
_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_TYPE_OF = {
    type(None): "null",
    bool: "boolean",
    int: "number",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}
# what clients write for a type that JSON schema does not know
_OTHER_TYPES = {
    "str": "string",
    "text": "string",
    "int": "integer",
    "float": "number",
    "double": "number",
    "bool": "boolean",
    "list": "array",
    "dict": "object",
    "none": "null",
}
# a format is an annotation to JSON schema: those that llguidance does not know hold nothing back
_FORMATS = {
    "date-time",
    "time",
    "date",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "uuid",
    "uri",
}
_ONE = (
    "additionalProperties",
    "additionalItems",
    "items",
    "not",
    "if",
    "then",
    "else",
    "contains",
    "propertyNames",
    "unevaluatedProperties",
    "unevaluatedItems",
)
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_ANNOTATIONS = ("$schema", "$id", "id", "x-guidance", "discriminator")
_UNKNOWN_KEYS = re.compile(r"Unimplemented keys: (\[.*\])")
# blanks between the parts of free JSON: never without end, which a weak model would not find
_BLANKS = r"(?: |\n[ \t]{0,40})"


def fit(schema: Any, param: str) -> Schema:
    """Return a schema that says the same, in a form that llguidance reads.

    Loose forms of clients are read as they are meant: null where nothing is meant, `nullable`,
    types by other names, JSON schema's older drafts. An object with properties has no others
    unless it says so, which keeps a model from inventing some. InvalidRequest names `param`: it is
    no schema, too large or too deep.
    """
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{param}: must be a JSON schema, which is an object", param=param)
    try:
        size = len(json.dumps(schema, ensure_ascii=False))
    except RecursionError:
        raise InvalidRequest(f"{param}: nested too deep", param=param) from None
    if size > _MAX_CHARACTERS:
        most = f"the most is {_MAX_CHARACTERS}"
        message = f"{param}: is {size} characters long as JSON; {most}"
        raise InvalidRequest(message, param=param)
    if _depth(schema) > _MAX_DEPTH:
        message = f"{param}: nested too deep; the most is {_MAX_DEPTH}"
        raise InvalidRequest(message, param=param)
    closes = '"allOf"' not in json.dumps(schema)
    fitted = _fit(schema, closes=closes)
    found: Schema = _with_disjoint_choices(fitted, fitted)
    return found


def with_layout(
    schema: Schema,
    *,
    compact: bool = False,
    separators: tuple[str, str] | None = None,
    lenient: bool = False,
) -> Schema:
    """Return the schema with what llguidance is to know of its blanks.

    `separators`, of items and of keys, leave no choice; `compact` leaves none between parts.
    `lenient`: what can't be held is not.
    """
    layout: Schema = {"whitespace_pattern": _BLANKS}
    if separators is not None:
        item, key = separators
        layout = {"item_separator": item, "key_separator": key, "whitespace_flexible": False}
    elif compact:
        layout = {"whitespace_flexible": False}
    if lenient:
        layout["lenient"] = True
    return {**schema, "x-guidance": layout}


def refusal(schema: Schema) -> tuple[str, str] | None:
    """Return where a schema that was made fit asks for what can't be held, and why not.

    For example ("#/properties/a/not", 'is not supported'); None: all of it can be held.
    """
    if (why := _why_not(schema)) is None:
        return None
    root = _rerooted(schema)
    path = ""
    looks = 0
    node: Any = schema
    while True:
        for step, part in _parts(node):
            looks += 1
            if looks > _MAX_LOOKS:
                break
            if (inner := _part_error(part, root, path + step)) is not None:
                why = inner
                path += step
                node = part
                break
        else:
            break
        if looks > _MAX_LOOKS:
            break
    if match := _UNKNOWN_KEYS.search(why):
        return f"#{path}/{json.loads(match.group(1))[0]}", "is not supported by this server"
    return f"#{path}", _plain(why)


@lru_cache(maxsize=1024)
def can_hold(schema: str) -> bool:
    """Return whether llguidance can hold an answer to a schema, which is JSON."""
    return _why_not(schema) is None


def _why_not(schema: Schema | str) -> str | None:
    """Return why llguidance can't hold an answer to a schema; None: it can."""
    grammar = LLMatcher.grammar_from_json_schema(schema)
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    return messages[0] if is_error else None


def _depth(value: Any) -> int:
    """Return how deep lists and objects are nested, without recursion."""
    deepest = 0
    todo: list[tuple[Any, int]] = [(value, 1)]
    while todo:
        found, depth = todo.pop()
        deepest = max(deepest, depth)
        inner = found.values() if isinstance(found, dict) else found
        if isinstance(found, dict | list):
            todo += [(one, depth + 1) for one in inner]
    return deepest


def _fit(node: Any, *, closes: bool) -> Any:
    if not isinstance(node, dict):
        return node
    found: Schema = {}
    for key, value in node.items():
        if key in _ANNOTATIONS or (value is None and key not in ("const", "default")):
            continue
        if key in _MAPS and isinstance(value, dict):
            found[key] = {name: _fit(one, closes=closes) for name, one in value.items()}
        elif key in _LISTS and isinstance(value, list):
            found[key] = [_fit(one, closes=closes) for one in value]
        elif key in _ONE and isinstance(value, dict):
            found[key] = _fit(value, closes=closes)
        else:
            found[key] = value
    _fit_type(found)
    _fit_bounds(found)
    _fit_items(found, closes=closes)
    _fit_object(found, closes=closes)
    return _nullable(found)


def _fit_type(node: Schema) -> None:
    given = node.get("type")
    if isinstance(given, str) and given not in _TYPES:
        lower = given.lower()
        if lower == "any":
            del node["type"]
        else:
            node["type"] = _OTHER_TYPES.get(lower, lower)
    if str(node.get("format")) not in _FORMATS:
        node.pop("format", None)


def _fit_bounds(node: Schema) -> None:
    """Read the bounds of draft 4, where exclusive ones are a word on the others."""
    for exclusive, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(node.get(exclusive), bool) and node.pop(exclusive) and bound in node:
            node[exclusive] = node.pop(bound)


def _fit_items(node: Schema, *, closes: bool) -> None:
    if isinstance(node.get("items"), list):
        node["prefixItems"] = [_fit(one, closes=closes) for one in node.pop("items")]
        if "additionalItems" in node:
            node["items"] = node.pop("additionalItems")
    if node.get("uniqueItems") is False:
        del node["uniqueItems"]


def _fit_object(node: Schema, *, closes: bool) -> None:
    if isinstance(node.get("required"), bool):  # of draft 3
        del node["required"]
    properties = node.get("properties")
    if not (closes and isinstance(properties, dict)):
        return
    required = node.get("required", [])
    others = {"additionalProperties", "patternProperties", "unevaluatedProperties", "$ref"}
    others |= {"anyOf", "oneOf", "minProperties", "propertyNames"}
    is_closed = isinstance(required, list) and all(name in properties for name in required)
    if is_closed and not others & set(node):
        node["additionalProperties"] = False


def _nullable(node: Schema) -> Schema:
    """Read OpenAPI's `nullable`."""
    if node.pop("nullable", None) is not True:
        return node
    if isinstance(node.get("type"), str) and "enum" not in node and "const" not in node:
        return {**node, "type": [node["type"], "null"]}
    return {"anyOf": [node, {"type": "null"}]}


def _with_disjoint_choices(node: Any, root: Schema) -> Any:
    """Say anyOf for oneOf where no value can be of two choices.

    llguidance does so itself, but does not look at what a $ref stands for.
    """
    if isinstance(node, list):
        return [_with_disjoint_choices(one, root) for one in node]
    if not isinstance(node, dict):
        return node
    found = {key: _with_disjoint_choices(value, root) for key, value in node.items()}
    choices = found.get("oneOf")
    if isinstance(choices, list) and "anyOf" not in found:
        seen = [_resolved(choice, root) for choice in choices]
        pairs = [(a, b) for i, a in enumerate(seen) for b in seen[i + 1 :]]
        if all(_are_disjoint(a, b) for a, b in pairs):
            found = {"anyOf" if key == "oneOf" else key: one for key, one in found.items()}
    return found


def _resolved(node: Any, root: Schema) -> Any:
    for _ in range(_MAX_DEPTH):
        ref = node.get("$ref") if isinstance(node, dict) else None
        if not isinstance(ref, str) or not ref.startswith("#/"):
            return node
        node = root
        for name in ref[2:].split("/"):
            name = name.replace("~1", "/").replace("~0", "~")
            if not isinstance(node, dict) or name not in node:
                return None
            node = node[name]
    return None


def _are_disjoint(one: Any, other: Any) -> bool:
    if not isinstance(one, dict) or not isinstance(other, dict):
        return False
    types = [_types(node) for node in (one, other)]
    if all(types) and not types[0] & types[1]:
        return not ({"integer", "number"} <= types[0] | types[1])
    return any(
        _values(one, name)
        and _values(other, name)
        and not _values(one, name) & _values(other, name)
        for name in set(_required(one)) & set(_required(other))
    )


def _types(node: Schema) -> set[str]:
    if "const" in node or isinstance(node.get("enum"), list):
        values = [node["const"]] if "const" in node else node["enum"]
        return {_TYPE_OF.get(type(value), "") for value in values}
    given = node.get("type", [])
    return {given} if isinstance(given, str) else {one for one in given if isinstance(one, str)}


def _required(node: Schema) -> list[str]:
    given = node.get("required", [])
    return [name for name in given if isinstance(name, str)] if isinstance(given, list) else []


def _values(node: Schema, name: str) -> set[str]:
    """Return the strings that a property may be; empty: it may be others too."""
    properties = node.get("properties")
    inner = properties.get(name) if isinstance(properties, dict) else None
    if not isinstance(inner, dict):
        return set()
    values = [inner["const"]] if "const" in inner else inner.get("enum", [])
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        return set()
    return set(values)


def _parts(node: Any) -> Iterator[tuple[str, Any]]:
    """Yield the schemas in a schema, each with the step of its path."""
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if key in _MAPS and isinstance(value, Mapping):
            for name, one in value.items():
                yield f"/{key}/{name.replace('~', '~0').replace('/', '~1')}", one
        elif key in _LISTS and isinstance(value, list):
            for i, one in enumerate(value):
                yield f"/{key}/{i}", one
        elif key in _ONE and isinstance(value, dict):
            yield f"/{key}", value


def _rerooted(node: Any) -> Any:
    """Return a schema that stands at #/x-root, with references that find their way there."""
    if isinstance(node, list):
        return [_rerooted(one) for one in node]
    if not isinstance(node, dict):
        return node
    found = {key: _rerooted(one) for key, one in node.items()}
    ref = node.get("$ref")
    if isinstance(ref, str) and (ref == "#" or ref.startswith("#/")):
        found["$ref"] = f"#/x-root{ref[1:]}"
    return found


def _part_error(part: Any, root: Any, path: str) -> str | None:
    """Return why llguidance can't hold a part of a schema; alone, where that is all it takes."""
    if isinstance(part, dict) and '"$ref"' not in json.dumps(part):
        return _why_not(part)
    return _error(root, path)


def _error(root: Any, path: str) -> str | None:
    """Return why llguidance can't hold the part of a schema at a path; None: it can."""
    fragment = quote(path, safe="/$~")
    return _why_not({"$ref": f"#/x-root{fragment}", "x-root": root})


def _plain(why: str) -> str:
    """Return llguidance's words in one line, without what it knows of its own options."""
    first = why.split(". Enable ")[0]
    return " ".join(first.split())[:200]
