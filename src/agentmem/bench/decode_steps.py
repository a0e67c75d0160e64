"""Decode steps of this process: ours over its 4-bit caches, beside mlx-lm's BatchGenerator.

BatchGenerator's caches are full-precision ones. Caches hold random values (time does not depend on
them), so that no length needs its prefill. Both take the same lengths and the same model, in turns.
The join of a batch is in no figure: mlx-lm pads and copies all caches there, ours copies nothing.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from ..config import Settings
from ..engine.calibration import faster_attention
from ..engine.model_runner import ModelRunner
from ..kvcache.block import SealedBlock, Snapshot, Tail
from ..kvcache.quantize import encode
from ..kvcache.sequence import SequenceCache
from ..models.loading import LoadedModel

CASES = {
    "1 x 500": [500],
    "8 x 500": [500] * 8,
    "4 x 1024": [1024] * 4,
    "8 unequal, 64 to 4096": [64, 128, 256, 512, 1024, 2048, 3072, 4096],
}
_STEPS = 10  # a pass
_FIRST_STEPS = 2  # before those, not counted: mlx-lm merges the caches there


@dataclass
class StepTimes:
    ms: list[float] = field(default_factory=list)  # of each step
    cache_bytes: int = 0  # working copies and blocks; of mlx-lm its merged caches


def decode_runner(loaded: LoadedModel, settings: Settings) -> ModelRunner:
    """Return a runner that attends as a server of these settings does."""
    runner = ModelRunner(loaded.model, kv_bits=settings.kv_bits, block_size=settings.block_size)
    auto = settings.attention == "auto"
    attention = faster_attention(runner) if auto else settings.attention
    runner.on_codes = attention == "codes"
    return runner


def why_not(runner: ModelRunner) -> str | None:
    """Say why caches of this model can't be made up; None where they can."""
    made = make_prompt_cache(runner.model)
    known = all(type(cache) in (KVCache, RotatingKVCache) for cache in made)
    if known and runner.batchable and len(made) == len(runner.spec.layers):
        return None
    return (
        "only models whose layers all have plain or sliding keys and values, "
        "and that can be batched"
    )


def cases(limit: int) -> dict[str, list[int]]:
    """Return those that a context of `limit` tokens holds."""
    steps = _STEPS + _FIRST_STEPS
    return {name: lengths for name, lengths in CASES.items() if max(lengths) + steps <= limit}


def measure(
    runner: ModelRunner, lengths: list[int], passes: int, done: Callable[[], None]
) -> tuple[StepTimes, StepTimes]:
    """Return (ours, mlx-lm's) for sequences of `lengths` tokens. `done` is told of each pass."""
    ours = StepTimes()
    theirs = StepTimes()
    for _ in range(passes):
        for of, steps in ((ours, _ours), (theirs, _theirs)):
            took, of.cache_bytes = steps(runner, lengths)
            of.ms.extend(took)
            mx.clear_cache()
        done()
    return ours, theirs


def random_snapshot(runner: ModelRunner, length: int) -> Snapshot:
    """Make a cache of `length` tokens without recurrent state, one random block repeated."""
    spec = runner.spec
    block: dict[str, mx.array] = {}
    full: dict[str, mx.array] = {}
    for s, stack in enumerate(spec.stacks):
        layer = spec.layers[stack[0]]
        for i, (part, dim) in enumerate((("k", layer.k_dim), ("v", layer.v_dim))):
            shape = (len(stack), layer.num_kv_heads, spec.block_size, dim)
            x = mx.random.normal(shape).astype(spec.dtype)
            if spec.bits is None:
                block[f"{part}{s}.full"] = x
            else:
                codes = encode(x, spec.bits[i])._asdict()
                block |= {f"{part}{s}.{name}": a for name, a in codes.items()}
            full[f"{part}{s}.full"] = mx.contiguous(x[:, :, : length % spec.block_size])
    mx.eval(block, full)
    rest = length % spec.block_size
    blocks = []
    for i in range(length // spec.block_size):
        needed = spec.needed(i, length)  # what no window sees is gone
        blocks.append(SealedBlock(block).only(needed))
    return Snapshot(tuple(blocks), Tail(rest, full) if rest else None)


def _ours(runner: ModelRunner, lengths: list[int]) -> tuple[list[float], int]:
    """Return (ms of each step, bytes of caches)."""
    steps = _FIRST_STEPS + _STEPS
    caches = [runner.new_cache(random_snapshot(runner, n), n + steps + 1) for n in lengths]
    mx.eval([c.arrays() for c in caches])
    tokens = [5] * len(lengths)
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        logits, fresh = runner.decode(caches, tokens)
        sampled = logits.argmax(-1)
        runner.evaluate([sampled], fresh)
        tokens = cast(list[int], sampled.tolist())
        times.append((time.perf_counter() - began) * 1e3)
    nbytes = sum(_cache_bytes(cache) for cache in caches)
    return times[_FIRST_STEPS:], nbytes


def _cache_bytes(cache: Any) -> int:
    nbytes = sum(a.nbytes for a in cache.arrays())
    if isinstance(cache, SequenceCache):
        nbytes += sum(block.nbytes for block in cache.blocks)
    return int(nbytes)


def _theirs(runner: ModelRunner, lengths: list[int]) -> tuple[list[float], int]:
    generator = BatchGenerator(
        runner.model,
        max_tokens=_FIRST_STEPS + _STEPS + 8,
        prefill_batch_size=len(lengths),
    )
    caches = [_full_precision(runner, n) for n in lengths]
    generator.insert([[5]] * len(lengths), caches=caches)
    del caches  # merged into one, they would stay beside it
    times = []
    try:
        for _ in range(2 * _FIRST_STEPS + _STEPS):
            began = time.perf_counter()
            assert len(generator.next_generated()) == len(lengths)
            times.append((time.perf_counter() - began) * 1e3)
        return times[2 * _FIRST_STEPS :], generator.prompt_cache_nbytes
    finally:
        generator.close()


def _full_precision(runner: ModelRunner, length: int) -> list[Any]:
    """Make mlx-lm's own caches of `length` random tokens."""
    caches: list[Any] = make_prompt_cache(runner.model)
    dtype = runner.spec.dtype
    for cache, layer in zip(caches, runner.spec.layers, strict=True):
        heads = (1, layer.num_kv_heads, length)
        k = mx.random.normal((*heads, layer.k_dim)).astype(dtype)
        v = mx.random.normal((*heads, layer.v_dim)).astype(dtype)
        cache.update_and_fetch(k, v)
    mx.eval([c.state for c in caches])
    return caches
