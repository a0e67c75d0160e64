"""Bytes of a resting agent's cache by layer kind and by length, and how many a budget holds.

An agent rests at n tokens when nothing of it runs. In RAM it then has of every block the parts that
going on from n needs (KVCacheSpec.needed), the unfinished block in full precision, and the
recurrent state at n. A restore reads the same; the disk also keeps what windows have passed, and
the state every `state_interval` tokens.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..kvcache.quantize import sealed_bytes
from ..kvcache.spec import QUANT_GROUP, KVCacheSpec, LayerSpec, coded_bytes
from .harness.paper import CONTEXTS, PaperRow

FP16 = 2  # bytes a value, of bfloat16 too


@dataclass(frozen=True)
class KindRow:
    """The layers of one kind and shape. Bytes are of all of them."""

    kind: str
    layers: int
    window: int | None  # tokens
    num_kv_heads: int
    k_dim: int
    v_dim: int
    attention_sinks: bool
    fp16_bytes_per_token: int
    sealed_bytes_per_token: int
    # that it takes at most, however long a sequence is: sealed blocks of a window, a state
    fixed_bytes: int | None


@dataclass(frozen=True)
class Footprint:
    """Bytes of one resting agent of `tokens` tokens.

    They are None where a model's cache can't be held that way.
    """

    tokens: int
    fp16_all_layers: int | None  # keys and values of every layer at full length
    # windows and chunks alone where layers have them, as mlx-lm's Rotating- and ChunkedKVCache
    fp16_windows: int
    # every layer at full length as plain 4-bit codes, a 16-bit scale and bias for each 64
    paper_q4: int | None
    agentmem: int | None  # in RAM, and read by a restore
    agentmem_at_worst: int | None  # the same, the most with up to a block (or chunk) less
    agentmem_disk: int | None


@dataclass(frozen=True)
class ModelCapacity:
    """What the command shows of one model."""

    model: str
    model_type: str
    spec: KVCacheSpec
    footprints: tuple[Footprint, ...]

    def to_json(self, budget: int) -> dict[str, Any]:
        spec = self.spec
        return {
            "model": self.model,
            "model_type": self.model_type,
            "layers": [asdict(row) for row in kinds(spec)],
            "fp16_bytes_per_token": spec.dense_bytes,
            "sealed_bytes_per_token": spec.sealed_bytes,
            "sealed_bytes_per_token_beyond_windows": beyond_windows(spec),
            "state_bytes": spec.state_bytes,
            "open_block_bytes": open_block_bytes(spec),
            "unquantized": spec.unquantized_reason if spec.opaque is None else None,
            "not_kept": spec.opaque.reason if spec.opaque else None,
            "contexts": [_context_json(row, budget) for row in self.footprints],
        }


def _context_json(row: Footprint, budget: int) -> dict[str, Any]:
    return {
        "tokens": row.tokens,
        "fp16_all_layers": _fit(row.fp16_all_layers, budget),
        "fp16_windows": _fit(row.fp16_windows, budget),
        "paper_q4": _fit(row.paper_q4, budget),
        "agentmem": _fit(row.agentmem, budget),
        "agentmem_at_worst_bytes": row.agentmem_at_worst,
        "agentmem_disk_bytes": row.agentmem_disk,
    }


def _fit(nbytes: int | None, budget: int) -> dict[str, int] | None:
    if nbytes is None:
        return None
    return {"bytes": nbytes, "agents": agents(budget, nbytes)}


def agents(budget: int, nbytes: int) -> int:
    """Return how many whole agents of `nbytes` each fit.

    A cache of no bytes fits as often as one likes, and counts as one byte.
    """
    return budget // max(nbytes, 1)


def footprint(spec: KVCacheSpec, num_tokens: int) -> Footprint:
    """Compute an agent's bytes. `spec.dtype` must be of 16 bits."""
    assert spec.dtype.size == FP16
    if spec.opaque is not None:
        own = spec.opaque.fixed_bytes + num_tokens * spec.opaque.token_bytes
        return Footprint(
            tokens=num_tokens,
            fp16_all_layers=None,
            fp16_windows=own,
            paper_q4=None,
            agentmem=None,
            agentmem_at_worst=None,
            agentmem_disk=None,
        )
    paper_token = sum(_paper_layer_bytes(layer) for layer in spec.layers)
    return Footprint(
        tokens=num_tokens,
        fp16_all_layers=num_tokens * spec.dense_bytes + spec.state_bytes,
        fp16_windows=fp16_window_bytes(spec, num_tokens),
        paper_q4=num_tokens * paper_token + spec.state_bytes,
        agentmem=rest_bytes(spec, num_tokens),
        agentmem_at_worst=worst_rest_bytes(spec, num_tokens),
        agentmem_disk=disk_bytes(spec, num_tokens),
    )


def fp16_window_bytes(spec: KVCacheSpec, num_tokens: int) -> int:
    """Return the bytes of mlx-lm's caches after a step of decoding.

    The steps by which they grow are left aside. For a few types (mistral3) mlx-lm makes caches that
    keep more than the window that the model masks.
    """
    total = spec.state_bytes
    for layer in spec.layers:
        total += min(num_tokens, layer.window or num_tokens) * _fp16_layer_bytes(layer)
    return total


def _fp16_layer_bytes(layer: LayerSpec) -> int:
    return layer.num_kv_heads * sum(layer.dims) * FP16


def _paper_layer_bytes(layer: LayerSpec) -> int:
    """Return the bytes of one token: 0.28125 of FP16, where head dims are multiples of 64.

    Others count as the next multiple.
    """
    padded = [-(-dim // QUANT_GROUP) * QUANT_GROUP for dim in layer.dims]
    return layer.num_kv_heads * sum(coded_bytes(dim, QUANT_GROUP, 4) for dim in padded)


def rest_bytes(spec: KVCacheSpec, num_tokens: int) -> int:
    """Return the bytes of a resting agent in RAM.

    A second state, of the last prompt's end, may come on top until its block is full.
    """
    whole, tail = divmod(num_tokens, spec.block_size)
    total = tail * spec.dense_bytes + (spec.state_bytes if num_tokens else 0)
    sinks = min(spec.num_sinks, spec.block_size) if spec.bits is not None and whole else 0
    for s, stack in enumerate(spec.stacks):
        layer = spec.layers[stack[0]]
        first = layer.first_visible(num_tokens) // spec.block_size
        total += max(0, whole - first) * spec.block_size * spec.stack_bytes[s]
        if first == 0:
            values = len(stack) * layer.num_kv_heads * sum(layer.dims)
            total += sinks * values * spec.dtype.size
    return total


def worst_rest_bytes(spec: KVCacheSpec, num_tokens: int) -> int:
    """Return the most of `rest_bytes` over one block up to `num_tokens`, or over one chunk.

    The unfinished block makes the difference, and that a chunk is let go of where the next one
    begins.
    """
    span = max([spec.block_size, *(layer.period for layer in spec.layers)])
    lengths = range(max(1, num_tokens - span), num_tokens + 1)
    return max(rest_bytes(spec, n) for n in lengths)


def disk_bytes(spec: KVCacheSpec, num_tokens: int) -> int:
    """Return the bytes of a resting agent's files, headers aside.

    States at the ends of earlier prompts come on top.
    """
    tail = num_tokens % spec.block_size
    last_state = spec.state_bytes if num_tokens % spec.state_interval else 0
    return sealed_bytes(spec, num_tokens - tail) + tail * spec.dense_bytes + last_state


def open_block_bytes(spec: KVCacheSpec) -> int:
    """Return what the unfinished block takes at most, one token before it is sealed."""
    return (spec.block_size - 1) * spec.dense_bytes


def beyond_windows(spec: KVCacheSpec) -> int:
    """Return the bytes in RAM of each further token, once windows are full."""
    total = 0
    for in_window, nbytes in zip(spec.window_blocks, spec.stack_bytes, strict=True):
        if in_window is None:
            total += nbytes
    return total


def kinds(spec: KVCacheSpec) -> list[KindRow]:
    """Make one row a stack, recurrent ones last."""
    rows = [_kind_row(spec, stack, spec.stack_bytes[s]) for s, stack in enumerate(spec.stacks)]
    return rows + [_kind_row(spec, stack, 0) for stack in spec.state_stacks]


def _kind_row(spec: KVCacheSpec, stack: Sequence[int], sealed: int) -> KindRow:
    layer = spec.layers[stack[0]]
    count = len(stack)
    fixed = None
    if layer.state:
        layers = tuple(spec.layers[i] for i in stack)
        fixed = KVCacheSpec(layers, spec.dtype).state_bytes
    elif layer.window is not None:
        blocks = -(-(layer.window - 1) // spec.block_size)
        fixed = blocks * spec.block_size * sealed
    return KindRow(
        kind=layer.kind,
        layers=count,
        window=layer.window,
        num_kv_heads=layer.num_kv_heads,
        k_dim=layer.k_dim,
        v_dim=layer.v_dim,
        attention_sinks=layer.attention_sinks,
        fp16_bytes_per_token=_fp16_layer_bytes(layer) * count,
        sealed_bytes_per_token=sealed,
        fixed_bytes=fixed,
    )


@dataclass(frozen=True)
class PaperCell:
    """One length of one model within `PaperRow.budget`: the paper's agents that fit, and ours."""

    tokens: int
    paper: tuple[int, int]  # in FP16, in Q4
    by_its_rule: tuple[int, int]
    agentmem: int


def compare_with_paper(row: PaperRow, spec: KVCacheSpec) -> list[PaperCell]:
    """Compare at each of the paper's lengths. `spec` is that of the row's model."""
    cells = []
    for tokens, fp16, q4 in zip(CONTEXTS, row.fp16, row.q4, strict=True):
        sizes = footprint(spec, tokens)
        assert sizes.fp16_all_layers is not None
        assert sizes.paper_q4 is not None
        assert sizes.agentmem is not None
        by_its_rule = (
            agents(row.budget, sizes.fp16_all_layers),
            agents(row.budget, sizes.paper_q4),
        )
        cell = PaperCell(
            tokens=tokens,
            paper=(fp16, q4),
            by_its_rule=by_its_rule,
            agentmem=agents(row.budget, sizes.agentmem),
        )
        cells.append(cell)
    return cells
