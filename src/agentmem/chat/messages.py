"""Messages, whatever wire format they came in, in one form: what says the same renders to the same
tokens.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, Literal, NoReturn, cast, get_args

from ..errors import InvalidRequest

Role = Literal["system", "developer", "user", "assistant", "tool"]
SYSTEM_ROLES = ("system", "developer")
# Claude Code's first system line, which differs between the agents of one session
BILLING_LINE = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n*")
# of a part of a content; only the text is read
_PART_FIELDS = {"type", "text", "cache_control", "prompt_cache_breakpoint", "annotations"}
_ECHO = 200  # characters of the client's own text that an error repeats


@dataclass(frozen=True)
class ToolCall:
    id: str
    name: str
    arguments: dict[str, Any]

    @property
    def arguments_json(self) -> str:
        """As OpenAI's format has it. ValueError: it holds NaN, or an infinity."""
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


def normalise(
    messages: Iterable[Mapping[str, Any]], param: str = "messages", *, known: int = 0
) -> list[Message]:
    """Messages as OpenAI's chat format has them; the types of all but content and arguments have
    been checked.

    content: a string, a list of text parts, or None for none, of the assistant or a tool; arguments
    of tool calls: an object, or one as JSON. Claude Code's billing line is dropped. A tool's result
    gets the name of the tool from the call that it answers. InvalidRequest names the field that
    can't be read, such as messages.3.content, counted from the first message after `known` ones,
    which have been read before.
    """
    result: list[Message] = []
    names: dict[str, str] = {}
    for i, raw in enumerate(messages):
        message = _message(raw, f"{param}.{i - known}", names)
        names.update((call.id, call.name) for call in message.tool_calls)
        if (
            message.content
            or message.role not in SYSTEM_ROLES
            or not text_of(raw.get("content"), param)
        ):
            result.append(
                message
            )  # an empty system prompt too, but not one that held nothing but the billing line
    return result


def text_of(
    content: Any, param: str, kinds: Collection[str] = ("text",), *, system: bool = False
) -> str:
    """The text of a message's content: of a string, or of a list of parts of these types.

    Cache hints on a part are accepted: every prefix is cached anyway. InvalidRequest: anything
    else.
    """
    if not isinstance(content, str | list):
        _refuse(param, "must be a string or a list of parts of type 'text'", "invalid_type")
    parts = (
        [content]
        if isinstance(content, str)
        else [_part(i, part, param, kinds) for i, part in enumerate(content)]
    )
    if system:
        parts = [BILLING_LINE.sub("", part) for part in parts]
    text = "".join(parts)
    if not _is_encodable(text):
        _refuse(param, "not valid Unicode: it holds a lone surrogate")
    return text


def arguments_of(arguments: Any, param: str) -> dict[str, Any]:
    """A tool call's arguments, an object or one as JSON, as templates want them. InvalidRequest:
    they are neither.
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
    """InvalidRequest where a value holds what no prompt can: a lone surrogate, NaN, an infinity,
    depth without end.
    """
    try:
        encodable = _is_encodable(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except RecursionError:
        _refuse(param, "nested too deep")
    except ValueError:
        _refuse(param, "not valid JSON: it holds NaN or an infinity")
    if not encodable:
        _refuse(param, "not valid Unicode: it holds a lone surrogate")


def without_system_between(messages: Sequence[Message]) -> list[Message]:
    """The same with one system message at most, the first: for templates that refuse others.

    Those that follow one another become one; a later one is said by the user, whose neighbouring
    messages become one too, since such templates want the roles to alternate.
    """
    result: list[Message] = []
    for message in messages:
        role: Role = "system" if message.role == "developer" else message.role
        if role == "system" and any(m.role != "system" for m in result):
            role = "user"
        if (
            result
            and role in ("system", "user")
            and result[-1].role == role
            and result[-1].name == message.name
        ):
            result[-1] = Message(role, f"{result[-1].content}\n\n{message.content}", message.name)
        elif role == message.role:
            result.append(message)
        else:
            result.append(Message(role, message.content, message.name))
    return result


def one_call_each(messages: Sequence[Message]) -> list[Message]:
    """The same with one tool call at most in a message, and its result after it: for templates that
    refuse several.
    """
    split: list[Message] = []
    rest = list(messages)
    while rest:
        message = rest.pop(0)
        if len(message.tool_calls) < 2:
            split.append(message)
            continue
        results = list(
            takewhile(lambda m: m.role == "tool", rest)
        )  # ids may come again in later turns
        del rest[: len(results)]
        for i, call in enumerate(message.tool_calls):
            split.append(
                replace(message if i == 0 else Message("assistant", ""), tool_calls=(call,))
            )
            split += [result for result in results if result.tool_call_id == call.id]
        split += [
            r for r in results if r.tool_call_id not in {call.id for call in message.tool_calls}
        ]
    return split


def _message(raw: Mapping[str, Any], param: str, names: Mapping[str, str]) -> Message:
    """`names`: of the tools that were called so far, by the id of the call."""
    role = raw.get("role")
    if role not in get_args(Role):
        _refuse(f"{param}.role", f"must be one of {', '.join(get_args(Role))}")
    calls = tuple(
        _tool_call(c, f"{param}.tool_calls.{i}") for i, c in enumerate(raw.get("tool_calls") or ())
    )
    if calls and role != "assistant":
        _refuse(f"{param}.tool_calls", "only the assistant calls tools")
    content, answers = raw.get("content"), raw.get("tool_call_id")
    if content is None and role in ("assistant", "tool"):
        content = ""
    if (answers is None) == (role == "tool"):
        _refuse(
            f"{param}.tool_call_id", "a message of role 'tool' has one, and no other message does"
        )
    return Message(
        cast(Role, role),
        text_of(content, f"{param}.content", system=role in SYSTEM_ROLES),
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


def _part(index: int, part: Any, param: str, kinds: Collection[str]) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        _refuse(param, f"part {index} must be an object with a type")
    if kind not in kinds:
        use = " or ".join(map(repr, kinds))
        message = (
            f"part {index} is of type {kind[:_ECHO]!r}; this server reads only parts of type {use}"
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
