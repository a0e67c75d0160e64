"""Messages of chat completions as clients really send them, in the form that transcripts hold.

A history is read whatever it holds: only the newest message may be refused, for what it is.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, get_args

from ...chat.messages import Role
from ...errors import InvalidRequest
from ...transcripts.turns import Messages
from .readable import as_json, is_media, readable, text_of

_ECHO = 200  # characters of the client's own text that an error repeats
_ROLES: Mapping[str, str] = {  # that other servers and older clients know
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "model": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "human": "user",
}


def to_messages(messages: Sequence[Any], param: str = "messages") -> Messages:
    """Return the messages with the fields that a prompt is made of, and no others.

    InvalidRequest names what is wrong with the newest message, or that one is no object.
    """
    found: Messages = []
    for i, raw in enumerate(messages):
        if not isinstance(raw, dict):
            _refuse(f"{param}.{i}", "must be an object with a role", "invalid_type")
        is_newest = i == len(messages) - 1
        found.append(_Reader(raw, f"{param}.{i}", is_newest).message())
    return found


class _Reader:
    """Reads one message."""

    def __init__(self, raw: Mapping[str, Any], param: str, is_newest: bool):
        self._raw = raw
        self._param = param
        self._is_newest = is_newest

    def message(self) -> dict[str, Any]:
        """Return the message in the form that transcripts hold."""
        role = self._role()
        found: dict[str, Any] = {"role": role}
        content = self._content(role)
        calls = self._calls() if role == "assistant" else []
        if content or not calls:
            found["content"] = content
        if calls:
            found["tool_calls"] = calls
        for name in ("name", "reasoning_content", "reasoning"):
            if isinstance(value := self._raw.get(name), str) and value:
                found[name] = value
        call_id = self._raw.get("tool_call_id")
        if role == "tool" and isinstance(call_id, str) and call_id:
            found["tool_call_id"] = call_id
        return found

    def _role(self) -> str:
        role = self._raw.get("role")
        if role in get_args(Role):
            return str(role)
        known = _ROLES.get(role.lower()) if isinstance(role, str) else None
        if known is None and self._is_newest:
            _refuse(f"{self._param}.role", f"must be one of {', '.join(get_args(Role))}")
        return known or "user"

    def _content(self, role: str) -> str | list[Any]:
        content = self._raw.get("content")
        if role == "assistant" and not content and isinstance(self._raw.get("refusal"), str):
            content = self._raw["refusal"]
        if isinstance(content, str):
            return content
        if self._is_newest:
            self._check(content, role)
        if isinstance(content, list) and all(_is_plain(part) for part in content):
            return [{"type": "text", "text": part["text"]} for part in content]
        return readable(content)

    def _check(self, content: Any, role: str) -> None:
        """Raise InvalidRequest where the newest content is nothing that a model can read."""
        param = f"{self._param}.content"
        if content is None:
            if role == "user" and "tool_calls" not in self._raw:
                _refuse(param, "must be a string or a list of parts", "invalid_type")
            return
        if not isinstance(content, list):
            _refuse(param, "must be a string or a list of parts", "invalid_type")
        for i, part in enumerate(content):
            if isinstance(part, str) or (isinstance(part, dict) and text_of(part) is not None):
                continue
            kind = part.get("type") if isinstance(part, dict) else None
            if not isinstance(kind, str) or kind.endswith("text") or "text" in part:
                _refuse(param, f"part {i} must have a text, which is a string", "invalid_type")
            if role == "user" and is_media(part):
                what = f"part {i} is of type {kind[:_ECHO]!r}; this model reads only text"
                _refuse(param, what, "unsupported_parameter")

    def _calls(self) -> list[dict[str, Any]]:
        given = self._raw.get("tool_calls")
        if self._is_newest and not isinstance(given, list | None):
            _refuse(f"{self._param}.tool_calls", "must be a list of calls", "invalid_type")
        found = [_call(call) for call in given or ()] if isinstance(given, list) else []
        old = self._raw.get("function_call")
        if not found and isinstance(old, dict) and old.get("name"):
            found.append(_call({"function": old}))
        return found


def _is_plain(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part["text"], str)


def _call(call: Any) -> dict[str, Any]:
    """Return a call with what a prompt is made of."""
    inner = call.get("function") if isinstance(call, dict) else None
    if not isinstance(inner, dict):
        inner = call if isinstance(call, dict) else {"arguments": as_json(call)}
    name = inner.get("name")
    function = {"name": name if isinstance(name, str) and name else "unknown"}
    if inner.get("arguments") is not None:
        function["arguments"] = inner["arguments"]
    found: dict[str, Any] = {"type": "function", "function": function}
    call_id = call.get("id") if isinstance(call, dict) else None
    if isinstance(call_id, str) and call_id:
        found = {"id": call_id, **found}
    return found


def _refuse(param: str, message: str, code: str | None = None) -> NoReturn:
    raise InvalidRequest(f"{param}: {message}", param=param, code=code)
