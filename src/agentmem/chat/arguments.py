"""Arguments of a tool call, which the history may hold in any form: an object all the same."""

import ast
import json
import math
import re
from typing import Any

KEPT_UNDER = "arguments"  # what is no object is kept under this name, so that nothing vanishes
_LONGEST_LITERAL = 100_000  # characters of Python's notation that are read
_SURROGATE = re.compile("[\ud800-\udfff]")
_UNREAD = (ValueError, TypeError, SyntaxError, RecursionError, MemoryError)


def mend(value: Any) -> Any:
    """Return a JSON value that a prompt can hold: `mend_texts`, and names for NaN and infinities.

    RecursionError: it is nested too deep.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {mend_text(str(key)): mend(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [mend(inner) for inner in value]
    return mend_text(value) if isinstance(value, str) else value


def mend_texts(value: Any) -> Any:
    """Return a JSON value with U+FFFD for each lone surrogate. RecursionError: it is too deep."""
    if isinstance(value, dict):
        return {mend_text(str(key)): mend_texts(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [mend_texts(inner) for inner in value]
    return mend_text(value) if isinstance(value, str) else value


def mend_text(text: str) -> str:
    """Return the text with U+FFFD for each lone surrogate, which no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return _SURROGATE.sub("\ufffd", text)
    return text


def read_arguments(arguments: Any) -> dict[str, Any]:
    """Return the arguments of a call as an object, whatever a client kept of them.

    JSON is read even where a string holds a raw line break, and Python's notation too. What is no
    object, a list or JSON that was cut, is the value of the one argument "arguments".
    """
    found = _parse(arguments) if isinstance(arguments, str) else arguments
    if isinstance(found, str) and found is not arguments:  # an object within a string, twice
        found = _parse(found)
    if found is None or found == "":
        return {}
    try:
        mended = mend(found)
        json.dumps(mended)
    except _UNREAD:
        return {KEPT_UNDER: mend_text(arguments) if isinstance(arguments, str) else "..."}
    return mended if isinstance(mended, dict) else {KEPT_UNDER: mended}


def _parse(text: str) -> Any:
    """Return the value that a text tells, or the text itself. None: it tells nothing."""
    if not text.strip():
        return None
    try:
        return json.loads(text, strict=False, parse_constant=str)
    except _UNREAD:
        pass
    if len(text) > _LONGEST_LITERAL or text.lstrip()[0] not in "{[(":
        return text
    try:
        return ast.literal_eval(text.strip())
    except _UNREAD:
        return text
