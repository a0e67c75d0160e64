"""Requests that fill the cache and answer nothing.

Their response is one JSON object, or a stream that tells how far they are.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, Response

from ..engine.api import Finished, GenerateRequest
from ..engine.engine import Engine
from ..errors import AgentMemError
from . import sse
from .errors import openai_error
from .rate_limits import spend
from .sse import Events, event_lines

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
PrefillWork = Callable[[OnProgress | None], Awaitable[dict[str, Any]]]


@dataclass(frozen=True)
class Progress:
    tokens: int  # done
    total: int


async def prefill(
    engine: Engine, generate: GenerateRequest, on_progress: OnProgress | None
) -> dict[str, Any]:
    """Fill the cache, and return what it cost."""
    async for event in engine.generate(replace(generate, on_progress=on_progress)):
        if isinstance(event, Finished):
            spend(event.stats)
            figures = {name: getattr(event.stats, name) for name in _FIGURES}
            return {"agent_id": generate.agent.agent_id, **figures}
    raise AssertionError("a request ends with Finished")


async def respond(request: Request, work: PrefillWork, *, stream: bool) -> Response:
    """Return the result of `work`, which ends if the client goes away.

    As a stream: events "progress" {"tokens", "total"}, then one "done" with the result, or an
    error.
    """
    if not stream:
        return JSONResponse(await sse.whole(request, _call(work)))
    events = Events(_progress(work))
    return await sse.stream(request, _lines(events), events)


async def _call(work: PrefillWork) -> dict[str, Any]:
    return await work(None)


async def _progress(work: PrefillWork) -> AsyncIterator[Progress | dict[str, Any]]:
    """Yield how far the work is, and at last its result; stop it when closed."""
    loop = asyncio.get_running_loop()
    told = asyncio.Queue[Progress | None]()

    def on_progress(tokens: int, total: int) -> None:
        loop.call_soon_threadsafe(told.put_nowait, Progress(tokens, total))

    async def run() -> dict[str, Any]:
        return await work(on_progress)

    task = asyncio.create_task(run())
    task.add_done_callback(lambda _: told.put_nowait(None))
    try:
        while (progress := await told.get()) is not None:
            yield progress
        yield task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _lines(events: Events[Progress | dict[str, Any]]) -> AsyncIterator[str]:
    event = await events.next(timeout=0)
    try:
        while not isinstance(event, dict):
            if event is None:
                yield sse.PING
            else:
                progress = {"tokens": event.tokens, "total": event.total}
                yield event_lines(progress, "progress")
            event = await events.next(sse.PING_INTERVAL)
        yield event_lines(event, "done")
    except AgentMemError as e:
        yield event_lines(openai_error(e), "error")
