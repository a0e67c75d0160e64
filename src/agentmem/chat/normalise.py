"""Messages and tools in one form, whatever a client made of them.

What says the same renders to the same tokens.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast, get_args

from .arguments import mend_text, mend_texts, read_arguments
from .messages import SYSTEM_ROLES, Message, Role, ToolCall, check_encodable, refuse

# Claude Code's first system line, which differs between the agents of one session
BILLING_LINE = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n*")
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


def normalise(
    messages: Iterable[Mapping[str, Any]], param: str = "messages", *, known: int = 0
) -> list[Message]:
    """Return messages that come as OpenAI's chat format has them, whatever was kept of them.

    A content is a string, a list of text parts, or None for none; arguments of a tool call are an
    object, or whatever a client kept of one, see arguments.py. Claude Code's billing line is
    dropped. Calls get ids of their own where they have none, or another one's that is not answered
    yet; a tool's result gets the id and the name of the call that it answers. What no encoding has,
    half a surrogate pair, becomes U+FFFD.

    InvalidRequest names the field that is of no known form, such as messages.3.content, counted
    from the first message after `known` ones, which have been read before.
    """
    result: list[Message] = []
    calls = _OpenCalls()
    for i, raw in enumerate(messages):
        message = _message(raw, f"{param}.{i - known}", calls)
        # an empty system prompt stays, but not one that held nothing but the billing line
        is_system = message.role in SYSTEM_ROLES
        if message.content or not is_system or not _text(raw.get("content"), param):
            result.append(message)
    return result


class _OpenCalls:
    """Calls of tools that are not answered yet, and the names of all."""

    def __init__(self) -> None:
        self._num_calls = 0
        self._open: dict[str, list[str]] = {}  # ids that they have here, by those that they had
        self._names: dict[str, str] = {}

    def enter(self, call_id: Any, name: str) -> str:
        """Return the id of a call, which no other call that waits for its result has."""
        self._num_calls += 1
        said = call_id if isinstance(call_id, str) and call_id else f"call_{self._num_calls}"
        said = mend_text(said)
        given = said
        taken = {given for ids in self._open.values() for given in ids}
        number = 1
        while given in taken:
            number += 1
            given = f"{said}_{number}"
        self._open.setdefault(said, []).append(given)
        self._names[given] = name
        return given

    def answer(self, call_id: Any) -> tuple[str, str | None]:
        """Return the id of the call that a result answers, and the name of its tool, if any."""
        said = mend_text(call_id) if isinstance(call_id, str) and call_id else None
        if said is None:  # of the first call that waits
            said = next((name for name, ids in self._open.items() if ids), None)
        if said is None:
            return f"call_{self._num_calls + 1}", None
        waiting = self._open.get(said)
        given = waiting.pop(0) if waiting else said
        return given, self._names.get(given)


def function_tools(
    tools: Sequence[Any] | None, param: str = "tools", *, nested: bool = True
) -> list[dict[str, Any]]:
    """Return the tools of type 'function' in OpenAI's chat format, as templates want them.

    Each has name, description and parameters. They come in that format too, or, if not `nested`, in
    that of Responses, with these three beside the type. Other types, which a client may offer to
    servers that have them, are left out. A `strict` schema is not enforced. InvalidRequest names
    what can't be read, such as tools.0.function.name.
    """
    found = []
    for i, tool in enumerate(tools or ()):
        if not isinstance(tool, dict):
            refuse(f"{param}.{i}", "must be an object with a type")
        kind = tool.get("type") or "function"
        if kind == "function":
            inner = tool.get("function") if nested else tool
            where = f"{param}.{i}.function" if nested else f"{param}.{i}"
            found.append({"type": "function", "function": _function(inner, where)})
    try:
        mended: list[dict[str, Any]] = mend_texts(found)
    except RecursionError:
        refuse(param, "nested too deep")
    check_encodable(mended, param)
    return mended


def _function(function: Any, param: str) -> dict[str, Any]:
    if not isinstance(function, dict):
        refuse(param, "must be an object")
    name = function.get("name")
    description = function.get("description")
    parameters = function.get("parameters")
    if not isinstance(name, str) or not name:
        refuse(f"{param}.name", "must be a string, and not empty")
    if not isinstance(description, str | None):
        refuse(f"{param}.description", "must be a string")
    if not isinstance(parameters, dict | None):
        refuse(f"{param}.parameters", "must be a JSON schema, which is an object")
    return {
        "name": name,
        "description": description or "",
        "parameters": parameters or _NO_PARAMETERS,
    }


def _message(raw: Mapping[str, Any], param: str, calls: _OpenCalls) -> Message:
    role = raw.get("role")
    if role not in get_args(Role):
        refuse(f"{param}.role", f"must be one of {', '.join(get_args(Role))}")
    content = raw.get("content")
    text = _text(
        "" if content is None else content, f"{param}.content", is_system=role in SYSTEM_ROLES
    )
    name = raw.get("name")
    call_id = None
    tool = None
    if role == "tool":
        call_id, tool = calls.answer(raw.get("tool_call_id"))
    called = raw.get("tool_calls") if role == "assistant" else None
    reasoning = raw.get("reasoning_content") or raw.get("reasoning") or None
    return Message(
        cast(Role, role),
        text,
        name=mend_text(name) if isinstance(name, str) and name else tool,
        tool_calls=tuple(_tool_call(call, calls) for call in called or ()),
        tool_call_id=call_id,
        reasoning=mend_text(reasoning) if isinstance(reasoning, str) else None,
    )


def _tool_call(raw: Mapping[str, Any], calls: _OpenCalls) -> ToolCall:
    function = raw["function"]
    name = mend_text(function["name"])
    arguments = read_arguments(function.get("arguments"))
    return ToolCall(calls.enter(raw.get("id"), name), name, arguments)


def _text(content: Any, param: str, *, is_system: bool = False) -> str:
    """Return the text of a content: a string, or a list of text parts. InvalidRequest: neither.

    A system message's is without the billing line. Cache hints on a part are accepted: every prefix
    is cached anyway.
    """
    if not isinstance(content, str | list | None):
        refuse(param, "must be a string or a list of parts of type 'text'", "invalid_type")
    parts = [content or ""] if isinstance(content, str | None) else _parts(content, param)
    if is_system:
        parts = [BILLING_LINE.sub("", part) for part in parts]
    return mend_text("".join(parts))


def _parts(content: list[Any], param: str) -> list[str]:
    return [_part(i, part, param) for i, part in enumerate(content)]


def _part(index: int, part: Any, param: str) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str):
        refuse(param, f"part {index} must have a text, which is a string")
    return text
