"""KVCacheSpec: what a model's cache is made of, and what of it a sequence needs. trace.py reads it
off a model.
"""

import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import mlx.core as mx

from ..tensors import stack_part, state_part

LayerKind = Literal["global", "sliding", "chunked", "latent", "recurrent"]
KVBits = Literal["4", "k5v3", "k5v4", "8", "16"]

QUANT_GROUP = 64
_BITS: dict[KVBits, tuple[int, int] | None] = {
    "4": (4, 4),
    "k5v3": (5, 3),  # no larger than 4
    "k5v4": (5, 4),
    "8": (8, 8),
    "16": None,
}


@cache
def coded_shape(dim: int) -> tuple[int, int]:
    """How a head of `dim` values is coded: (values, padded to whole groups; group that shares a
    scale and a bias).
    """
    padded = {group: -(-dim // group) * group for group in (QUANT_GROUP, 32)}
    group = min(padded, key=lambda g: coded_bytes(padded[g], g, 4))
    return padded[group], group


def coded_bytes(padded: int, group: int, bits: int) -> int:
    """Of one head: codes, and a scale and a bias of 16 bits for each group."""
    return padded * bits // 8 + padded // group * 4


@dataclass(frozen=True)
class LayerSpec:
    """One cache object of the model. A recurrent one has `state` and none of the fields between."""

    kind: LayerKind
    num_kv_heads: int = 0
    k_dim: int = 0
    v_dim: int = 0
    # sliding: tokens that a token sees, itself included; chunked: tokens of a chunk
    window: int | None = None
    attention_sinks: bool = False  # the layer hands sink logits to its softmax (gpt-oss)
    # the model computes with what the cache returns, not by attention through the seam
    model_attends: bool = False
    state: tuple[
        tuple[tuple[int, ...], str], ...
    ] = ()  # shape and dtype ("float32") of each array, batch of one

    @property
    def dims(self) -> tuple[int, int]:
        return self.k_dim, self.v_dim

    @property
    def stack_key(self) -> tuple[object, ...]:
        return (
            self.kind,
            self.window,
            self.num_kv_heads,
            self.k_dim,
            self.v_dim,
            self.model_attends,
            self.state,
        )

    def first_visible(self, position: int) -> int:
        """The earliest position whose key and value the token at `position` sees."""
        if self.window is None:
            return 0
        if self.kind == "chunked":
            return position // self.window * self.window
        return max(0, position - self.window + 1)


@dataclass(frozen=True)
class OpaqueCaches:
    """A model whose caches only mlx-lm's own classes can hold: correct, but nothing is kept after
    an answer.
    """

    reason: str
    fixed_bytes: int  # of a running sequence's caches
    token_bytes: int  # and for each token


@dataclass(frozen=True)
class KVCacheSpec:
    """Shapes and precision of one model's cache. Layers of one kind and shape are stacked in one
    tensor.
    """

    layers: tuple[LayerSpec, ...]
    dtype: mx.Dtype  # of keys and values as the model makes them
    slots: tuple[
        int | tuple[int, ...], ...
    ] = ()  # where `layers` belong in the list of caches that the model takes
    kv_bits: KVBits = "4"
    block_size: int = 256
    num_sinks: int = 4  # first tokens of a sequence, kept in full precision
    opaque: OpaqueCaches | None = None  # then there are no `layers`
    # tokens between two snapshots of recurrent state; a multiple of block_size
    state_interval: int = 2048

    @cached_property
    def bits(self) -> tuple[int, int] | None:
        """Bits of (keys, values); None where blocks keep the model's dtype."""
        return _BITS[self.kv_bits] if not self.unquantized_reason else None

    @cached_property
    def unquantized_reason(self) -> str | None:
        """In words, why blocks stay in full precision although fewer bits were asked for; else
        None.
        """
        bits = _BITS[self.kv_bits]
        if bits is None:
            return None
        dims = sorted({dim for layer in self.layers for dim in layer.dims if dim})
        no_gain = [
            d for d in dims if coded_bytes(*coded_shape(d), max(bits)) >= d * self.dtype.size
        ]
        if no_gain:
            return f"head dims {no_gain} are too small to take fewer bytes as codes: blocks keep the model's dtype"
        return None if dims else "no layer has keys and values"

    @cached_property
    def dense_bytes(self) -> int:
        """Of one token in the model's dtype, all layers."""
        return (
            sum(layer.num_kv_heads * (layer.k_dim + layer.v_dim) for layer in self.layers)
            * self.dtype.size
        )

    @cached_property
    def sealed_bytes(self) -> int:
        """Of one token in a sealed block, all layers; sinks come on top."""
        return sum(self.stack_bytes)

    @cached_property
    def stack_bytes(self) -> tuple[int, ...]:
        """By stack: of one token in a sealed block."""
        return tuple(len(stack) * self._layer_bytes(self.layers[stack[0]]) for stack in self.stacks)

    def _layer_bytes(self, layer: LayerSpec) -> int:
        if self.bits is None:
            return layer.num_kv_heads * sum(layer.dims) * self.dtype.size
        sizes = zip(layer.dims, self.bits, strict=True)
        return layer.num_kv_heads * sum(coded_bytes(*coded_shape(dim), bits) for dim, bits in sizes)

    @cached_property
    def state_bytes(self) -> int:
        """Of one snapshot of the recurrent state, all layers."""
        arrays = (array for layer in self.layers for array in layer.state)
        return sum(math.prod(shape) * getattr(mx, dtype).size for shape, dtype in arrays)

    @cached_property
    def stacks(self) -> tuple[tuple[int, ...], ...]:
        """Indices of attention layers by kind and shape, in order of first appearance."""
        return self._stacked(recurrent=False)

    @cached_property
    def state_stacks(self) -> tuple[tuple[int, ...], ...]:
        """The same of recurrent layers."""
        return self._stacked(recurrent=True)

    def _stacked(self, *, recurrent: bool) -> tuple[tuple[int, ...], ...]:
        by_shape: dict[tuple[object, ...], list[int]] = {}
        for index, layer in enumerate(self.layers):
            if (layer.kind == "recurrent") is recurrent:
                by_shape.setdefault(layer.stack_key, []).append(index)
        return tuple(tuple(stack) for stack in by_shape.values())

    @cached_property
    def position_in_stack(self) -> tuple[tuple[int, int], ...]:
        """For each layer: (index of its stack, or of its state stack, index within it)."""
        both = (self.stacks, self.state_stacks)
        where = {
            layer: (s, i)
            for stacks in both
            for s, stack in enumerate(stacks)
            for i, layer in enumerate(stack)
        }
        return tuple(where[i] for i in range(len(self.layers)))

    @cached_property
    def recurrent(self) -> bool:
        """A sequence goes on only from where there is a snapshot of its state."""
        return bool(self.state_stacks)

    @cached_property
    def stepwise(self) -> bool:
        """A forward pass must not cross a block boundary: recurrent state, and what is fetched, are
        of one position.
        """
        return any(layer.kind == "recurrent" or layer.model_attends for layer in self.layers)

    @cached_property
    def windowed(self) -> bool:
        """Some layers don't see all of a sequence."""
        return any(layer.window is not None for layer in self.layers)

    @cached_property
    def lasting_parts(self) -> frozenset[str]:
        """Stacks of layers that see all of a sequence: what is needed of every block."""
        return frozenset(
            stack_part(s)
            for s, stack in enumerate(self.stacks)
            if self.layers[stack[0]].window is None
        )

    def needed(self, index: int, position: int) -> frozenset[str]:
        """Parts (tensors.part_of) of block `index` that a sequence needs to go on from `position`,
        in it or after.

        Whole stacks, as far as the next token sees into the block, all of them of a block that is
        cut inside; the recurrent state at `position`, for the block that it lies in or ends.
        """
        start, stop = index * self.block_size, (index + 1) * self.block_size
        cut = start < position < stop
        parts = {
            stack_part(s)
            for s, stack in enumerate(self.stacks)
            if cut or self.layers[stack[0]].first_visible(position) < min(stop, position)
        }
        if self.recurrent and start < position <= stop:
            parts.add(state_part(position - start))
        return frozenset(parts)

    def identity(self) -> str:
        """Everything that gives a stored byte its meaning, as text for the fingerprint."""
        return repr((self.layers, str(self.dtype), self.kv_bits, self.block_size, self.num_sinks))


MAX_STATE_INTERVAL = 4096


def default_state_interval(spec: KVCacheSpec) -> int:
    """Tokens between two snapshots of recurrent state: as many as take the bytes of one, 4096 at
    most.

    Measured by benchmarks/state_interval.py, see docs/architecture.md.
    """
    return min(MAX_STATE_INTERVAL, max(1, -(-spec.state_bytes // max(spec.sealed_bytes, 1))))


def describe(spec: KVCacheSpec) -> str:
    """In words: what layers there are, and how each is kept."""
    if spec.opaque is not None:
        return f"mlx-lm's own, in full precision; nothing is kept after an answer: {spec.opaque.reason}"
    kinds = ", ".join(_describe_stack(spec, stack) for stack in (*spec.stacks, *spec.state_stacks))
    kept = {
        "16": "in the model's own type",
        "k5v3": "in 5 (keys) and 3 bits",
        "k5v4": "in 5 (keys) and 4 bits",
    }.get(spec.kv_bits, f"in {spec.kv_bits} bits")
    if spec.unquantized_reason:
        kept = f"in the model's own type ({spec.unquantized_reason})"
    blocks = [f"keys and values {kept}, {spec.sealed_bytes:,} bytes a token"] if spec.stacks else []
    states = f"recurrent state in full precision, {spec.state_bytes:,} bytes every {spec.state_interval:,} tokens"
    return f"{kinds}; " + "; ".join(blocks + ([states] if spec.recurrent else []))


def _describe_stack(spec: KVCacheSpec, stack: tuple[int, ...]) -> str:
    layer = spec.layers[stack[0]]
    text = f"{len(stack)} {layer.kind}"
    if layer.kind == "recurrent":
        return text
    over = f" over {layer.window:,}" if layer.window else ""
    dims = f"{layer.k_dim}" if layer.k_dim == layer.v_dim else f"{layer.k_dim}/{layer.v_dim}"
    return f"{text}{over} ({layer.num_kv_heads} heads of {dims}{', with sinks' if layer.attention_sinks else ''})"
