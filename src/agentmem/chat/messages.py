"""What a prompt is made of: messages and calls of tools, whatever wire format they came in."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from ..errors import InvalidRequest

Role = Literal["system", "developer", "user", "assistant", "tool"]
SYSTEM_ROLES = ("system", "developer")


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

    messages: Sequence[Mapping[str, Any]]  # in the shape of OpenAI's chat API, see normalise.py
    known: int = 0  # the first of them come from a transcript: errors count from those after
    tools: Sequence[dict[str, Any]] = ()  # as normalise.function_tools returns them
    options: Mapping[str, Any] = field(default_factory=dict)  # the template's own
    generation_prompt: bool = True  # the prompt ends where an answer begins; else with a message
    # the prompt ends within the last message, the assistant's, which the answer goes on with
    continues: bool = False


def arguments_of(arguments: Any, param: str) -> dict[str, Any]:
    """Return the arguments of a call that a model makes now.

    They are an object, or one as JSON. InvalidRequest: they are neither.
    """
    try:
        found = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        refuse(param, "must be a JSON object, as such or in a string")
    check_encodable(found, param)
    return found


def check_encodable(value: Any, param: str) -> None:
    """Raise InvalidRequest where a value holds what no prompt can.

    That is: a lone surrogate, NaN, an infinity, depth without end.
    """
    try:
        encodable = _is_encodable(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except RecursionError:
        refuse(param, "nested too deep")
    except ValueError:
        refuse(param, "not valid JSON: it holds NaN or an infinity")
    if not encodable:
        refuse(param, "not valid Unicode: it holds a lone surrogate")


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def refuse(param: str, message: str, code: str | None = None) -> NoReturn:
    """Raise InvalidRequest, which names the field."""
    raise InvalidRequest(f"{param}: {message}", param=param, code=code)
