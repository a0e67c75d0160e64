"""AnswerEvents: what the engine tells of one answer, on the event loop."""

import asyncio
from collections.abc import Callable

from ..errors import AgentMemError
from .api import Finished, GenerateRequest, TextDelta
from .sequence import Event, Sequence


class AnswerEvents:
    """An asynchronous iterator over an answer, the last item of which is Finished.

    The first one that is read, of several answers to one prompt, begins them all. Closing it, or
    cancelling whoever waits for it, cancels its answer within one token.
    """

    def __init__(
        self, request: GenerateRequest, begin: Callable[[], None], wake: Callable[[], None]
    ):
        """`begin` begins the answer if it is not begun yet; `wake` has the engine look around."""
        self.sequence = Sequence(request, emit=self._tell, tokens=list(request.tokens))
        self.loop: asyncio.AbstractEventLoop | None = None  # that reads it, once it is begun
        self._begin = begin
        self._wake = wake
        self._events = asyncio.Queue[Event]()
        self._is_over = False

    def _tell(self, event: Event) -> None:
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self._events.put_nowait, event)

    def __aiter__(self) -> "AnswerEvents":
        return self

    async def __anext__(self) -> TextDelta | Finished:
        """Return the next event.

        Raises ContextLengthExceeded, Busy, ShuttingDown and EngineFailed, at first or mid-stream.
        """
        if self._is_over:
            raise StopAsyncIteration
        try:
            self._begin()
            event = await self._events.get()
            if isinstance(event, AgentMemError):
                raise event
        except BaseException:
            await self.aclose()
            raise
        if isinstance(event, Finished):
            self._is_over = True
        return event

    async def aclose(self) -> None:
        """End it, and cancel the answer if it still comes."""
        if not self._is_over:
            self._is_over = True
            self.sequence.cancelled = True  # seen before the next token
            self._wake()
