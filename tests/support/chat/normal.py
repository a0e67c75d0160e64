"""Messages as chat clients send them -> as templates take them: contents are strings, arguments are
objects.
"""

import json
from typing import Any

# Claude Code's: another text each turn, and nothing a model should read
BILLING = "x-anthropic-billing-header:"


def normalise(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parts are joined by a newline, null is "", a `developer` is the system; an empty system
    message is dropped.
    """
    return [m for m in map(_message, messages) if m["role"] != "system" or m["content"]]


def _message(message: dict[str, Any]) -> dict[str, Any]:
    role = "system" if message["role"] == "developer" else message["role"]
    kept = {
        k: message[k]
        for k in ("reasoning_content", "tool_call_id", "name")
        if message.get(k) is not None
    }
    calls = [_call(call) for call in message.get("tool_calls") or []]
    return (
        {"role": role, "content": _text(message.get("content"))}
        | kept
        | ({"tool_calls": calls} if calls else {})
    )


def _text(content: str | list[dict[str, Any]] | None) -> str:
    if isinstance(content, list):
        texts = [part["text"] for part in content]
        return "\n".join(text for text in texts if not text.startswith(BILLING))
    return content or ""


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    given = function["arguments"]
    arguments = json.loads(given) if isinstance(given, str) else given
    return {
        "id": call["id"],
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }
