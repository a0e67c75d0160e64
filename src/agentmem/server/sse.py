"""Events on their way to a client that may be slow to be served, or gone."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any, Generic, Protocol, TypeVar, cast

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

FIRST_EVENT_WAIT = 2.0  # s; until then an error can still become an HTTP status
PING_INTERVAL = 5.0  # s between pings while a stream has nothing to say
PING = ": ping\n\n"  # a comment, which every client skips
DONE = "data: [DONE]\n\n"  # the end of a stream of OpenAI's

T = TypeVar("T")


def event_lines(payload: dict[str, Any], name: str = "") -> str:
    """Return a server-sent event, with its name where it has one."""
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"))
    return f"event: {name}\ndata: {text}\n\n" if name else f"data: {text}\n\n"


class Source(Protocol):
    """What a response is made from."""

    async def ready(self, timeout: float) -> None: ...

    async def aclose(self) -> None: ...


class Events(Generic[T]):
    """Reads an iterator with timeouts that lose no event, and closes it promptly from outside."""

    def __init__(self, events: AsyncIterator[T]):
        self._events = cast(AsyncGenerator[T, None], events)
        self._pull: asyncio.Task[T] | None = None

    async def ready(self, timeout: float) -> None:
        """Wait for the next event, for `timeout` seconds at most, and leave it to `next`.

        Raises what the iterator raises instead.
        """
        pull = await self._wait(timeout)
        if pull is not None:
            pull.result()

    async def next(self, timeout: float | None = None) -> T | None:
        """Return the next event, or None where `timeout` seconds passed without one.

        Raises what the iterator raises, StopAsyncIteration at its end.
        """
        pull = await self._wait(timeout)
        if pull is None:
            return None
        self._pull = None
        return pull.result()

    async def aclose(self) -> None:
        """Close the iterator, also where it is being waited for."""
        if self._pull is not None:
            self._pull.cancel()
            await asyncio.gather(self._pull, return_exceptions=True)
        await self._events.aclose()

    async def _wait(self, timeout: float | None) -> asyncio.Task[T] | None:
        if self._pull is None:
            self._pull = asyncio.create_task(self._next())
        done, _ = await asyncio.wait({self._pull}, timeout=timeout)
        return self._pull if done else None

    async def _next(self) -> T:
        return await anext(self._events)


async def merge(sources: Sequence[AsyncIterator[T]], at_once: int) -> AsyncIterator[tuple[int, T]]:
    """Yield what comes of several iterators, with the index of each, as it comes.

    `at_once` of them are read at a time, the first ones first. Raises the first error of any.
    """
    told = asyncio.Queue[tuple[int, T] | Exception | None]()  # None: one is at its end
    reading = asyncio.Semaphore(at_once)

    async def read(index: int, source: AsyncIterator[T]) -> None:
        try:
            async with reading:
                async for item in source:
                    told.put_nowait((index, item))
            told.put_nowait(None)
        except Exception as e:
            told.put_nowait(e)

    tasks = [asyncio.create_task(read(i, source)) for i, source in enumerate(sources)]
    try:
        num_open = len(tasks)
        while num_open:
            item = await told.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def whole(request: Request, work: Coroutine[Any, Any, T], *sources: Source) -> T:
    """Return what comes of `work`, which ends when the client goes away; then close the sources."""
    async with AsyncExitStack() as closing:
        for source in sources:
            closing.push_async_callback(source.aclose)
        return await _unless_disconnected(request, work)


async def stream(
    request: Request,
    lines: AsyncIterator[str],
    *sources: Source,
    media_type: str = "text/event-stream",
) -> "EventStream":
    """Return the response of these lines, once the first source has an event.

    An error until then is raised, and so becomes an HTTP status. It takes FIRST_EVENT_WAIT seconds
    at most.
    """
    async with AsyncExitStack() as closing:
        for source in sources:
            closing.push_async_callback(source.aclose)
        if sources:
            await _unless_disconnected(request, sources[0].ready(FIRST_EVENT_WAIT))
        closing.pop_all()  # from here on the response closes them
    return EventStream(lines, *sources, media_type=media_type)


class EventStream(StreamingResponse):
    """Lines as they come. Whatever ends the response, its sources are closed before it returns."""

    def __init__(self, lines: AsyncIterator[str], *sources: Source, media_type: str):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(lines, headers=headers, media_type=media_type)
        self._sources = sources

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with AsyncExitStack() as closing:
            for source in self._sources:
                closing.push_async_callback(source.aclose)
            await super().__call__(scope, receive, send)


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what comes of `work`. Where the client goes away, cancel it: ClientDisconnect."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
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
