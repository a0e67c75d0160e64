"""KVCacheSpec: what a model's cache is made of, and what of it a sequence needs.

trace.py reads it off a model.
"""

import math
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from typing import ClassVar, Literal

import mlx.core as mx

from ..tensors import stack_part, state_part

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
    """Return how a head of `dim` values is coded: values, padded to whole groups, and the group.

    The values of a group share a scale and a bias.
    """
    padded = {group: -(-dim // group) * group for group in (QUANT_GROUP, 32)}
    group = min(padded, key=lambda g: coded_bytes(padded[g], g, 4))
    return padded[group], group


def coded_bytes(padded: int, group: int, bits: int) -> int:
    """Count the bytes of one head: codes, and a scale and a bias of 16 bits for each group."""
    return padded * bits // 8 + padded // group * 4


@dataclass(frozen=True, repr=False)
class LayerSpec:
    """One cache object of the model: what it holds, and which of it a token sees.

    There is a class for each kind. A layer has keys and values, or it is recurrent and has `state`
    and none of the fields before.
    """

    num_kv_heads: int = 0
    k_dim: int = 0
    v_dim: int = 0
    # of a sliding window: tokens that a token sees, itself included; of chunks: tokens of one
    window: int | None = None
    attention_sinks: bool = False  # the layer hands sink logits to its softmax (gpt-oss)
    # the model computes with what the cache returns, not by attention through the seam
    model_attends: bool = False
    # shape and dtype ("float32") of each array, for a batch of one
    state: tuple[tuple[tuple[int, ...], str], ...] = ()

    kind: ClassVar[str] = ""  # its name, for people and for the fingerprint

    def __repr__(self) -> str:
        """Show all fields. Stored caches are found by a fingerprint over this text."""
        shown = [f"{field.name}={getattr(self, field.name)!r}" for field in fields(self)]
        return f"LayerSpec(kind={self.kind!r}, {', '.join(shown)})"

    @property
    def dims(self) -> tuple[int, int]:
        """Dims of a head: of keys, of values."""
        return self.k_dim, self.v_dim

    @property
    def token_values(self) -> int:
        """Numbers that the layer holds for each token."""
        return self.num_kv_heads * (self.k_dim + self.v_dim)

    @property
    def stack_key(self) -> tuple[object, ...]:
        """What layers have in common that are stacked in one tensor."""
        return type(self), replace(self, attention_sinks=False)

    @property
    def stepwise(self) -> bool:
        """Tell whether a pass must not cross the end of a block.

        It must not where what the model gets is of one position.
        """
        return self.model_attends

    @property
    def centred(self) -> bool:
        """Tell whether a vector may be subtracted from all keys.

        Where sink logits join the softmax, a constant for each query does not cancel. A model that
        attends by itself gets keys with the vector added again.
        """
        return self.model_attends or not self.attention_sinks

    @property
    def period(self) -> int:
        """Tokens after which what a token sees starts over: 1 where it does not."""
        return 1

    def first_visible(self, position: int) -> int:
        """Return the earliest position whose key and value the token at `position` sees."""
        return 0

    def sees(self, rows: mx.array, columns: mx.array) -> mx.array:
        """Tell whether the positions `rows` see `columns`: bool, in their common shape."""
        return columns <= rows


class FullAttention(LayerSpec):
    """A token sees all tokens before it."""

    kind = "global"


class LatentAttention(FullAttention):
    """MLA: what is cached is one latent vector for all heads."""

    kind = "latent"


class SlidingWindow(LayerSpec):
    """A token sees the last `window` tokens, itself included."""

    kind = "sliding"

    def first_visible(self, position: int) -> int:
        assert self.window is not None
        return max(0, position - self.window + 1)

    def sees(self, rows: mx.array, columns: mx.array) -> mx.array:
        assert self.window is not None
        return (columns <= rows) & (rows < columns + self.window)


class ChunkedAttention(LayerSpec):
    """A token sees the tokens before it in its chunk of `window` tokens (llama 4)."""

    kind = "chunked"

    @property
    def period(self) -> int:
        assert self.window is not None
        return self.window

    def first_visible(self, position: int) -> int:
        assert self.window is not None
        return position // self.window * self.window

    def sees(self, rows: mx.array, columns: mx.array) -> mx.array:
        assert self.window is not None
        return (columns <= rows) & (columns >= rows // self.window * self.window)


class Recurrent(LayerSpec):
    """A token sees a state, which the tokens before it have changed (SSM, gated delta, conv)."""

    kind = "recurrent"

    @property
    def stepwise(self) -> bool:
        return True

    @property
    def centred(self) -> bool:
        return False


@dataclass(frozen=True)
class OpaqueCaches:
    """A model whose caches only mlx-lm's own classes can hold.

    It is served correctly, but nothing is kept after an answer.
    """

    reason: str
    fixed_bytes: int  # of a running sequence's caches
    token_bytes: int  # and for each token


@dataclass(frozen=True)
class KVCacheSpec:
    """Shapes and precision of one model's cache.

    Layers of one kind and shape are stacked in one tensor.
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
        """The reason, in words, that blocks are not quantized although that was asked for."""
        bits = _BITS[self.kv_bits]
        if bits is None:
            return None
        dims = sorted({dim for layer in self.layers for dim in layer.dims if dim})
        no_gain = [
            d for d in dims if coded_bytes(*coded_shape(d), max(bits)) >= d * self.dtype.size
        ]
        if no_gain:
            return (
                f"head dims {no_gain} are too small to take fewer bytes as codes: "
                "blocks keep the model's dtype"
            )
        return None if dims else "no layer has keys and values"

    @cached_property
    def dense_bytes(self) -> int:
        """Bytes of one token in the model's dtype, all layers."""
        return sum(layer.token_values for layer in self.layers) * self.dtype.size

    @cached_property
    def sealed_bytes(self) -> int:
        """Bytes of one token in a sealed block, all layers; sinks come on top."""
        return sum(self.stack_bytes)

    @cached_property
    def stack_bytes(self) -> tuple[int, ...]:
        """Bytes of one token in a sealed block, by stack."""
        return tuple(len(stack) * self._layer_bytes(self.layers[stack[0]]) for stack in self.stacks)

    def _layer_bytes(self, layer: LayerSpec) -> int:
        if self.bits is None:
            return layer.token_values * self.dtype.size
        sizes = zip(layer.dims, self.bits, strict=True)
        return layer.num_kv_heads * sum(coded_bytes(*coded_shape(dim), bits) for dim, bits in sizes)

    @cached_property
    def state_bytes(self) -> int:
        """Bytes of one snapshot of the recurrent state, all layers."""
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
            if isinstance(layer, Recurrent) is recurrent:
                by_shape.setdefault(layer.stack_key, []).append(index)
        return tuple(tuple(stack) for stack in by_shape.values())

    @cached_property
    def position_in_stack(self) -> tuple[tuple[int, int], ...]:
        """Place of each layer: index of its stack, or of its state stack, and index within it."""
        both = (self.stacks, self.state_stacks)
        where = {
            layer: (s, i)
            for stacks in both
            for s, stack in enumerate(stacks)
            for i, layer in enumerate(stack)
        }
        return tuple(where[i] for i in range(len(self.layers)))

    @cached_property
    def resumes_at_snapshots(self) -> bool:
        """Tell whether a sequence goes on only from where there is a snapshot of its state."""
        return bool(self.state_stacks)

    @cached_property
    def needs_all_parts(self) -> bool:
        """Tell whether a sequence needs all of all its blocks, from wherever it goes on."""
        return not self.state_stacks and all(layer.window is None for layer in self.layers)

    @cached_property
    def stepwise(self) -> bool:
        """Tell whether a forward pass must not cross the end of a block."""
        return any(layer.stepwise for layer in self.layers)

    @cached_property
    def model_attends_somewhere(self) -> bool:
        """Tell whether the model attends by itself in some layer."""
        return any(layer.model_attends for layer in self.layers)

    @cached_property
    def window_blocks(self) -> tuple[int | None, ...]:
        """Blocks of a window, rounded up, for each stack; None: the stack has no window.

        It counts bytes. What a sequence needs of a block is said by `needed`.
        """
        windows = [self.layers[stack[0]].window for stack in self.stacks]
        return tuple(None if w is None else -(-w // self.block_size) for w in windows)

    @cached_property
    def lasting_parts(self) -> frozenset[str]:
        """Stacks of layers that see all of a sequence: what is needed of every block."""
        blocks = enumerate(self.window_blocks)
        return frozenset(stack_part(s) for s, seen in blocks if seen is None)

    def first_visible(self, position: int) -> int:
        """Return the earliest position that the token at `position` sees in a layer with a window.

        It is `position` where no layer has one.
        """
        windowed = (layer for layer in self.layers if layer.window is not None)
        return min((layer.first_visible(position) for layer in windowed), default=position)

    def needed(self, index: int, position: int) -> frozenset[str]:
        """Return the parts (tensors.TensorName) of block `index` that a sequence needs.

        It goes on from `position`, in the block or after it, and needs whole stacks, as far as the
        next token sees into the block, all of them of a block that is cut inside; and the recurrent
        state at `position`, of the block that it lies in or ends.
        """
        start, stop = index * self.block_size, (index + 1) * self.block_size
        cut = start < position < stop
        parts = {
            stack_part(s)
            for s, stack in enumerate(self.stacks)
            if cut or self.layers[stack[0]].first_visible(position) < min(stop, position)
        }
        if self.resumes_at_snapshots and start < position <= stop:
            parts.add(state_part(position - start))
        return frozenset(parts)

    def identity(self) -> str:
        """Return everything that gives a stored byte its meaning, as text for the fingerprint."""
        return repr((self.layers, str(self.dtype), self.kv_bits, self.block_size, self.num_sinks))


MAX_STATE_INTERVAL = 4096


def default_state_interval(spec: KVCacheSpec) -> int:
    """Return the tokens between two snapshots of recurrent state.

    They are as many as take the bytes of a snapshot, 4096 at most: measured by
    benchmarks/state_interval.py, see docs/architecture.md.
    """
    return min(MAX_STATE_INTERVAL, max(1, -(-spec.state_bytes // max(spec.sealed_bytes, 1))))


def describe(spec: KVCacheSpec) -> str:
    """Say in words what layers there are, and how each is kept."""
    if spec.opaque is not None:
        kept = "mlx-lm's own, in full precision; nothing is kept after an answer"
        return f"{kept}: {spec.opaque.reason}"
    kinds = ", ".join(_describe_stack(spec, stack) for stack in (*spec.stacks, *spec.state_stacks))
    kept = {
        "16": "in the model's own type",
        "k5v3": "in 5 (keys) and 3 bits",
        "k5v4": "in 5 (keys) and 4 bits",
    }.get(spec.kv_bits, f"in {spec.kv_bits} bits")
    if spec.unquantized_reason:
        kept = f"in the model's own type ({spec.unquantized_reason})"
    blocks = [f"keys and values {kept}, {spec.sealed_bytes:,} bytes a token"] if spec.stacks else []
    states = (
        f"recurrent state in full precision, {spec.state_bytes:,} bytes every "
        f"{spec.state_interval:,} tokens"
    )
    return f"{kinds}; " + "; ".join(blocks + ([states] if spec.state_stacks else []))


def _describe_stack(spec: KVCacheSpec, stack: tuple[int, ...]) -> str:
    layer = spec.layers[stack[0]]
    text = f"{len(stack)} {layer.kind}"
    if isinstance(layer, Recurrent):
        return text
    over = f" over {layer.window:,}" if layer.window else ""
    dims = f"{layer.k_dim}" if layer.k_dim == layer.v_dim else f"{layer.k_dim}/{layer.v_dim}"
    sinks = ", with sinks" if layer.attention_sinks else ""
    return f"{text}{over} ({layer.num_kv_heads} heads of {dims}{sinks})"
