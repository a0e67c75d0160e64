"""Parts of an answer, put together to the message that they are, in the shape of OpenAI's chat API."""

from collections.abc import Iterable
from typing import Any

from ..chat.answer_parser import Content, Part, Reasoning
from ..chat.messages import ToolCall


def message_of(parts: Iterable[Part]) -> dict[str, Any]:
    parts = list(parts)
    content = "".join(part.text for part in parts if isinstance(part, Content))
    reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
    calls = [tool_call(part) for part in parts if isinstance(part, ToolCall)]
    message: dict[str, Any] = {
        "role": "assistant",
        "content": content if content or not calls else None,
    }
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message


def tool_call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments_json},
    }
