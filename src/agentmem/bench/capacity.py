"""How many resting agents a budget holds: bytes of one's cache by layer kind and by length.

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
    fixed_bytes: (
        int | None
    )  # that it takes at most, however long a sequence is: sealed blocks of a window, a state


@dataclass(frozen=True)
class Footprint:
    """Bytes of one resting agent of `tokens` tokens; None where a model's cache can't be held that
    way.
    """

    tokens: int
    fp16_all_layers: int | None  # keys and values of every layer at full length
    # windows and chunks alone where layers have them, as mlx-lm's Rotating- and ChunkedKVCache
    fp16_windows: int
    paper_q4: (
        int | None
    )  # every layer at full length as plain 4-bit codes, a 16-bit scale and bias for each 64
    agentmem: int | None  # in RAM, and read by a restore
    agentmem_at_worst: int | None  # the same, the most with up to a block (or chunk) less
    agentmem_disk: int | None


COLUMNS = ("fp16_all_layers", "fp16_windows", "paper_q4", "agentmem")


@dataclass(frozen=True)
class Capacity:
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
    result: dict[str, Any] = {"tokens": row.tokens}
    for name in COLUMNS:
        nbytes = getattr(row, name)
        result[name] = (
            None if nbytes is None else {"bytes": nbytes, "agents": agents(budget, nbytes)}
        )
    return result | {
        "agentmem_at_worst_bytes": row.agentmem_at_worst,
        "agentmem_disk_bytes": row.agentmem_disk,
    }


def agents(budget: int, nbytes: int) -> int:
    """Whole agents of `nbytes` each; a cache of no bytes fits as often as one likes, and counts as
    one byte.
    """
    return budget // max(nbytes, 1)


def footprint(spec: KVCacheSpec, num_tokens: int) -> Footprint:
    """`spec.dtype` must be of 16 bits."""
    assert spec.dtype.size == FP16
    if spec.opaque is not None:
        own = spec.opaque.fixed_bytes + num_tokens * spec.opaque.token_bytes
        return Footprint(num_tokens, None, own, None, None, None, None)
    return Footprint(
        num_tokens,
        num_tokens * spec.dense_bytes + spec.state_bytes,
        fp16_window_bytes(spec, num_tokens),
        num_tokens * sum(map(_paper_layer_bytes, spec.layers)) + spec.state_bytes,
        rest_bytes(spec, num_tokens),
        worst_rest_bytes(spec, num_tokens),
        disk_bytes(spec, num_tokens),
    )


def fp16_window_bytes(spec: KVCacheSpec, num_tokens: int) -> int:
    """As mlx-lm's caches after a step of decoding, the steps by which they grow aside.

    For a few types (mistral3) mlx-lm makes caches that keep more than the window that the model
    masks.
    """
    kept = (
        min(num_tokens, layer.window or num_tokens) * _fp16_layer_bytes(layer)
        for layer in spec.layers
    )
    return sum(kept) + spec.state_bytes


def _fp16_layer_bytes(layer: LayerSpec) -> int:
    return layer.num_kv_heads * sum(layer.dims) * FP16


def _paper_layer_bytes(layer: LayerSpec) -> int:
    """Of one token: 0.28125 of FP16, where head dims are multiples of 64; others count as the next
    multiple.
    """
    padded = (-(-dim // QUANT_GROUP) * QUANT_GROUP for dim in layer.dims)
    return layer.num_kv_heads * sum(coded_bytes(dim, QUANT_GROUP, 4) for dim in padded)


def rest_bytes(spec: KVCacheSpec, num_tokens: int) -> int:
    """Of a resting agent in RAM. A second state, of the last prompt's end, may come on top until
    its block is full.
    """
    whole, tail = divmod(num_tokens, spec.block_size)
    total = tail * spec.dense_bytes + (spec.state_bytes if num_tokens else 0)
    sinks = min(spec.num_sinks, spec.block_size) if spec.bits is not None and whole else 0
    for s, stack in enumerate(spec.stacks):
        layer = spec.layers[stack[0]]
        first = layer.first_visible(num_tokens) // spec.block_size
        total += max(0, whole - first) * spec.block_size * spec.stack_bytes[s]
        if first == 0:
            total += sinks * len(stack) * layer.num_kv_heads * sum(layer.dims) * spec.dtype.size
    return total


def worst_rest_bytes(spec: KVCacheSpec, num_tokens: int) -> int:
    """The most of `rest_bytes` over one block, or one chunk where layers are chunked, up to
    `num_tokens`.

    The unfinished block makes the difference, and that a chunk is let go of where the next one
    begins.
    """
    chunks = [layer.window or 0 for layer in spec.layers if layer.kind == "chunked"]
    span = max(spec.block_size, *chunks, 1)
    return max(rest_bytes(spec, n) for n in range(max(1, num_tokens - span), num_tokens + 1))


def disk_bytes(spec: KVCacheSpec, num_tokens: int) -> int:
    """Of a resting agent's files, headers aside. States at the ends of earlier prompts come on top."""
    tail = num_tokens % spec.block_size
    last_state = spec.state_bytes if num_tokens % spec.state_interval else 0
    return sealed_bytes(spec, num_tokens - tail) + tail * spec.dense_bytes + last_state


def open_block_bytes(spec: KVCacheSpec) -> int:
    """What the unfinished block takes at most, one token before it is sealed."""
    return (spec.block_size - 1) * spec.dense_bytes


def beyond_windows(spec: KVCacheSpec) -> int:
    """Bytes in RAM of each further token, once windows are full."""
    return sum(
        nbytes
        for stack, nbytes in zip(spec.stacks, spec.stack_bytes, strict=True)
        if spec.layers[stack[0]].window is None
    )


def kinds(spec: KVCacheSpec) -> list[KindRow]:
    """One row a stack, recurrent ones last."""
    rows = [_kind_row(spec, stack, spec.stack_bytes[s]) for s, stack in enumerate(spec.stacks)]
    return rows + [_kind_row(spec, stack, 0) for stack in spec.state_stacks]


def _kind_row(spec: KVCacheSpec, stack: Sequence[int], sealed: int) -> KindRow:
    layer, count = spec.layers[stack[0]], len(stack)
    fixed = None
    if layer.kind == "recurrent":
        fixed = KVCacheSpec(tuple(spec.layers[i] for i in stack), spec.dtype).state_bytes
    elif layer.window is not None:
        fixed = -(-(layer.window - 1) // spec.block_size) * spec.block_size * sealed
    return KindRow(
        layer.kind,
        count,
        layer.window,
        layer.num_kv_heads,
        layer.k_dim,
        layer.v_dim,
        layer.attention_sinks,
        _fp16_layer_bytes(layer) * count,
        sealed,
        fixed,
    )
