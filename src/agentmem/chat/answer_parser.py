"""An answer's text, as it comes, told apart: reasoning, content, tool calls. Of no wire format."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .markup import Edges, Markup, State
from .messages import ToolCall

# spans of an answer that are no calls, and are read again as text; then no more are looked for
_MAX_UNREAD = 100


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class Content:
    text: str
    # where it ends in all that the model wrote, markup and the rest included, in characters
    end: int = field(default=0, compare=False)


AnswerPart = Reasoning | Content | ToolCall


def message_of(parts: Sequence[AnswerPart]) -> dict[str, Any]:
    """Return the message that parts are together, in the shape of OpenAI's chat API."""
    content = "".join(part.text for part in parts if isinstance(part, Content))
    reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
    calls = [_called(part) for part in parts if isinstance(part, ToolCall)]
    message: dict[str, Any] = {
        "role": "assistant",
        "content": content if content or not calls else None,
    }
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message


def _called(call: ToolCall) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments_json},
    }


class AnswerParser:
    """Reads one answer.

    Reasoning begins only before anything else is said: a model that writes about <think> does not
    think. Line breaks around reasoning and before tool calls are the template's, not part of a
    text. What looks like a tool call and can't be read as one is content. No text is lost but what
    marks the parts.
    """

    def __init__(
        self,
        markup: Markup,
        tools: list[dict[str, Any]],
        *,
        in_reasoning: bool = False,
        max_calls: int = 0,
    ):
        """`tools` are those that may be called; with none, no calls are looked for.

        `in_reasoning`: the prompt ends in it. `max_calls`: further ones are left out; 0: there is
        no limit.
        """
        self._markup = markup
        self._tools = tools
        self._max_calls = max_calls
        self._edges = markup.edges if tools else _without_calls(markup.edges)
        self._state: State = "reasoning" if in_reasoning else markup.initial
        self._before: State = self._state  # the tool call that is being read
        self._texts = {"reasoning": _Trimmed(skip=True), "content": _Trimmed(skip=False)}
        self._header = self._raw = ""  # before a part; of a tool call: its marker
        self._call: list[str] = []  # and what follows that
        self._held = ""  # that may be the beginning of a marker
        self._num_fed = 0  # characters, those that are held included
        self._parts: list[AnswerPart] = []
        self.num_calls = self._num_unread = 0

    @property
    def in_reasoning(self) -> bool:
        """Whether what comes next is reasoning, as far as is known."""
        return self._state == "reasoning"

    def feed(self, text: str) -> list[AnswerPart]:
        """Go on with this text; return what is known of the answer by now."""
        self._held += text
        self._num_fed += len(text)
        self._advance()
        return self._take()

    def finish(self, *, cut: bool = False) -> list[AnswerPart]:
        """Return what was held back. `cut`: the answer ended before the model ended it."""
        self._flush()
        while self._state == "tool":
            self._close_call("", readable=not (cut and self._edges.get("tool")))
            self._advance()
            self._flush()
        if self._state == "header":
            self._state = "content"
            self._say(self._header, self._num_fed)
        for kind, trimmed in self._texts.items():
            self._add(kind, trimmed.end(), self._num_fed)
        return self._take()

    def _advance(self) -> None:
        while (found := self._next_marker()) is not None:
            at, marker, state = found
            before = self._held[:at]
            self._say(before, self._num_fed - len(self._held) + at)
            self._held = self._held[at + len(marker) :]
            self._enter(state, marker)
        safe = len(self._held) - self._partial()
        before = self._held[:safe]
        self._held = self._held[safe:]
        self._say(before, self._num_fed - len(self._held))

    def _flush(self) -> None:
        """Say what is held: it is no marker."""
        self._say(self._held, self._num_fed)
        self._held = ""

    def _next_marker(self) -> tuple[int, str, State] | None:
        """Return the first marker in what is held: its place, its text and the next state.

        Of those that begin there it is the longest.
        """
        first: tuple[int, str, State] | None = None
        for text, state in self._edges.get(self._state, ()):
            at = self._held.find(text)
            if at >= 0 and (first is None or (at, -len(text)) < (first[0], -len(first[1]))):
                first = at, text, state
        before = first[0] if first else len(self._held) - self._partial()
        if self._state == "start" and self._held[:before].strip():
            self._state = "content"
            return self._next_marker()
        return first

    def _partial(self) -> int:
        """Count the characters at the end of what is held that may begin a marker."""
        markers = tuple(text for text, _ in self._edges.get(self._state, ()))
        longest = min(max(map(len, markers), default=1) - 1, len(self._held))
        for size in range(longest, 0, -1):
            end = self._held[-size:]
            if any(marker.startswith(end) for marker in markers):
                return size
        return 0

    def _say(self, text: str, end: int) -> None:
        """Go on with `text`, which ends at `end` of all that was fed."""
        if self._state == "tool":
            self._call.append(text)
        elif self._state == "header":
            self._header += text
        else:
            kind = "reasoning" if self._state == "reasoning" else "content"
            may_end = bool(self._edges.get(self._state))
            said = self._texts[kind].feed(text, hold=may_end)
            self._add(kind, said, end - self._texts[kind].num_held)

    def _enter(self, state: State, marker: str) -> None:
        if self._state == "tool":
            return self._close_call(marker, then=state)
        if state == "tool":
            self._before = self._state
            self._raw = self._header + marker
            self._call = []
        elif self._state == "reasoning" or state == "reasoning":
            for trimmed in self._texts.values():
                trimmed.drop()
        self._state = state
        self._header = ""

    def _close_call(self, marker: str, *, then: State = "start", readable: bool = True) -> None:
        """Add the call as a part.

        One that can't be read is text: what follows its first marker is looked at again.
        """
        call = "".join(self._call)
        try:
            if not readable:
                raise ValueError("cut")
            calls = self._markup.tool_calls(call, self._tools)
        except ValueError:
            self._state = "content" if self._before in ("start", "header") else self._before
            self._held = call + marker + self._held
            self._say(self._raw, self._num_fed - len(self._held))
            self._num_unread += 1
            if self._num_unread == _MAX_UNREAD:  # a model that says <tool_call> over and over
                self._edges = _without_calls(self._edges)
            return
        for trimmed in self._texts.values():
            trimmed.drop()
        room = self._max_calls - self.num_calls if self._max_calls else len(calls)
        self._parts += calls[:room]
        self.num_calls += len(calls[:room])
        self._state = "header" if "header" in (then, self._before) else self._before

    def _add(self, kind: str, text: str, end: int) -> None:
        if text:
            self._parts.append(Reasoning(text) if kind == "reasoning" else Content(text, end))

    def _take(self) -> list[AnswerPart]:
        parts = self._parts
        self._parts = []
        return parts


def _without_calls(edges: Edges) -> Edges:
    left: dict[State, tuple[tuple[str, State], ...]] = {}
    for state, pairs in edges.items():
        left[state] = tuple((text, to) for text, to in pairs if to != "tool")
    return left


class _Trimmed:
    """A text without line breaks at its beginning, if so wanted.

    Blanks at its end wait until it goes on.
    """

    def __init__(self, *, skip: bool):
        self._skip = skip
        self._blank = ""

    @property
    def num_held(self) -> int:
        """How many blanks wait."""
        return len(self._blank)

    def feed(self, text: str, *, hold: bool) -> str:
        text = self._blank + text
        if self._skip:
            text = text.lstrip("\n")
        said = text.rstrip() if hold else text
        self._blank = text[len(said) :]
        self._skip = self._skip and not said
        return said

    def drop(self) -> None:
        """Drop the blanks around this place: they belong to what stands here."""
        self._blank = ""
        self._skip = True

    def end(self) -> str:
        blank = "" if self._skip else self._blank
        self._blank = ""
        return blank
