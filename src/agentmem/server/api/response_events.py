"""A Responses answer as it grows: its output items, and the events that tell of each change."""

import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

from ...chat.answer_parser import AnswerPart, Reasoning
from ...chat.messages import ToolCall
from ...errors import AgentMemError, Busy
from ..sse import event_lines
from .response_tools import OfferedTools

# kinds of text: the prefix of the item's id, the type of its part, the name of its events
_KINDS = {
    "reasoning": ("rs", "reasoning_text", "reasoning_text"),
    "message": ("msg", "output_text", "output_text"),
}
# kinds of call: the prefix of the item's id, and the field with what is given to the tool
_CALLS = {"function_call": ("fc", "arguments"), "custom_tool_call": ("ctc", "input")}


_ITEM_ID = re.compile(r"[a-z]+_([0-9a-f]{32})([0-9a-f]{2,4})")


def place_of(item_id: Any) -> tuple[str, int] | None:
    """Return the id of the response that an output item is of, and its place there."""
    found = _ITEM_ID.fullmatch(item_id) if isinstance(item_id, str) else None
    return (f"resp_{found[1]}", int(found[2], 16)) if found else None


class GrowingResponse:
    """A response and its events, which the methods return ready to be sent."""

    def __init__(self, response: dict[str, Any], tools: OfferedTools):
        """`response`: the answer's object, but for status and output; `tools` may be called."""
        self._tools = tools
        self.body = {**response, "status": "in_progress", "output": [], "usage": None}
        self._number = -1
        self._open: dict[str, Any] | None = None  # the item that grows
        self._kind = ""

    def begin(self) -> Iterator[str]:
        """Yield what comes before any part."""
        for name in ("created", "in_progress"):
            yield self._event(name, response=self.body)

    def add(self, part: AnswerPart, logprobs: Sequence[dict[str, Any]] = ()) -> Iterator[str]:
        """Go on by a part; `logprobs`: of the tokens of a content, where they are asked for."""
        if isinstance(part, ToolCall):
            yield from self._close()
            yield from self._call(part)
            return
        kind = "reasoning" if isinstance(part, Reasoning) else "message"
        if self._open is None or kind != self._kind:
            yield from self._close()
            yield from self._begin_text(kind)
        assert self._open is not None
        self._open["content"][0]["text"] += part.text
        told = {}
        if kind == "message":
            self._open["content"][0]["logprobs"] += logprobs
            told["logprobs"] = list(logprobs)
        yield self._event(f"{_KINDS[kind][2]}.delta", **self._place, delta=part.text, **told)

    def finish(self, *, cut: bool, usage: dict[str, Any]) -> Iterator[str]:
        """End the last item, which is whole or `cut`; the last event is left to `end`."""
        status = "incomplete" if cut else "completed"
        yield from self._close(status)
        self.body |= {"status": status, "usage": usage}
        if cut:
            self.body["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self.body["completed_at"] = time.time()

    def end(self) -> str:
        """Return the last event."""
        return self._event(self.body["status"], response=self.body)

    def fail(self, error: AgentMemError) -> str:
        """Return the last event of a response that failed."""
        code = "server_error"
        if isinstance(error, Busy) and error.status == 429:
            code = "rate_limit_exceeded"
        if error.code == "context_length_exceeded":
            code = error.code
        self.body |= {"status": "failed", "error": {"code": code, "message": error.message}}
        return self._event("failed", response=self.body)

    def _begin_text(self, kind: str) -> Iterator[str]:
        prefix, part_type, _ = _KINDS[kind]
        item: dict[str, Any] = {
            "id": self._id(prefix),
            "type": kind,
            "status": "in_progress",
            "content": [],
        }
        part: dict[str, Any] = {"type": part_type, "text": ""}
        if kind == "reasoning":
            item["summary"] = []
        else:
            item["role"] = "assistant"
            part |= {"annotations": [], "logprobs": []}
        self.body["output"].append(item)
        self._open = item
        self._kind = kind
        yield self._event("output_item.added", output_index=self._index, item=item)
        item["content"].append(part)
        yield self._event("content_part.added", **self._place, part=part)

    def _close(self, status: str = "completed") -> Iterator[str]:
        if self._open is None:
            return
        item = self._open
        name = _KINDS[self._kind][2]
        part = item["content"][0]
        told = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
        yield self._event(f"{name}.done", **self._place, text=part["text"], **told)
        yield self._event("content_part.done", **self._place, part=part)
        item["status"] = status
        yield self._event("output_item.done", output_index=self._index, item=item)
        self._open = None

    def _call(self, call: ToolCall) -> Iterator[str]:
        whole = self._tools.called(call.name).item(call)
        kind = whole["type"]
        prefix, given = _CALLS[kind]
        item = {
            "id": self._id(prefix),
            "status": "in_progress",
            "call_id": call.id,
            **whole,
            given: "",
        }
        self.body["output"].append(item)
        place = {"output_index": self._index, "item_id": item["id"]}
        yield self._event("output_item.added", output_index=self._index, item=item)
        item |= {given: whole[given], "status": "completed"}
        yield self._event(f"{kind}_{given}.delta", **place, delta=whole[given])
        done = {given: whole[given]}
        if kind == "function_call":
            done["name"] = whole["name"]
        yield self._event(f"{kind}_{given}.done", **place, **done)
        yield self._event("output_item.done", output_index=self._index, item=item)

    @property
    def _index(self) -> int:
        return len(self.body["output"]) - 1

    @property
    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": self._index, "content_index": 0}

    def _id(self, prefix: str) -> str:
        """Return the id of the next item; `place_of` reads it."""
        return f"{prefix}_{self.body['id'].removeprefix('resp_')}{len(self.body['output']):02x}"

    def _event(self, event: str, /, **fields: Any) -> str:
        self._number += 1
        payload = {"type": f"response.{event}", "sequence_number": self._number, **fields}
        return event_lines(payload, f"response.{event}")
