"""The text in what clients send where text belongs: parts, blocks, and results of tools.

A history holds whatever other servers put into it. What has text is read, what is an image or the
like is noted, and of anything else a model sees the JSON.
"""

import json
from collections.abc import Mapping
from typing import Any

_ECHO = 200  # characters of the client's own text that an error or a note repeats
# fields of a part whose text says it all
_TEXTS = ("text", "refusal", "logs", "thinking")
_MEDIA = ("image", "image_url", "audio", "video", "file", "screenshot", "document", "upload")
# for the server that made them, and long
_UNREADABLE = {"encrypted_content", "cache_control", "signature", "annotations", "logprobs"}


def note(kind: Any) -> str:
    """Return the line that stands in a prompt in place of something that is no text."""
    name = str(kind)[:_ECHO].removeprefix("input_")
    return f"[{name} left out: only text can be read]"


def text_of(part: Mapping[str, Any]) -> str | None:
    """Return the text of a part or a block; None if it has none of its own."""
    return next((part[name] for name in _TEXTS if isinstance(part.get(name), str)), None)


def is_media(part: Mapping[str, Any]) -> bool:
    """Return whether a part or a block is an image or the like, which no model here can see."""
    return text_of(part) is None and str(part.get("type")).endswith(_MEDIA)


def readable(value: Any) -> str:
    """Return any value as a text that a model can read.

    The texts of parts are joined without anything between; JSON ends its line.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(_readable_part(part) for part in value)
    return _readable_part(value).removesuffix("\n")


def as_json(value: Any) -> str:
    """Return a value as the JSON that a model sees; what is too deep is noted."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return note("deep value")


def _readable_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        return as_json(part) + "\n"
    text = text_of(part)
    if text is not None:
        return text
    if is_media(part):
        return note(part.get("type"))
    if str(part.get("type")).endswith("text"):  # that is null, say
        return ""
    kept = {name: value for name, value in part.items() if name not in _UNREADABLE}
    return as_json(kept) + "\n"
