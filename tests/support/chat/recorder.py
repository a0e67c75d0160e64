"""Builds a conversation the way a chat client does: it keeps the messages, and sends them all with
each request.
"""

import json
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

from support.chat.answers import Answer, Call

Message = dict[str, Any]
Back = Literal["text", "reasoning_content", "inline"]  # what a client keeps of an answer's thoughts


@dataclass(frozen=True)
class Request:
    """What a client sends, and what the model answers. `today` is the server's date, YYYY-MM-DD."""

    messages: list[Message]
    answer: Answer
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    today: str = "2026-11-20"


def message_of(
    answer: Answer, back: Back = "text", arguments: Literal["string", "object"] = "string"
) -> Message:
    """The answer as it comes back in later requests."""
    from_model: Message = {"role": "assistant", "content": answer.text}
    if answer.reasoning and back == "inline":
        from_model["content"] = f"<think>\n{answer.reasoning}\n</think>\n\n{answer.text}"
    elif answer.reasoning and back == "reasoning_content":
        from_model["reasoning_content"] = answer.reasoning
    if answer.calls:
        from_model["content"] = answer.text or None
        from_model["tool_calls"] = [_call(call, arguments == "object") for call in answer.calls]
    return from_model


def _call(call: Call, as_object: bool) -> dict[str, Any]:
    arguments = json.loads(call.arguments) if as_object else call.arguments
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }


class Recorder:
    def __init__(
        self, system: Any = None, role: str = "system", back: Back = "text", **options: Any
    ):
        """`options` are Request's (tools, template_kwargs), and hold for all requests."""
        self.messages: list[Message] = [] if system is None else [{"role": role, "content": system}]
        self.requests: list[Request] = []
        self.back, self.options = back, options

    def ask(self, content: Any, answer: Answer | str, **options: Any) -> "Recorder":
        """A user's message and its answer, which stays in the history."""
        self.messages.append({"role": "user", "content": content})
        return self.send(answer, **options)

    def send(self, answer: Answer | str, arguments: Any = "string", **options: Any) -> "Recorder":
        answer = Answer(answer) if isinstance(answer, str) else answer
        self.requests.append(
            Request(deepcopy(self.messages), answer, **{**self.options, **options})
        )
        self.messages.append(message_of(answer, self.back, arguments))
        return self

    def result(self, content: Any, id: str = "call00001") -> "Recorder":
        """A tool's result, which goes out with the next send()."""
        self.messages.append({"role": "tool", "tool_call_id": id, "content": content})
        return self

    def cut(self, messages: int) -> "Recorder":
        """Takes the last messages away: an edit or a new try follows."""
        del self.messages[-messages:]
        return self
