"""Messages and tools in one form, whatever wire format they came in.

What says the same renders to the same tokens.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, cast, get_args

from ..errors import InvalidRequest

Role = Literal["system", "developer", "user", "assistant", "tool"]
SYSTEM_ROLES = ("system", "developer")
# Claude Code's first system line, which differs between the agents of one session
BILLING_LINE = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n*")
# of a part of a content; only the text is read
_PART_FIELDS = {"type", "text", "cache_control", "prompt_cache_breakpoint", "annotations"}
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
_ECHO = 200  # characters of the client's own text that an error repeats


@dataclass(frozen=True)
class ToolCall:
    id: str
    name: str
    arguments: dict[str, Any]

    @property
    def arguments_json(self) -> str:
        """The arguments as OpenAI's format has them. ValueError: they hold NaN, or an infinity."""
        return json.dumps(self.arguments, ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True)
class Message:
    role: Role
    content: str
    name: str | None = None  # of who speaks; of a tool's result: the tool's
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None  # of a tool's result
    reasoning: str | None = None


@dataclass(frozen=True)
class Chat:
    """What a prompt is rendered from, whatever API it came by."""

    messages: Sequence[Mapping[str, Any]]  # in the shape of OpenAI's chat API, see `normalise`
    known: int = 0  # the first of them come from a transcript: errors count from those after
    tools: Sequence[dict[str, Any]] = ()  # as `function_tools` returns them
    options: Mapping[str, Any] = field(default_factory=dict)  # the template's own
    generation_prompt: bool = True  # the prompt ends where an answer begins; else with a message
    # the prompt ends within the last message, the assistant's, which the answer goes on with
    continues: bool = False


def normalise(
    messages: Iterable[Mapping[str, Any]], param: str = "messages", *, known: int = 0
) -> list[Message]:
    """Return messages that come as OpenAI's chat format has them.

    The types of all but content and arguments have been checked. A content is a string, a list of
    text parts, or None for none (the assistant's, or a tool's); arguments of a tool call are an
    object, or one as JSON. Claude Code's billing line is dropped. A tool's result gets the name of
    the tool from the call that it answers.

    InvalidRequest names the field that can't be read, such as messages.3.content, counted from the
    first message after `known` ones, which have been read before.
    """
    result: list[Message] = []
    names: dict[str, str] = {}
    for i, raw in enumerate(messages):
        message = _message(raw, f"{param}.{i - known}", names)
        names.update((call.id, call.name) for call in message.tool_calls)
        # an empty system prompt stays, but not one that held nothing but the billing line
        is_system = message.role in SYSTEM_ROLES
        if message.content or not is_system or not _text(raw.get("content"), param):
            result.append(message)
    return result


def arguments_of(arguments: Any, param: str) -> dict[str, Any]:
    """Return a tool call's arguments as templates want them.

    They are an object, or one as JSON. InvalidRequest: they are neither.
    """
    try:
        found = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        _refuse(param, "must be a JSON object, as such or in a string")
    check_encodable(found, param)
    return found


def check_encodable(value: Any, param: str) -> None:
    """Raise InvalidRequest where a value holds what no prompt can.

    That is: a lone surrogate, NaN, an infinity, depth without end.
    """
    try:
        encodable = _is_encodable(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except RecursionError:
        _refuse(param, "nested too deep")
    except ValueError:
        _refuse(param, "not valid JSON: it holds NaN or an infinity")
    if not encodable:
        _refuse(param, "not valid Unicode: it holds a lone surrogate")


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
        kind = tool.get("type") if isinstance(tool, dict) else None
        if not isinstance(kind, str):
            _refuse(f"{param}.{i}", "must be an object with a type")
        if kind == "function":
            inner = tool.get("function") if nested else tool
            where = f"{param}.{i}.function" if nested else f"{param}.{i}"
            found.append({"type": "function", "function": _function(inner, where)})
    check_encodable(found, param)
    return found


def _function(function: Any, param: str) -> dict[str, Any]:
    if not isinstance(function, dict):
        _refuse(param, "must be an object")
    name = function.get("name")
    description = function.get("description")
    parameters = function.get("parameters")
    if not isinstance(name, str) or not name:
        _refuse(f"{param}.name", "must be a string, and not empty")
    if not isinstance(description, str | None):
        _refuse(f"{param}.description", "must be a string")
    if not isinstance(parameters, dict | None):
        _refuse(f"{param}.parameters", "must be a JSON schema, which is an object")
    return {
        "name": name,
        "description": description or "",
        "parameters": parameters or _NO_PARAMETERS,
    }


def _message(raw: Mapping[str, Any], param: str, names: Mapping[str, str]) -> Message:
    """Return a message; `names` are of the tools that were called so far, by the call's id."""
    role = raw.get("role")
    if role not in get_args(Role):
        _refuse(f"{param}.role", f"must be one of {', '.join(get_args(Role))}")
    called = enumerate(raw.get("tool_calls") or ())
    calls = tuple(_tool_call(call, f"{param}.tool_calls.{i}") for i, call in called)
    if calls and role != "assistant":
        _refuse(f"{param}.tool_calls", "only the assistant calls tools")
    content = raw.get("content")
    answers = raw.get("tool_call_id")
    if content is None and role in ("assistant", "tool"):
        content = ""
    if (answers is None) == (role == "tool"):
        why = "a message of role 'tool' has one, and no other message does"
        _refuse(f"{param}.tool_call_id", why)
    return Message(
        cast(Role, role),
        _text(content, f"{param}.content", is_system=role in SYSTEM_ROLES),
        name=raw.get("name") or names.get(answers or ""),
        tool_calls=calls,
        tool_call_id=answers,
        reasoning=raw.get("reasoning_content") or raw.get("reasoning") or None,
    )


def _tool_call(raw: Mapping[str, Any], param: str) -> ToolCall:
    function = raw["function"]
    return ToolCall(
        raw["id"],
        function["name"],
        arguments_of(function.get("arguments"), f"{param}.function.arguments"),
    )


def _text(content: Any, param: str, *, is_system: bool = False) -> str:
    """Return the text of a content: a string, or a list of text parts. InvalidRequest: neither.

    A system message's is without the billing line. Cache hints on a part are accepted: every prefix
    is cached anyway.
    """
    if not isinstance(content, str | list):
        _refuse(param, "must be a string or a list of parts of type 'text'", "invalid_type")
    parts = [content] if isinstance(content, str) else _parts(content, param)
    if is_system:
        parts = [BILLING_LINE.sub("", part) for part in parts]
    text = "".join(parts)
    if not _is_encodable(text):
        _refuse(param, "not valid Unicode: it holds a lone surrogate")
    return text


def _parts(content: list[Any], param: str) -> list[str]:
    return [_part(i, part, param) for i, part in enumerate(content)]


def _part(index: int, part: Any, param: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        _refuse(param, f"part {index} must be an object with a type")
    if kind != "text":
        message = (
            f"part {index} is of type {kind[:_ECHO]!r}; this server reads only parts of type 'text'"
        )
        _refuse(param, message, "unsupported_parameter")
    if unknown := set(part) - _PART_FIELDS:
        _refuse(param, f"part {index} has an unknown field {min(unknown)[:_ECHO]!r}")
    if not isinstance(part.get("text"), str):
        _refuse(param, f"part {index} must have a text, which is a string")
    return cast(str, part["text"])


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse(param: str, message: str, code: str | None = None) -> NoReturn:
    raise InvalidRequest(f"{param}: {message}", param=param, code=code)
