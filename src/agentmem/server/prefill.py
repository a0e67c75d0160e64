"""Requests that fill the cache and answer nothing: as one JSON object, or as a stream of how far
they are.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, Response

from ..engine.api import EngineAPI, Finished, GenerateRequest
from ..errors import AgentMemError
from .api.wire import error_body
from .sse import EventStream, unless_disconnected

_FIRST_WAIT = 2.0  # s; until then an error can still become an HTTP status
_PING_INTERVAL = 5.0  # s between comments while there is nothing to say
_FIGURES = (
    "prompt_tokens",
    "cache",
    "cached_tokens",
    "restored_bytes",
    "restore_ms",
    "prefill_ms",
    "queue_ms",
)

OnProgress = Callable[[int, int], None]  # tokens done, and in all; from any thread
Work = Callable[[OnProgress | None], Awaitable[dict[str, Any]]]


async def prefill(
    engine: EngineAPI, generate: GenerateRequest, on_progress: OnProgress | None
) -> dict[str, Any]:
    """What it cost."""
    async for event in engine.generate(replace(generate, on_progress=on_progress)):
        if isinstance(event, Finished):
            return {
                "agent_id": generate.agent.agent_id,
                **{name: getattr(event.stats, name) for name in _FIGURES},
            }
    raise AssertionError("a request ends with Finished")


async def answer(request: Request, work: Work, *, stream: bool) -> Response:
    """The result of `work`, which ends if the client goes away.

    As a stream: events "progress" {"tokens", "total"}, then one "done" with the result, or an
    error.
    """
    if not stream:
        return JSONResponse(await unless_disconnected(request, _call(work)))
    run = _Run(work)
    try:
        first = await unless_disconnected(request, run.next(_FIRST_WAIT))
    except BaseException:
        await run.aclose()
        raise
    return EventStream(run.events(first), run)


async def _call(work: Work) -> dict[str, Any]:
    return await work(None)


class _Run:
    """A task, and the queue of what it tells."""

    def __init__(self, work: Work):
        loop, self._told = asyncio.get_running_loop(), asyncio.Queue[str | None]()

        def on_progress(tokens: int, total: int) -> None:
            event = _event("progress", {"tokens": tokens, "total": total})
            loop.call_soon_threadsafe(self._told.put_nowait, event)

        async def run() -> dict[str, Any]:
            return await work(on_progress)

        self._task = asyncio.create_task(run())
        self._task.add_done_callback(lambda _: self._told.put_nowait(None))

    async def next(self, timeout: float) -> str:
        """An event, a ping, or, at the end, nothing. Raises what the work raises."""
        try:
            event = await asyncio.wait_for(self._told.get(), timeout)
        except TimeoutError:
            return ": ping\n\n"
        if event is None:
            self._task.result()
        return event or ""

    async def events(self, event: str) -> AsyncIterator[str]:
        try:
            while event:
                yield event
                event = await self.next(_PING_INTERVAL)
            yield _event("done", self._task.result())
        except AgentMemError as e:
            yield _event("error", error_body(e.message, type=e.type, param=e.param, code=e.code))

    async def aclose(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
