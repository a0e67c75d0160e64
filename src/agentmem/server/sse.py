"""An answer's events on their way to a client that may be slow to be served, or gone."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any, Protocol, TypeVar, cast

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..engine.api import Finished, TextDelta

T = TypeVar("T")
Event = TextDelta | Finished


class Events:
    """The engine's iterator, read with a timeout that doesn't lose the event, and closed promptly
    from outside.
    """

    def __init__(self, events: AsyncIterator[Event]):
        self._events = cast(AsyncGenerator[Event, None], events)
        self._pull: asyncio.Task[Event] | None = None

    async def next(self, timeout: float | None = None) -> Event | None:
        """The next event, or None where `timeout` seconds passed without one. Raises what the
        engine raises.
        """
        if self._pull is None:
            self._pull = asyncio.create_task(self._next())
        done, _ = await asyncio.wait({self._pull}, timeout=timeout)
        if not done:
            return None
        pull, self._pull = self._pull, None
        return pull.result()

    async def _next(self) -> Event:
        return await anext(self._events)

    async def aclose(self) -> None:
        """Cancel the sequence, also where the engine is being waited for."""
        if self._pull is not None:
            self._pull.cancel()
            await asyncio.gather(self._pull, return_exceptions=True)
        await self._events.aclose()


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away; ClientDisconnect is
    raised then.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect()
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Closable(Protocol):
    async def aclose(self) -> None: ...


class EventStream(StreamingResponse):
    """Server-sent events. Whatever ends the response, what they come from is closed before it
    returns.
    """

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[str], events: Closable):
        super().__init__(content, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
