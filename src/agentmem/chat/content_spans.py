"""Which of the text that a model writes is content: stop strings count there, and nowhere else."""

from .markup import Edges, Markup, State


class ContentSpans:
    """Tells content from reasoning and calls, as the text comes.

    What may be the beginning of a marker waits until it is known. Calls that turn out to be none
    are not content here.
    """

    def __init__(self, markup: Markup, *, in_reasoning: bool, has_tools: bool):
        """`in_reasoning`: the answer begins in it; `has_tools`: calls are looked for."""
        self._edges: Edges = markup.edges
        self._has_tools = has_tools
        self._state: State = "reasoning" if in_reasoning else markup.initial
        self._thinks = any(to == "reasoning" for _, to in markup.edges.get("start", ()))
        self._held = ""

    def feed(self, text: str) -> list[tuple[bool, str]]:
        """Return the text that is known by now in spans, and of each whether it is content."""
        self._held += text
        spans: list[tuple[bool, str]] = []
        while (found := self._next_marker()) is not None:
            at, marker, state = found
            self._take(at, spans)
            spans.append((False, marker))
            self._held = self._held[len(marker) :]
            self._state = state
        self._take(len(self._held) - self._num_waiting(), spans)
        return spans

    def finish(self) -> list[tuple[bool, str]]:
        """Return what has waited: it is no marker."""
        spans: list[tuple[bool, str]] = []
        self._take(len(self._held), spans)
        return spans

    def _take(self, size: int, spans: list[tuple[bool, str]]) -> None:
        text = self._held[:size]
        self._held = self._held[size:]
        if not text:
            return
        blank = len(text) - len(text.lstrip())
        if self._state == "start" and self._thinks and blank:
            spans.append((False, text[:blank]))  # the template's, around the reasoning
            text = text[blank:]
        if self._state == "start" and text:
            self._state = "content"
        if text:
            spans.append((self._state == "content", text))

    def _markers(self) -> list[tuple[str, State]]:
        edges = self._edges.get(self._state, ())
        return [(text, to) for text, to in edges if self._has_tools or to != "tool"]

    def _next_marker(self) -> tuple[int, str, State] | None:
        """Return the first marker in what waits, of those that begin there the longest."""
        found = [
            (at, -len(text), text, state)
            for text, state in self._markers()
            if (at := self._held.find(text)) >= 0
        ]
        if not found:
            return None
        at, _, text, state = min(found)
        if self._state == "start" and self._held[:at].strip():
            self._state = "content"
            return self._next_marker()
        return at, text, state

    def _num_waiting(self) -> int:
        """Count the characters at the end that may begin a marker."""
        markers = [text for text, _ in self._markers()]
        longest = min(max(map(len, markers), default=1) - 1, len(self._held))
        for size in range(longest, 0, -1):
            if any(marker.startswith(self._held[-size:]) for marker in markers):
                return size
        return 0
