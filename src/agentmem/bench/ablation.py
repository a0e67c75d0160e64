"""Each component on, and off: what it is good for, on the same prompts, in turns, in one process.

persistence   the store is there after a restart, or empty
quantization  4 bits, or the model's own dtype
rotation      keys and values rotated by a Hadamard matrix before they become codes, or not
batching      four agents decode at once, or one after the other
splice        cached token ids are kept where the text agrees, or every prompt is tokenized anew
overlap       blocks are read while others decode, or while they wait
"""

import asyncio
import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Literal

import mlx.core as mx

from ..agent_key import AgentKey
from ..chat.messages import Message
from ..chat.renderer import ChatRenderer
from ..config import Settings
from ..engine.model_runner import ModelRunner
from ..kvcache.calibrate import calibration_tokens
from ..kvcache.quantize import CacheSpace
from ..models.loading import LoadedModel
from .in_process import NAMESPACE, Reply, ask_engine, running_engine
from .perplexity import production, score_windows
from .prompts import Prompts
from .result import Part, Result, Spread, spread
from .scores import Score, delta_percent
from .server import BenchError
from .session import Session
from .windows import Protocol, cut_windows

_BATCH, _ANSWER = 4, 32  # agents, tokens
_TURNS = 6
_HEAT = 1.5  # temperature of their answers
_SLEEPERS = 4  # agents that come back while one answers


class AblationRow(Part):
    component: str
    measure: str
    unit: str
    better: Literal["lower", "higher"]
    on: Spread
    off: Spread
    off_over_on: float | None  # of the medians; None where on is 0


class AblationResult(Result):
    benchmark: Literal["ablation"] = "ablation"
    context: int
    rows: list[AblationRow]


@dataclass(frozen=True)
class Bench:
    """What every component's measurement works with."""

    session: Session
    settings: Settings
    loaded: LoadedModel
    prompts: Prompts
    context: int

    def home(self, **changes: Any) -> Settings:
        """Settings on an empty directory."""
        for old in self.session.directory.iterdir():
            shutil.rmtree(old)
        return self.settings.model_copy(
            update={"home": self.session.directory / "engine"} | changes
        )


Samples = dict[str, float]  # "MEASURE": one measurement


def _check(reply: Reply, state: str) -> None:
    if reply.stats.cache != state:
        raise BenchError(f"{reply.stats.cache}, not {state}: is the disk full?")


def persistence(bench: Bench, on: bool) -> Samples:
    settings, prompt = bench.home(), bench.prompts.ids(bench.context)
    with running_engine(settings, bench.loaded) as (engine, run):
        run(ask_engine(engine, "agent", prompt))
    if not on:
        shutil.rmtree(settings.store_dir)
    with running_engine(settings, bench.loaded) as (engine, run):
        reply = run(ask_engine(engine, "agent", prompt))
    _check(reply, "warm" if on else "cold")
    return {"first token after a restart": reply.stats.ttft_ms}


def quantization(bench: Bench, on: bool) -> Samples:
    settings, prompt = bench.home(kv_bits="4" if on else "16"), bench.prompts.ids(bench.context)
    with running_engine(settings, bench.loaded) as (engine, run):
        run(ask_engine(engine, "agent", prompt))
        (agent,) = run(engine.agents(NAMESPACE))
    with running_engine(settings, bench.loaded) as (engine, run):
        reply = run(ask_engine(engine, "agent", prompt))
    _check(reply, "warm")
    return {
        "RAM of an agent at rest": agent.ram_bytes / 1e6,
        "first token after a restart": reply.stats.ttft_ms,
    }


class _Unrotated(CacheSpace):
    def _rotate(self, x: mx.array) -> mx.array:
        return x


def rotation(bench: Bench, on: bool) -> Samples:
    """Against 16 bits. Keys are centred, sinks and the unfinished block full, either way."""
    exact = ModelRunner(bench.loaded.model, kv_bits="16", block_size=bench.settings.block_size)
    coded = ModelRunner(bench.loaded.model, kv_bits="4", block_size=bench.settings.block_size)
    tokens = calibration_tokens(
        lambda text: bench.loaded.tokenizer.encode(text, add_special_tokens=False)
    )
    coded.use_centres(coded.calibrate(tokens), CacheSpace if on else _Unrotated)
    protocol = Protocol(bench.context, bench.context, bench.context)
    windows = cut_windows(bench.prompts.ids(bench.context + 1), protocol, [])
    begin = [production(exact), production(coded)]
    reference, scores = score_windows(begin, windows, bench.settings.block_size)
    total = sum(scores, Score())
    change, _ = delta_percent(reference, scores)
    return {"KL divergence from 16 bits": total.kl / total.tokens, "change of perplexity": change}


def batching(bench: Bench, on: bool) -> Samples:
    settings = bench.home(max_running=_BATCH if on else 1)
    prompts = [bench.prompts.ids(bench.context // _BATCH) for _ in range(_BATCH)]

    async def together(max_tokens: int) -> list[Reply]:
        asked = (
            ask_engine(engine, f"agent-{i}", prompt, max_tokens) for i, prompt in enumerate(prompts)
        )
        return await asyncio.gather(*asked)

    with running_engine(settings, bench.loaded) as (engine, run):
        run(together(1))
        began = time.perf_counter()
        replies = run(together(_ANSWER))
        took = time.perf_counter() - began
    for reply in replies:
        _check(reply, "hot")
    return {
        f"{_BATCH} answers at once": _BATCH * _ANSWER / took,
        f"first token of the last of {_BATCH}": max(reply.stats.ttft_ms for reply in replies),
    }


def splice(bench: Bench, on: bool) -> Samples:
    """Answers are sampled hot, so that some of their tokens are not those that a tokenizer makes of
    their text.
    """
    renderer = ChatRenderer(bench.loaded.tokenizer, bench.loaded.max_context)

    async def converse() -> int:
        messages: list[Message] = []
        held = lost = 0
        for turn in range(_TURNS):
            messages.append(Message("user", bench.prompts.text(32)))
            branches = engine.branch_tokens(AgentKey(NAMESPACE, "agent")) if on else ()
            tokens = await renderer.render(messages, branches)
            reply = await ask_engine(engine, "agent", tokens, _ANSWER, temperature=_HEAT, seed=turn)
            messages.append(Message("assistant", reply.text))
            lost += max(0, held - reply.stats.cached_tokens)
            held = reply.stats.prompt_tokens + reply.stats.completion_tokens - 1
        return lost

    with running_engine(bench.home(), bench.loaded) as (engine, run):
        return {f"tokens prefilled twice in {_TURNS} turns": run(converse())}


class _Blocking:
    """A store whose reads are over when they have begun."""

    def __init__(self, store: Any):
        self._store = store

    def read_block(self, *args: Any) -> "Future[Any]":
        return _over(self._store.read_block(*args))

    def read_tail(self, *args: Any) -> "Future[Any]":
        return _over(self._store.read_tail(*args))


def _over(future: "Future[Any]") -> "Future[Any]":
    future.exception()
    return future


def overlap(bench: Bench, on: bool) -> Samples:
    names = [f"agent-{i}" for i in range(_SLEEPERS)]

    async def measure() -> list[float]:
        for name in names:
            await ask_engine(engine, name, bench.prompts.ids(bench.context // 2))
            await engine.evict_agent(AgentKey(NAMESPACE, name))
        talk = asyncio.create_task(ask_engine(engine, "talker", bench.prompts.ids(64), 2 * _ANSWER))
        while not talk.done():
            await asyncio.gather(
                *(engine.prefetch_agent(AgentKey(NAMESPACE, name)) for name in names)
            )
            for name in names:
                await engine.evict_agent(AgentKey(NAMESPACE, name))
        times = (await talk).times
        return sorted(b - a for a, b in itertools.pairwise(times))

    with running_engine(bench.home(sharing="agent"), bench.loaded) as (engine, run):
        if not on:
            engine._core.restorer._store = _Blocking(engine._core.store)  # type: ignore[assignment]
        gaps = run(measure())
    mean = sum(gaps) / len(gaps)
    return {
        "gap between tokens, mean": mean * 1e3,
        "gap between tokens, p95": gaps[int(len(gaps) * 0.95)] * 1e3,
    }


Measure = Callable[[Bench, bool], Samples]
COMPONENTS: dict[str, Measure] = {
    "persistence": persistence,
    "quantization": quantization,
    "rotation": rotation,
    "batching": batching,
    "splice": splice,
    "overlap": overlap,
}
_UNITS = {
    "RAM": "MB",
    "KL": "nats",
    "change": "%",
    "tokens": "tokens",
    f"{_BATCH} answers": "tokens/s",
}  # else ms


def measure(
    bench: Bench, components: list[str], passes: int, done: Callable[[], None]
) -> Iterator[AblationRow]:
    """Each component `passes` times on and off, in turns, both on the same prompts. `done` is told
    of each.
    """
    persistence(bench, on=True)  # warm-up
    for component in components:
        samples: dict[str, tuple[list[float], list[float]]] = {}
        for _ in range(passes):
            for on in (True, False):
                same = replace(bench, prompts=copy(bench.prompts))
                for name, value in COMPONENTS[component](same, on).items():
                    samples.setdefault(name, ([], []))[0 if on else 1].append(value)
                done()
            bench = same
            bench.session.cool_down()
        yield from (_row(component, name, *values) for name, values in samples.items())


def _row(component: str, name: str, on: list[float], off: list[float]) -> AblationRow:
    unit = next((unit for start, unit in _UNITS.items() if name.startswith(start)), "ms")
    digits = 5 if unit == "nats" else 2
    with_it, without = spread(on, digits), spread(off, digits)
    return AblationRow(
        component=component,
        measure=name,
        unit=unit,
        better="higher" if unit == "tokens/s" else "lower",
        on=with_it,
        off=without,
        off_over_on=round(without.median / with_it.median, 3) if with_it.median else None,
    )
