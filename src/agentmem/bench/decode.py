"""Decode steps of this process: ours over its 4-bit caches, beside mlx-lm's BatchGenerator over
full-precision ones.

Caches hold random values (time does not depend on them), so that no length needs its prefill. Both
take the same lengths and the same model, in turns. The join of a batch is in no figure: mlx-lm pads
and copies all caches there, ours copies nothing.
"""

import time
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from ..config import Settings
from ..engine.model_runner import ModelRunner
from ..engine.startup import faster_attention
from ..kvcache.block import SealedBlock, Snapshot, Tail
from ..kvcache.quantize import encode
from ..kvcache.sequence import SequenceCache
from ..models.loading import LoadedModel
from .result import Part, Spread, spread

CASES = {
    "1 x 500": [500],
    "8 x 500": [500] * 8,
    "4 x 1024": [1024] * 4,
    "8 unequal, 64 to 4096": [64, 128, 256, 512, 1024, 2048, 3072, 4096],
}
_STEPS = 10  # a pass
_FIRST_STEPS = 2  # before those, not counted: mlx-lm merges the caches there


class Decode(Part):
    step_ms: Spread
    tokens_per_s: float
    cache_bytes: int  # working copies and blocks; of mlx-lm its merged caches


class DecodeRow(Part):
    case: str
    agentmem: Decode
    batch_generator: Decode
    speedup: float
    bytes_ratio: float


def decode_runner(loaded: LoadedModel, settings: Settings) -> ModelRunner:
    runner = ModelRunner(loaded.model, kv_bits=settings.kv_bits, block_size=settings.block_size)
    attention = faster_attention(runner) if settings.attention == "auto" else settings.attention
    runner.on_codes = attention == "codes"
    return runner


def why_not(runner: ModelRunner) -> str | None:
    """In words, why caches of this model can't be made up; else None."""
    made = make_prompt_cache(runner.model)
    known = all(type(cache) in (KVCache, RotatingKVCache) for cache in made)
    if known and runner.batchable and len(made) == len(runner.spec.layers):
        return None
    return "only models whose layers all have plain or sliding keys and values, and that can be batched"


def cases(limit: int) -> dict[str, list[int]]:
    """Those that a context of `limit` tokens holds."""
    return {
        name: lengths
        for name, lengths in CASES.items()
        if max(lengths) + _STEPS + _FIRST_STEPS <= limit
    }


def measure_decode(
    runner: ModelRunner, chosen: dict[str, list[int]], passes: int, done: Callable[[], None]
) -> list[DecodeRow]:
    """`done` is told of each of cases x passes."""
    rows = []
    for case, lengths in chosen.items():
        times: tuple[list[float], list[float]] = ([], [])
        sizes = [0, 0]
        for _ in range(passes):
            for i, steps in enumerate((_ours, _theirs)):
                took, sizes[i] = steps(runner, lengths)
                times[i].extend(took)
                mx.clear_cache()
            done()
        ours, theirs = (
            _decode(len(lengths), t, size) for t, size in zip(times, sizes, strict=True)
        )
        row = DecodeRow(
            case=case,
            agentmem=ours,
            batch_generator=theirs,
            speedup=round(theirs.step_ms.median / ours.step_ms.median, 3),
            bytes_ratio=round(ours.cache_bytes / theirs.cache_bytes, 3),
        )
        rows.append(row)
    return rows


def _decode(agents: int, times: list[float], nbytes: int) -> Decode:
    of = spread(times)
    return Decode(step_ms=of, tokens_per_s=round(agents / of.median * 1e3, 2), cache_bytes=nbytes)


def random_snapshot(runner: ModelRunner, length: int) -> Snapshot:
    """A cache of `length` tokens without recurrent state, its blocks one random block repeated."""
    spec = runner.spec
    block: dict[str, mx.array] = {}
    full: dict[str, mx.array] = {}
    for s, stack in enumerate(spec.stacks):
        layer = spec.layers[stack[0]]
        for i, (part, dim) in enumerate((("k", layer.k_dim), ("v", layer.v_dim))):
            x = mx.random.normal((len(stack), layer.num_kv_heads, spec.block_size, dim)).astype(
                spec.dtype
            )
            if spec.bits is None:
                block[f"{part}{s}.full"] = x
            else:
                block |= {
                    f"{part}{s}.{name}": a for name, a in encode(x, spec.bits[i])._asdict().items()
                }
            full[f"{part}{s}.full"] = mx.contiguous(x[:, :, : length % spec.block_size])
    mx.eval(block, full)
    rest = length % spec.block_size
    count = length // spec.block_size
    blocks = tuple(
        SealedBlock(block).only(spec.needed(i, length)) for i in range(count)
    )  # what no window sees is gone
    return Snapshot(blocks, Tail(rest, full) if rest else None)


def _ours(runner: ModelRunner, lengths: list[int]) -> tuple[list[float], int]:
    """(ms of each step, bytes of caches)."""
    steps = _FIRST_STEPS + _STEPS
    caches = [runner.new_cache(random_snapshot(runner, n), n + steps + 1) for n in lengths]
    mx.eval([c.arrays() for c in caches])
    tokens, times = [5] * len(lengths), []
    for _ in range(steps):
        began = time.perf_counter()
        logits, fresh = runner.decode(caches, tokens)
        sampled = logits.argmax(-1)
        runner.evaluate([sampled], fresh)
        tokens = cast(list[int], sampled.tolist())
        times.append((time.perf_counter() - began) * 1e3)
    nbytes = sum(a.nbytes for c in caches for a in c.arrays())
    nbytes += sum(b.nbytes for c in caches if isinstance(c, SequenceCache) for b in c.blocks)
    return times[_FIRST_STEPS:], nbytes


def _theirs(runner: ModelRunner, lengths: list[int]) -> tuple[list[float], int]:
    generator = BatchGenerator(
        runner.model, max_tokens=_FIRST_STEPS + _STEPS + 8, prefill_batch_size=len(lengths)
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
    """mlx-lm's own caches of `length` random tokens."""
    caches = make_prompt_cache(runner.model)
    for cache, layer in zip(caches, runner.spec.layers, strict=True):
        heads = (1, layer.num_kv_heads, length)
        k, v = (
            mx.random.normal((*heads, dim)).astype(runner.spec.dtype)
            for dim in (layer.k_dim, layer.v_dim)
        )
        cache.update_and_fetch(k, v)
    mx.eval([c.state for c in caches])
    return caches
