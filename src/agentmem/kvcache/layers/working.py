"""Working copies: what one layer of one running sequence computes with, dequantized, as codes, or
as state.
"""

from collections.abc import Sequence

import mlx.core as mx

from ..attention import FEW_QUERIES, attend_codes, attend_dense
from ..block import TOKENS, Arrays, concatenate_codes
from ..quantize import Codes, LayerCodec, Stored
from ..spec import KVCacheSpec, LayerSpec

STEP = 256  # tokens by which a working copy grows
CodesPair = tuple[Codes, Codes]  # of keys and of values
DensePair = tuple[mx.array, mx.array]


def capacity_for(num_tokens: int) -> int:
    """Working copies grow in steps."""
    return -(-num_tokens // STEP) * STEP


def _window_capacity(spec: KVCacheSpec, layer: LayerSpec) -> int:
    """Tokens that a windowed layer's working copy has room for: those seen, the open block, and
    some to move rarely.
    """
    assert layer.window is not None
    return capacity_for(layer.window + spec.block_size + STEP)


def _replace(old: Codes, new: Codes, start: int, stop: int) -> Codes:
    """`old` with tokens start..stop-1 from `new`; start may be its end."""
    pairs = zip(old, new, strict=True)
    return Codes(*(mx.concatenate([a[:, :, :start], b, a[:, :, stop:]], TOKENS) for a, b in pairs))


def values(
    sources: Sequence[Arrays], part: str, codec: LayerCodec, *, quantized: bool
) -> list[mx.array]:
    """What one layer's part of consecutive blocks stands for: pieces [1, H, n, D], in order.

    `part` is "k" or "v"; names come without the stack ("k.packed"). The first of `sources` may
    carry sinks.
    """
    if not quantized:
        return [s[f"{part}.full"] for s in sources]
    if codec.layer.model_attends:
        dense = [codec.decode(part, concatenate_codes([s], part)) for s in sources]
    else:
        dense = [codec.decode(part, concatenate_codes(sources, part))]
    sinks = sources[0].get(f"{part}.sinks")
    return dense if sinks is None else [sinks, dense[0][:, :, sinks.shape[TOKENS] :], *dense[1:]]


class DenseLayer:
    """One layer's working copy, dequantized: keys and values [1, H, capacity, D], stored as `join`
    gives them. Sealed tokens hold the value of their codes.

    A windowed layer's holds what can still be seen, and the open block.
    """

    def __init__(self, spec: KVCacheSpec, codec: LayerCodec):
        self._spec, self._codec, self._layer = spec, codec, codec.layer
        self._base = 0  # position of the first token here
        self._stored = self._empty(0)

    def _empty(self, capacity: int) -> Stored:
        heads, (k_dim, v_dim) = self._layer.num_kv_heads, self._layer.dims
        shapes = [(2 * heads, k_dim)] if k_dim == v_dim else [(heads, k_dim), (heads, v_dim)]
        return tuple(mx.zeros((1, n, capacity, dim), self._spec.dtype) for n, dim in shapes)

    @property
    def _capacity(self) -> int:
        return self._stored[0].shape[TOKENS]

    def _place(self, i: int, start: int, stop: int) -> tuple[mx.array, tuple[slice, ...]]:
        """The array and the index in it of keys (i = 0) or values (1) of positions start..stop-1."""
        span = slice(start - self._base, stop - self._base)
        if len(self._stored) == 2:
            return self._stored[i], (slice(None), slice(None), span)
        heads = self._layer.num_kv_heads
        return self._stored[0], (slice(None), slice(i * heads, (i + 1) * heads), span)

    def _put(self, i: int, start: int, x: mx.array) -> None:
        stored, at = self._place(i, start, start + x.shape[TOKENS])
        stored[at] = x

    def read(self, start: int, stop: int) -> DensePair:
        (k, at_k), (v, at_v) = (self._place(i, start, stop) for i in (0, 1))
        return k[at_k], v[at_v]

    def load(self, sources: Sequence[Arrays], ends: Arrays, base: int, capacity: int) -> None:
        """Start from `sources`, this layer's part of blocks from position `base` on, then `ends`,
        the open block's.
        """
        self._base = base
        pieces = [self._pieces(part, sources, ends) for part in ("k", "v")]
        length = sum(p.shape[TOKENS] for p in pieces[0])
        self._stored = self._empty(self._room_for(max(capacity, base + length)))
        for i, of_part in enumerate(pieces):
            at = base
            for piece in of_part:
                self._put(i, at, piece)
                at += piece.shape[TOKENS]

    def _pieces(self, part: str, sources: Sequence[Arrays], ends: Arrays) -> list[mx.array]:
        quantized = self._spec.bits is not None
        pieces = values(sources, part, self._codec, quantized=quantized) if sources else []
        return pieces + ([ends[f"{part}.full"]] if ends else [])

    def _room_for(self, stop: int) -> int:
        """Capacity to have for tokens up to `stop`."""
        most = capacity_for(stop - self._base)
        return (
            most
            if self._layer.window is None
            else min(most, _window_capacity(self._spec, self._layer))
        )

    def reserve(self, num_tokens: int) -> None:
        self._grow(self._room_for(num_tokens))

    def _grow(self, capacity: int) -> None:
        more = capacity - self._capacity
        if more > 0:
            self._stored = tuple(
                mx.pad(x, [(0, 0), (0, 0), (0, more), (0, 0)]) for x in self._stored
            )

    def write(self, start: int, new: Stored) -> None:
        stop = start + new[0].shape[TOKENS]
        if stop - self._base > self._capacity:
            self._make_room(start, stop)
        for old, x in zip(self._stored, new, strict=True):
            old[:, :, start - self._base : stop - self._base] = x

    def _make_room(self, start: int, stop: int) -> None:
        """For tokens start..stop-1: a windowed layer first lets go of what no later token sees."""
        unseen = min(
            self._layer.first_visible(start), start // self._spec.block_size * self._spec.block_size
        )
        gone = unseen - self._base
        if self._layer.window is not None and gone > 0:
            self._base = unseen
            self._stored = tuple(x[:, :, gone:] for x in self._stored)
        self._grow(max(self._room_for(stop), stop - self._base))

    def visible(self, start: int, stop: int) -> tuple[mx.array, mx.array, int]:
        """Keys and values that positions start..stop-1 see, up to the last one's own; position of
        the first.
        """
        first = max(self._layer.first_visible(start), self._base)
        k, v = self.read(first, stop)
        return k, v, first

    def attend(self, q: mx.array, stop: int, scale: float, sinks: mx.array | None) -> mx.array:
        """q [1, Hq, n, D] of the n positions before `stop`."""
        k, v, first = self.visible(stop - q.shape[2], stop)
        return attend_dense(q, k, v, scale, self._layer, first, sinks)

    def kept(self, stop: int) -> mx.array:
        """All keys that are here up to position `stop`."""
        return self.read(self._base, stop)[0]

    def seal(self, start: int, codes: CodesPair, sinks: DensePair | None) -> None:
        """Tokens from `start` become what `codes` stand for; the first of them, where given,
        `sinks`.
        """
        k, v = (self._codec.decode(part, c) for part, c in zip("kv", codes, strict=True))
        if sinks is not None:
            k, v = (
                mx.concatenate([s, x[:, :, s.shape[TOKENS] :]], TOKENS)
                for s, x in zip(sinks, (k, v), strict=True)
            )
        self.replace(start, k, v)

    def replace(self, start: int, k: mx.array, v: mx.array) -> None:
        """Of tokens from `start`, all written before, those that are still here."""
        gone = max(0, self._base - start)
        for i, x in enumerate((k, v)):
            self._put(i, start + gone, x[:, :, gone:])

    def arrays(self) -> list[mx.array]:
        return list(self._stored)


class CodesLayer:
    """One layer's working copy that stays codes: about 0.28 of the dense one in RAM. The open block
    is dense.

    For attention over all tokens; a window is small, and stays dense.
    """

    def __init__(self, spec: KVCacheSpec, codec: LayerCodec):
        self._spec, self._codec, self._layer = spec, codec, codec.layer
        self._sealed = 0
        self._codes: CodesPair | None = None
        self._first: DensePair | None = None  # sinks
        self._open = DenseLayer(spec, codec)

    def load(self, sources: Sequence[Arrays], ends: Arrays, base: int, capacity: int) -> None:
        blocks = [s for s in sources if s["k.packed"].shape[TOKENS] == self._spec.block_size]
        open_parts = sources[len(blocks) :]
        if open_parts or ends:
            self._open.load(open_parts, ends, base, self._spec.block_size)
        if blocks:
            self._codes = concatenate_codes(blocks, "k"), concatenate_codes(blocks, "v")
            self._first = blocks[0]["k.sinks"], blocks[0]["v.sinks"]
            self._sealed = len(blocks) * self._spec.block_size

    def reserve(self, num_tokens: int) -> None:
        self._open.reserve(self._spec.block_size)

    def write(self, start: int, new: Stored) -> None:
        self._open.write(start - self._sealed, new)

    def attend(self, q: mx.array, stop: int, scale: float, sinks: mx.array | None) -> mx.array:
        k, v = self._open.read(0, stop - self._sealed)
        if self._codes is None:
            return attend_dense(q, k, v, scale, self._layer, 0, sinks)
        assert self._first is not None and self._spec.bits is not None
        if q.shape[2] <= FEW_QUERIES and sinks is None:
            return attend_codes(q, *self._codes, *self._first, k, v, scale, self._spec.bits)
        k, v = (self._dense(i, part) for i, part in enumerate((k, v)))
        return attend_dense(q, k, v, scale, self._layer, 0, sinks)

    def _dense(self, i: int, open_part: mx.array) -> mx.array:
        """Keys (i = 0) or values (1) of all tokens, decoded for this one call."""
        assert self._codes is not None and self._first is not None
        first, sealed = self._first[i], self._codec.decode("kv"[i], self._codes[i])
        return mx.concatenate([first, sealed[:, :, first.shape[TOKENS] :], open_part], TOKENS)

    def read(self, start: int, stop: int) -> tuple[mx.array, mx.array]:
        return self._open.read(start - self._sealed, stop - self._sealed)

    def seal(self, start: int, codes: CodesPair, sinks: DensePair | None) -> None:
        stop = start + codes[0].packed.shape[TOKENS]
        if sinks is not None:
            self._first = mx.contiguous(sinks[0]), mx.contiguous(sinks[1])
        if self._codes is None:
            self._codes = codes
        else:
            k, v = (
                _replace(old, new, start, stop) for old, new in zip(self._codes, codes, strict=True)
            )
            self._codes = k, v
        self._sealed = max(self._sealed, stop)

    def arrays(self) -> list[mx.array]:
        kept = [a for pair in (self._codes or ()) for a in pair] + list(self._first or ())
        return kept + self._open.arrays()


class RecurrentLayer:
    """One layer's state, [1, ...] each; None before the first token: what that stands for is the
    model's business.
    """

    def __init__(self, layer: LayerSpec):
        self.state: list[mx.array | None] = [None] * len(layer.state)

    def arrays(self) -> list[mx.array]:
        return [a for a in self.state if a is not None]


AttentionLayer = DenseLayer | CodesLayer


def working_bytes(spec: KVCacheSpec, num_tokens: int, *, on_codes: bool) -> int:
    """RAM of a running sequence's working copy with room for `num_tokens` tokens, all layers."""
    if spec.opaque is not None:
        return spec.opaque.fixed_bytes + capacity_for(num_tokens) * spec.opaque.token_bytes
    layers = sum(
        _layer_bytes(spec, s, num_tokens, on_codes=on_codes) for s in range(len(spec.stacks))
    )
    return layers + spec.state_bytes


def stays_codes(spec: KVCacheSpec, layer: LayerSpec, *, on_codes: bool) -> bool:
    """Whether a running sequence reads this layer's codes in place."""
    return on_codes and spec.bits is not None and layer.window is None and not layer.model_attends


def _layer_bytes(spec: KVCacheSpec, stack: int, num_tokens: int, *, on_codes: bool) -> int:
    layer, count = spec.layers[spec.stacks[stack][0]], len(spec.stacks[stack])
    dense = layer.num_kv_heads * sum(layer.dims) * spec.dtype.size * count
    if not stays_codes(spec, layer, on_codes=on_codes):
        most = (
            _window_capacity(spec, layer) if layer.window is not None else capacity_for(num_tokens)
        )
        return min(capacity_for(num_tokens), most) * dense
    sealed = num_tokens // spec.block_size * spec.block_size
    sinks = min(sealed, spec.num_sinks) * dense
    return capacity_for(spec.block_size) * dense + sealed * spec.stack_bytes[stack] + sinks
