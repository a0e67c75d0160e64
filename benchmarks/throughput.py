"""Decode throughput by batch: ours over 4-bit caches, beside mlx-lm's BatchGenerator over its full-precision ones.

Caches hold random values (time does not depend on them), so that lengths up to 4,096 need no minutes of prefill. Both
take the same lengths and the same model in one process, in turns: A B A B. A figure is the median of decode steps; the
join of a batch is not part of it (mlx-lm pads and copies all caches there, ours copies nothing).

    python benchmarks/throughput.py --json benchmarks/results/throughput-demo.json
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from agentmem.models.allocator import keep_freed_memory
from agentmem.models.blas import load_fast_blas

HOME = Path("~/.agentmem").expanduser()
keep_freed_memory()
load_fast_blas(HOME)

import mlx.core as mx  # noqa: E402  (after the BLAS)
from machine import describe_machine, write_result  # noqa: E402
from mlx_lm.generate import BatchGenerator  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

from agentmem.engine.model_runner import ModelRunner  # noqa: E402
from agentmem.kvcache.block import SealedBlock, Snapshot, Tail  # noqa: E402
from agentmem.kvcache.quantize import encode  # noqa: E402
from agentmem.models.loading import load_model  # noqa: E402

CASES = {
    "1 x 500": [500],
    "8 x 500": [500] * 8,
    "4 x 1024": [1024] * 4,
    "8 unequal, 64 to 4096": [64, 128, 256, 512, 1024, 2048, 3072, 4096],
}


def snapshot(runner: ModelRunner, length: int) -> Snapshot:
    """A cache of `length` tokens of one stack, its blocks one random block repeated."""
    spec = runner.spec
    assert spec.bits is not None and len(spec.stacks) == 1
    layer, size = spec.layers[0], spec.block_size
    codes: dict[str, mx.array] = {}
    full: dict[str, mx.array] = {}
    for part, dim, bits in (("k", layer.k_dim, spec.bits[0]), ("v", layer.v_dim, spec.bits[1])):
        x = mx.random.normal((len(spec.layers), layer.num_kv_heads, size, dim)).astype(spec.dtype)
        codes |= {f"{part}0.{name}": a for name, a in encode(x, bits)._asdict().items()}
        full[f"{part}0.full"] = mx.contiguous(x[:, :, : length % size])
    mx.eval(codes, full)
    blocks = tuple(SealedBlock(codes) for _ in range(length // size))
    return Snapshot(blocks, Tail(length % size, full) if length % size else None)


def ours(runner: ModelRunner, lengths: list[int], steps: int) -> tuple[list[float], int]:
    """(ms of each step, bytes of caches: working copies and blocks)."""
    caches = [runner.new_cache(snapshot(runner, n), n + steps + 1) for n in lengths]
    mx.eval([c.arrays() for c in caches])
    tokens, times = [5] * len(lengths), []
    for _ in range(steps):
        began = time.perf_counter()
        logits, fresh = runner.decode(caches, tokens)
        sampled = logits.argmax(-1)
        runner.settle([sampled], fresh)
        tokens = sampled.tolist()
        times.append((time.perf_counter() - began) * 1e3)
    nbytes = sum(a.nbytes for c in caches for a in c.arrays()) + sum(b.nbytes for c in caches for b in c.blocks)
    return times, nbytes


def theirs(model: Any, runner: ModelRunner, lengths: list[int], steps: int) -> tuple[list[float], int]:
    caches = []
    for n in lengths:
        cache = make_prompt_cache(model)
        for c, layer in zip(cache, runner.spec.layers, strict=True):
            shape = (1, layer.num_kv_heads, n)
            c.update_and_fetch(
                mx.random.normal((*shape, layer.k_dim)).astype(runner.spec.dtype),
                mx.random.normal((*shape, layer.v_dim)).astype(runner.spec.dtype),
            )
        mx.eval([c.state for c in cache])
        caches.append(cache)
    generator = BatchGenerator(model, max_tokens=steps + 8)
    generator.insert([[5]] * len(lengths), caches=caches)
    del caches, cache
    times = []
    for _ in range(steps + 2):
        began = time.perf_counter()
        assert len(generator.next_generated()) == len(lengths)
        times.append((time.perf_counter() - began) * 1e3)
    nbytes = generator.prompt_cache_nbytes
    generator.close()
    return times[2:], nbytes  # the first two merge the caches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--steps", type=int, default=12, help="decode steps a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    loaded = load_model(args.model, HOME)
    runner = ModelRunner(loaded.model)
    rows = []
    for name, lengths in CASES.items():
        a: list[float] = []
        b: list[float] = []
        for _ in range(args.rounds):
            times, our_bytes = ours(runner, lengths, args.steps)
            a += times[2:]
            times, their_bytes = theirs(loaded.model, runner, lengths, args.steps)
            b += times[2:]
        ms, mlx_lm_ms = statistics.median(a), statistics.median(b)
        row = {
            "case": name,
            "step_ms": ms,
            "tokens_per_s": len(lengths) / ms * 1e3,
            "cache_bytes": our_bytes,
            "mlx_lm_step_ms": mlx_lm_ms,
            "mlx_lm_tokens_per_s": len(lengths) / mlx_lm_ms * 1e3,
            "mlx_lm_cache_bytes": their_bytes,
            "speedup": mlx_lm_ms / ms,
            "bytes_ratio": our_bytes / their_bytes,
        }
        rows.append(row)
        print(
            f"{name:24} ours {row['tokens_per_s']:6.1f} tok/s {our_bytes / 1e6:7.0f} MB   mlx-lm "
            f"{row['mlx_lm_tokens_per_s']:6.1f} tok/s {their_bytes / 1e6:7.0f} MB   {row['speedup']:.2f}x",
            flush=True,
        )
    result = {"benchmark": "throughput", "machine": describe_machine(), "model": loaded.name, "rows": rows}
    result["batch_8_over_1"] = rows[1]["tokens_per_s"] / rows[0]["tokens_per_s"]
    print(f"8 x 500 over 1 x 500: {result['batch_8_over_1']:.2f}x")
    write_result(result, args.json)


if __name__ == "__main__":
    main()
