"""A message of the assistant's as it grows: its blocks, and the events that tell of each change."""

import uuid
from collections.abc import Iterator
from typing import Any

from ...chat.answer_parser import AnswerPart, Reasoning
from ...chat.messages import ToolCall
from ...engine.api import Finished
from ..sse import event_lines

SIGNATURE = "agentmem"  # of thinking: clients send it back, and nothing here checks it
PING = 'event: ping\ndata: {"type":"ping"}\n\n'


class GrowingMessage:
    """An answer as it grows. Its methods return the events, ready to be sent."""

    def __init__(self, model: str, prompt_tokens: int, *, max_tokens: int, marks_cache: bool):
        """`prompt_tokens`: how many of them are cached is known at the end only."""
        self._max_tokens = max_tokens
        self._marks_cache = marks_cache
        self._num_calls = 0
        self._has_begun = False
        self._is_open = False  # whether the last block still grows
        self.body: dict[str, Any] = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(prompt_tokens, 0, 0, marks_cache=marks_cache),
        }

    def begin(self) -> Iterator[str]:
        """Yield what comes before all else, at the first call only."""
        if not self._has_begun:
            self._has_begun = True
            yield _event("message_start", message=self.body)
            yield PING

    def ping(self) -> Iterator[str]:
        """Yield a sign of life, which clients expect after the beginning only."""
        if not self._has_begun:
            yield from self.begin()
        else:
            yield PING

    def add(self, part: AnswerPart) -> Iterator[str]:
        if isinstance(part, ToolCall):
            yield from self._close()
            yield from self._tool_use(part)
            return
        kind = "thinking" if isinstance(part, Reasoning) else "text"
        if not self._is_open or self._block["type"] != kind:
            yield from self._close()
            more = {"signature": ""} if kind == "thinking" else {}
            yield self._open({"type": kind, kind: "", **more})
        self._block[kind] += part.text
        yield self._delta(f"{kind}_delta", kind, part.text)

    def finish(self, event: Finished, agentmem: dict[str, Any]) -> Iterator[str]:
        """`agentmem`: what the answer cost, in this server's own words."""
        yield from self._close()
        stats = event.stats
        usage = _usage(
            stats.prompt_tokens,
            stats.cached_tokens,
            stats.completion_tokens,
            marks_cache=self._marks_cache,
        )
        why = {"stop_reason": self._stop_reason(event), "stop_sequence": event.stop_string}
        self.body |= {**why, "usage": usage, "agentmem": agentmem}
        yield _event("message_delta", delta=why, usage=usage, agentmem=agentmem)
        yield _event("message_stop")

    def _stop_reason(self, event: Finished) -> str:
        if event.stop_string is not None:
            return "stop_sequence"
        if event.reason == "length":
            is_full = event.stats.completion_tokens < self._max_tokens
            return "model_context_window_exceeded" if is_full else "max_tokens"
        return "tool_use" if self._num_calls else "end_turn"

    @property
    def _block(self) -> dict[str, Any]:
        block: dict[str, Any] = self.body["content"][-1]
        return block

    def _open(self, block: dict[str, Any]) -> str:
        self.body["content"].append(block)
        self._is_open = True
        index = len(self.body["content"]) - 1
        return _event("content_block_start", index=index, content_block=block)

    def _delta(self, kind: str, name: str, value: str) -> str:
        index = len(self.body["content"]) - 1
        return _event("content_block_delta", index=index, delta={"type": kind, name: value})

    def _close(self) -> Iterator[str]:
        if not self._is_open:
            return
        if self._block["type"] == "thinking":
            self._block["signature"] = SIGNATURE
            yield self._delta("signature_delta", "signature", SIGNATURE)
        self._is_open = False
        yield _event("content_block_stop", index=len(self.body["content"]) - 1)

    def _tool_use(self, call: ToolCall) -> Iterator[str]:
        self._num_calls += 1
        yield self._open({"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
        self._block["input"] = call.arguments
        yield self._delta("input_json_delta", "partial_json", call.arguments_json)
        yield from self._close()


def _usage(
    prompt_tokens: int, cached_tokens: int, output_tokens: int, *, marks_cache: bool
) -> dict[str, int]:
    """Return Anthropic's usage, whose three kinds of input tokens add up to the prompt.

    Every prompt is cached here. Tokens count as written only to clients that say where to cache;
    to others they are plain input, as Anthropic counts them.
    """
    new = prompt_tokens - cached_tokens
    return {
        "input_tokens": 0 if marks_cache else new,
        "cache_creation_input_tokens": new if marks_cache else 0,
        "cache_read_input_tokens": cached_tokens,
        "output_tokens": output_tokens,
    }


def _event(event: str, /, **fields: Any) -> str:
    return event_lines({"type": event, **fields}, event)
