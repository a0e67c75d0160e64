"""What is measured of each component with it and without it, in an engine of this process."""

import asyncio
import itertools
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..chat.messages import Message
from ..chat.renderer import ChatRenderer
from ..config import Settings
from ..engine.model_runner import ModelRunner
from ..kvcache.calibrate import calibration_tokens
from ..kvcache.quantize import CacheSpace
from ..models.loading import LoadedModel
from .harness.corpus import Prompts, Windows, cut_windows
from .harness.in_process import NAMESPACE, Reply, ask_engine, key_of, running_engine
from .harness.server import BenchError
from .harness.session import Session
from .perplexity_scores import Score, delta_percent, production, score_windows

_BATCH = 4  # agents
_ANSWER = 32  # tokens
_TURNS = 6
_HEAT = 1.5  # temperature of their answers
_SLEEPERS = 4  # agents that come back while one answers


@dataclass(frozen=True)
class Ablation:
    """What every component's measurement works with."""

    session: Session
    settings: Settings
    loaded: LoadedModel
    prompts: Prompts
    context: int

    def home(self, **changes: Any) -> Settings:
        """Return settings on an empty directory."""
        for old in self.session.directory.iterdir():
            shutil.rmtree(old)
        home = self.session.directory / "engine"
        return self.settings.model_copy(update={"home": home} | changes)


Measured = dict[str, float]  # "MEASURE": one measurement


def _check(reply: Reply, state: str) -> None:
    if reply.stats.cache != state:
        raise BenchError(f"{reply.stats.cache}, not {state}: is the disk full?")


def persistence(ablation: Ablation, on: bool) -> Measured:
    settings = ablation.home()
    prompt = ablation.prompts.ids(ablation.context)
    with running_engine(settings, ablation.loaded) as (engine, run):
        run(ask_engine(engine, "agent", prompt))
    if not on:
        shutil.rmtree(settings.store_dir)
    with running_engine(settings, ablation.loaded) as (engine, run):
        reply = run(ask_engine(engine, "agent", prompt))
    _check(reply, "warm" if on else "cold")
    return {"first token after a restart": reply.stats.ttft_ms}


def quantization(ablation: Ablation, on: bool) -> Measured:
    settings = ablation.home(kv_bits="4" if on else "16")
    prompt = ablation.prompts.ids(ablation.context)
    with running_engine(settings, ablation.loaded) as (engine, run):
        run(ask_engine(engine, "agent", prompt))
        (agent,) = engine.agents.infos(NAMESPACE)
    with running_engine(settings, ablation.loaded) as (engine, run):
        reply = run(ask_engine(engine, "agent", prompt))
    _check(reply, "warm")
    return {
        "RAM of an agent at rest": agent.ram_bytes / 1e6,
        "first token after a restart": reply.stats.ttft_ms,
    }


class _Unrotated(CacheSpace):
    def _rotate(self, x: mx.array) -> mx.array:
        return x


def rotation(ablation: Ablation, on: bool) -> Measured:
    """Compare with 16 bits. Keys are centred, sinks and the unfinished block full, either way."""
    loaded = ablation.loaded
    block_size = ablation.settings.block_size
    context = ablation.context
    exact = ModelRunner(loaded.model, kv_bits="16", block_size=block_size)
    coded = ModelRunner(loaded.model, kv_bits="4", block_size=block_size)
    tokens = calibration_tokens(
        lambda text: loaded.tokenizer.encode(text, add_special_tokens=False)
    )
    coded.use_centres(coded.calibrate(tokens), CacheSpace if on else _Unrotated)
    one = Windows(window=context, stride=context, tokens=context)
    windows = cut_windows(ablation.prompts.ids(context + 1), one, [])
    begin = [production(exact), production(coded)]
    reference, scores = score_windows(begin, windows, block_size)
    total = sum(scores, Score())
    change, _ = delta_percent(reference, scores)
    return {
        "KL divergence from 16 bits": total.kl / total.tokens,
        "change of perplexity": change,
    }


def batching(ablation: Ablation, on: bool) -> Measured:
    settings = ablation.home(max_running=_BATCH if on else 1)
    prompts = [ablation.prompts.ids(ablation.context // _BATCH) for _ in range(_BATCH)]

    async def together(max_tokens: int) -> list[Reply]:
        asked = [
            ask_engine(engine, f"agent-{i}", prompt, max_tokens) for i, prompt in enumerate(prompts)
        ]
        return await asyncio.gather(*asked)

    with running_engine(settings, ablation.loaded) as (engine, run):
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


def splice(ablation: Ablation, on: bool) -> Measured:
    """Count tokens that are prefilled twice.

    Answers are sampled hot, so that some of their tokens are not those that a tokenizer makes of
    their text.
    """
    renderer = ChatRenderer(ablation.loaded.tokenizer, ablation.loaded.max_context)

    async def converse() -> int:
        messages: list[Message] = []
        held = 0
        lost = 0
        for turn in range(_TURNS):
            messages.append(Message("user", ablation.prompts.text(32)))
            branches = engine.branch_tokens(key_of("agent")) if on else ()
            tokens = await renderer.render(messages, branches)
            reply = await ask_engine(engine, "agent", tokens, _ANSWER, temperature=_HEAT, seed=turn)
            messages.append(Message("assistant", reply.text))
            lost += max(0, held - reply.stats.cached_tokens)
            held = reply.stats.prompt_tokens + reply.stats.completion_tokens - 1
        return lost

    with running_engine(ablation.home(), ablation.loaded) as (engine, run):
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


def overlap(ablation: Ablation, on: bool) -> Measured:
    names = [f"agent-{i}" for i in range(_SLEEPERS)]

    async def measure() -> list[float]:
        for name in names:
            await ask_engine(engine, name, ablation.prompts.ids(ablation.context // 2))
            await engine.agents.evict(key_of(name))
        asked = ask_engine(engine, "talker", ablation.prompts.ids(64), 2 * _ANSWER)
        talk = asyncio.create_task(asked)
        while not talk.done():
            await asyncio.gather(*[engine.agents.prefetch(key_of(name)) for name in names])
            for name in names:
                await engine.agents.evict(key_of(name))
        times = (await talk).times
        return sorted(b - a for a, b in itertools.pairwise(times))

    with running_engine(ablation.home(sharing="agent"), ablation.loaded) as (engine, run):
        if not on:
            store = _Blocking(engine._core.store)
            engine._core.restorer._store = store  # type: ignore[assignment]
        gaps = run(measure())
    mean = sum(gaps) / len(gaps)
    return {
        "gap between tokens, mean": mean * 1e3,
        "gap between tokens, p95": gaps[int(len(gaps) * 0.95)] * 1e3,
    }


# by the names in ablation.py's COMPONENTS
MEASURES: dict[str, Callable[[Ablation, bool], Measured]] = {
    "persistence": persistence,
    "quantization": quantization,
    "rotation": rotation,
    "batching": batching,
    "splice": splice,
    "overlap": overlap,
}
