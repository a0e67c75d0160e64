"""An engine in the benchmark's own process: no HTTP, no second copy of the model."""

import asyncio
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ...agent_key import AgentKey
from ...config import Settings
from ...engine.api import Finished, GenerateRequest, RequestStats, SamplingParams

if TYPE_CHECKING:
    from ...engine.engine import Engine
    from ...models.loading import LoadedModel

NAMESPACE = "default"
T = TypeVar("T")


@contextmanager
def running_engine(
    settings: Settings, loaded: "LoadedModel"
) -> Iterator[tuple["Engine", "RunCoroutine"]]:
    """Start an engine; give it and what runs a coroutine, and stop it in the end.

    All run on one event loop, which is there until the engine, which calls it, has stopped.
    """
    from ...engine.engine import Engine

    engine = Engine(settings, lambda: loaded)
    with asyncio.Runner() as runner:
        try:
            engine.start()
            yield engine, runner.run
        finally:
            runner.run(_stop(engine))


async def _stop(engine: "Engine") -> None:
    """Stop the engine; whatever an interruption left asking is cancelled first."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    await engine.stop()


def key_of(agent: str) -> AgentKey:
    """Return what the engine knows a benchmark's agent by."""
    return AgentKey(NAMESPACE, agent)


class RunCoroutine(Protocol):
    def __call__(self, todo: Coroutine[Any, Any, T], /) -> T: ...


@dataclass(frozen=True)
class Reply:
    text: str
    stats: RequestStats
    times: list[float]  # of perf_counter(), at each piece of text


async def ask_engine(
    engine: "Engine", agent: str, prompt: list[int], max_tokens: int = 1, **params: Any
) -> Reply:
    """Return an answer of exactly `max_tokens`.

    It is greedy, unless `params` (of SamplingParams) say otherwise.
    """
    params = {"temperature": 0.0, "ignore_eos": True} | params
    sampling = SamplingParams(max_tokens, **params)
    request = GenerateRequest(key_of(agent), prompt, sampling)
    text = ""
    times: list[float] = []
    async for event in engine.generate(request):
        if isinstance(event, Finished):
            return Reply(text, event.stats, times)
        text += event.text
        times.append(time.perf_counter())
    raise AssertionError("the stream ended without Finished")
