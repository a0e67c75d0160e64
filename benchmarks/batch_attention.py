"""Decode steps of a batch by three ways to run attention, everything else being equal.

per sequence  each sequence over a working copy of its own: what agentmem serves with merged
one padded [B, H, capacity, D] buffer a layer, one attention call, a mask where lengths differ
grouped       one such buffer, and one call, for the sequences whose lengths round up to the same
multiple of 256

Merged and grouped have to copy a buffer whenever a sequence joins (`join`, ms); per sequence copies
nothing. Bytes are those of working copies. `differs` is the largest difference of the first step's
logits from per sequence; 0 means equal bit for bit. Caches hold random values (time does not depend
on them). The ways take turns step by step: A B C A B C. Wants a quiet machine.

    python benchmarks/batch_attention.py --json benchmarks/results/batch-attention-demo.json
"""

import argparse
import itertools
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentmem.linux_cpu.allocator import keep_freed_memory
from agentmem.linux_cpu.blas import load_fast_blas

HOME = Path("~/.agentmem").expanduser()
keep_freed_memory()
load_fast_blas(HOME)

import mlx.core as mx  # noqa: E402  (after the BLAS)
from machine import describe_machine, write_result  # noqa: E402

from agentmem.bench.decode_steps import random_snapshot  # noqa: E402
from agentmem.engine.model_runner import ModelRunner  # noqa: E402
from agentmem.kvcache.backend import attention_backend  # noqa: E402
from agentmem.kvcache.quantize import CacheSpace  # noqa: E402
from agentmem.kvcache.sequence import SequenceCache  # noqa: E402
from agentmem.models.loading import load_model  # noqa: E402

STEP = 256  # buffers grow, and groups are formed, by this many tokens


@dataclass
class Group:
    """Sequences that share buffers and end at the same column.

    A row's first `width - length` columns are padding:

    lengths 3, 5:   . . a a a
                    b b b b b
    """

    lengths: list[int]
    buffers: list[mx.array]  # of each layer, keys and values joined: [B, 2 H, capacity, D]
    width: int

    def mask(self) -> mx.array | None:
        """Return [B, 1, 1, width + 1], True where a row has a token; None if no row is padded."""
        if len(set(self.lengths)) == 1:
            return None
        padding = mx.array([max(self.lengths) - n for n in self.lengths])
        return (mx.arange(self.width + 1) >= padding[:, None])[:, None, None]


class GroupedLayer:
    """What a model's file sees as one layer's cache, for one pass of one token a sequence."""

    def __init__(
        self,
        index: int,
        space: CacheSpace,
        groups: list[Group],
        *,
        masks: list[Any],
        offset: mx.array,
    ):
        self._index = index
        self._space = space
        self._groups = groups
        self._masks = masks
        self.offset = offset

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> None:
        return None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self._pending = keys, values
        self.offset = self.offset + 1
        return keys, values

    def attend(self, queries: mx.array, scale: float, sinks: mx.array | None) -> mx.array:
        q, [new] = self._space.enter(self._index, queries, *self._pending)
        out = []
        row = 0
        for group, mask in zip(self._groups, self._masks, strict=True):
            rows = slice(row, row + len(group.lengths))
            buffer = group.buffers[self._index]
            stop = group.width + 1
            buffer[:, :, group.width : stop] = new[rows]
            keys, values = mx.split(buffer[:, :, :stop], 2, axis=1)
            attended = mx.fast.scaled_dot_product_attention(
                q[rows], keys, values, scale=scale, mask=mask
            )
            out.append(attended)
            row = rows.stop
        left = self._space.leave(out[0] if len(out) == 1 else mx.concatenate(out, axis=0))
        attention_backend().start(left, [])  # as the served code does
        return left


class GroupedBatch:
    """Sequences decoded over shared buffers; blocks are not sealed."""

    def __init__(
        self, runner: ModelRunner, caches: list[SequenceCache], lengths: list[int], sizes: list[int]
    ):
        """`sizes` are of groups of neighbours. The copies made here are what a join costs."""
        self._runner = runner
        self._space = caches[0].layers[0].codec.space
        self._groups = []
        for stop, size in zip(itertools.accumulate(sizes), sizes, strict=True):
            members = slice(stop - size, stop)
            self._groups.append(_merge(caches[members], lengths[members]))

    @property
    def nbytes(self) -> int:
        return sum(b.nbytes for group in self._groups for b in group.buffers)

    def step(self, tokens: list[int]) -> mx.array:
        offset = mx.array(list(itertools.chain(*[group.lengths for group in self._groups])))
        masks = [group.mask() for group in self._groups]
        num_layers = len(self._runner.spec.layers)
        layers = [
            GroupedLayer(i, self._space, self._groups, masks=masks, offset=offset)
            for i in range(num_layers)
        ]
        logits = self._runner.model(mx.array(tokens)[:, None], cache=layers)[:, -1]
        mx.eval(logits)
        for group in self._groups:
            group.width += 1
            group.lengths = [n + 1 for n in group.lengths]
        return logits


def _merge(caches: list[SequenceCache], lengths: list[int]) -> Group:
    width = max(lengths)
    capacity = (width // STEP + 1) * STEP
    arrays = [cache.arrays() for cache in caches]  # one a layer

    def merged(i: int) -> mx.array:
        rows = []
        for of_layer, n in zip(arrays, lengths, strict=True):
            padding = (width - n, capacity - width)
            rows.append(mx.pad(of_layer[i][:, :, :n], [(0, 0), (0, 0), padding, (0, 0)]))
        out = mx.concatenate(rows, axis=0)
        mx.eval(out)
        return out

    return Group(list(lengths), [merged(i) for i in range(len(arrays[0]))], width)


class PerSequenceBatch:
    """The served code."""

    def __init__(self, runner: ModelRunner, caches: list[SequenceCache]):
        self._runner = runner
        self._caches = caches

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for cache in self._caches for a in cache.arrays())

    def step(self, tokens: list[int]) -> mx.array:
        logits, fresh = self._runner.decode(self._caches, tokens)
        self._runner.evaluate([logits], fresh)
        return logits


def group_sizes(lengths: list[int]) -> list[int]:
    """Return the sizes of runs of `lengths` that round up to the same multiple of STEP.

    `lengths` are ascending.
    """
    return [len(list(run)) for _, run in itertools.groupby(lengths, key=lambda n: -(-n // STEP))]


def cases(batches: list[int]) -> list[tuple[str, list[int]]]:
    """Return (name, lengths, ascending) of each case.

    Lengths are equal, or 64 to 2,048, spread evenly in their logarithm.
    """
    out = []
    for n in (64, 512, 1024):
        out += [(f"{batch} x {n}", [n] * batch) for batch in batches]
    for batch in batches:
        if batch > 1:
            lengths = [round(64 * 32 ** (i / (batch - 1))) for i in range(batch)]
            out.append((f"{batch} of 64 to 2048", lengths))
    return out


def measure(runner: ModelRunner, lengths: list[int], steps: int) -> dict[str, dict[str, float]]:
    """Return each way's step_ms, join_ms, bytes and logits_differ_by."""
    snapshots = {n: random_snapshot(runner, n) for n in set(lengths)}
    caches = [runner.new_cache(snapshots[n], n + steps + 1) for n in lengths]
    mx.eval([cache.arrays() for cache in caches])
    ways: dict[str, PerSequenceBatch | GroupedBatch] = {
        "per sequence": PerSequenceBatch(runner, caches)
    }
    rows: dict[str, dict[str, float]] = {"per sequence": {"join_ms": 0.0}}
    for name, sizes in (("merged", [len(lengths)]), ("grouped", group_sizes(lengths))):
        began = time.perf_counter()
        ways[name] = GroupedBatch(runner, caches, lengths, sizes)
        rows[name] = {"join_ms": (time.perf_counter() - began) * 1e3}
    times: dict[str, list[float]] = {name: [] for name in ways}
    first: dict[str, mx.array] = {}
    for _ in range(steps):
        for name, way in ways.items():
            began = time.perf_counter()
            logits = way.step([5] * len(lengths))
            times[name].append((time.perf_counter() - began) * 1e3)
            first.setdefault(name, logits)
    for name, way in ways.items():
        difference = mx.abs(first[name] - first["per sequence"]).max().item()
        step_ms = statistics.median(times[name][2:])
        rows[name] |= {"step_ms": step_ms, "bytes": way.nbytes, "logits_differ_by": difference}
    return rows


def check_model(runner: ModelRunner) -> None:
    if len(runner.spec.stacks) != 1 or any(
        x.window or x.attention_sinks or x.model_attends for x in runner.spec.layers
    ):
        raise SystemExit(
            "this benchmark takes models whose layers are all alike, "
            "with global attention and no sinks"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--batches", default="1,2,4,8,16", help="batch sizes, comma-separated")
    parser.add_argument(
        "--steps",
        type=int,
        default=22,
        help="decode steps of each way; the first two are not counted",
    )
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    loaded = load_model(args.model, HOME)
    runner = ModelRunner(loaded.model)
    check_model(runner)
    table = []
    print(f"{'lengths':18} {'way':14} {'ms a step':>9} {'join ms':>8} {'MB':>6} {'differs':>8}")
    for name, lengths in cases([int(b) for b in args.batches.split(",")]):
        for way, row in measure(runner, lengths, args.steps).items():
            table.append({"case": name, "lengths": lengths, "way": way, **row})
            times = f"{row['step_ms']:9.1f} {row['join_ms']:8.1f}"
            megabytes = row["bytes"] / 1e6
            print(
                f"{name:18} {way:14} {times} {megabytes:6.0f} {row['logits_differ_by']:8.1g}",
                flush=True,
            )
    result = {
        "benchmark": "batch_attention",
        "machine": describe_machine(),
        "model": loaded.name,
        "rows": table,
    }
    write_result(result, args.json)


if __name__ == "__main__":
    main()
