"""The values of a call's arguments that a model writes as bare text, by the tool's schema."""

import ast
import json
from collections.abc import Iterator, Mapping
from typing import Any

_MAX_DEPTH = 16  # of schemas within schemas that are looked at
_NUMBERS = ("integer", "number")


def typed_arguments(arguments: Mapping[str, Any], schema: Any) -> dict[str, Any]:
    """Return arguments in the types that `schema`, the tool's parameters, gives them."""
    root = schema if isinstance(schema, dict) else {}
    properties = root.get("properties")
    known = properties if isinstance(properties, dict) else {}
    return {name: typed(value, known.get(name), root) for name, value in arguments.items()}


def typed(value: Any, schema: Any, root: Mapping[str, Any]) -> Any:
    """Return what a text means where the schema allows it; else the text.

    "null" is null only where null is allowed: "null" in a string stays one. `root` has what the
    schema refers to. What is no text was read as JSON, and is written back first.
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    types = set(_types(schema, root))
    found = _read(text.strip())
    if isinstance(found, float) and found.is_integer() and "number" not in types:
        found = int(found) if "integer" in types else found
    # without a type anything is allowed
    fits = not types or bool(types & set(_types_of(found)))
    return found if fits and not isinstance(found, str) else text


def _types(schema: Any, root: Mapping[str, Any], depth: int = 0) -> Iterator[str]:
    """Yield the types that a schema allows; none where it says nothing."""
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        return
    said = schema.get("type")
    names = said if isinstance(said, list) else [said]
    yield from (name for name in names if isinstance(name, str))
    if schema.get("nullable") is True:
        yield "null"
    values = schema.get("enum")
    for value in values if isinstance(values, list) else []:
        yield from _types_of(value)
    if "const" in schema:
        yield from _types_of(schema["const"])
    for key in ("anyOf", "oneOf", "allOf"):
        choices = schema.get(key)
        for choice in choices if isinstance(choices, list) else []:
            yield from _types(choice, root, depth + 1)
    if isinstance(schema.get("$ref"), str):
        yield from _types(_referred(schema["$ref"], root), root, depth + 1)


def _types_of(value: Any) -> tuple[str, ...]:
    """Return the names that JSON schemas have for a value's type."""
    if value is None:
        return ("null",)
    if isinstance(value, bool):
        return ("boolean",)
    if isinstance(value, int):
        return _NUMBERS
    if isinstance(value, float):
        return ("number",)
    if isinstance(value, str):
        return ("string",)
    return ("array",) if isinstance(value, list) else ("object",)


def _referred(pointer: str, root: Mapping[str, Any]) -> Any:
    """Return what a pointer such as #/$defs/Place points to, or None."""
    found: Any = root
    for part in pointer.removeprefix("#").split("/")[1:]:
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _read(text: str) -> Any:
    """Return what a text is as JSON, or as Python writes it; the text, where it is neither."""
    try:
        return json.loads(text, strict=False, parse_constant=_refuse)
    except (ValueError, RecursionError):
        pass
    if text in ("True", "False"):
        return text == "True"
    if text[:1] not in ("{", "["):
        return text
    try:
        found = ast.literal_eval(text)
        json.dumps(found, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return text
    return found if isinstance(found, dict | list) else text


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
