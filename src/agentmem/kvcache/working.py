"""Working copies: what attention of one layer of one running sequence reads, dequantized or as codes."""

from collections.abc import Sequence

import mlx.core as mx

from .attention import FEW_QUERIES, attend_codes, attend_dense
from .block import TOKENS, Arrays, concatenate_codes, values
from .quantize import Codes, decode, sealed_bytes
from .spec import KVCacheSpec

STEP = 256  # tokens by which a working copy grows
CodesPair = tuple[Codes, Codes]  # of keys and of values
DensePair = tuple[mx.array, mx.array]


def capacity_for(num_tokens: int) -> int:
    """Working copies grow in steps."""
    return -(-num_tokens // STEP) * STEP


def working_bytes(spec: KVCacheSpec, num_tokens: int, *, on_codes: bool) -> int:
    """RAM of a running sequence's working copy with room for `num_tokens` tokens, all layers."""
    if not on_codes or spec.bits is None:
        return capacity_for(num_tokens) * spec.dense_bytes
    sealed = num_tokens // spec.block_size * spec.block_size
    return capacity_for(spec.block_size) * spec.dense_bytes + sealed_bytes(spec, sealed)


def _replace(old: Codes, new: Codes, start: int, stop: int) -> Codes:
    """`old` with tokens start..stop-1 from `new`; start may be its end."""
    pairs = zip(old, new, strict=True)
    return Codes(*(mx.concatenate([a[:, :, :start], b, a[:, :, stop:]], TOKENS) for a, b in pairs))


class DenseLayer:
    """One layer's working copy, dequantized: k, v [1, H, capacity, D]. Sealed tokens hold the value of their codes."""

    def __init__(self, spec: KVCacheSpec, layer: int):
        self._spec, self._layer = spec, spec.layers[layer]
        shape = (1, self._layer.num_kv_heads, 0)
        self.k = mx.zeros((*shape, self._layer.k_dim), spec.dtype)
        self.v = mx.zeros((*shape, self._layer.v_dim), spec.dtype)

    def load(self, sources: Sequence[Arrays], ends: Arrays, capacity: int) -> None:
        """Start from `sources`, this layer's part of blocks, then `ends`: k.full, v.full of the open block."""
        self.k, self.v = (self._assemble(part, sources, ends, capacity) for part in ("k", "v"))

    def _assemble(self, part: str, sources: Sequence[Arrays], ends: Arrays, capacity: int) -> mx.array:
        pieces = values(sources, part, self._spec) if sources else []
        pieces += [ends[f"{part}.full"]] if ends else []
        length = sum(p.shape[TOKENS] for p in pieces)
        shape = list(pieces[0].shape)
        shape[TOKENS] = capacity_for(max(capacity, length)) - length
        return mx.concatenate([*pieces, mx.zeros(shape, self._spec.dtype)], TOKENS)

    def reserve(self, num_tokens: int) -> None:
        have = self.k.shape[TOKENS]
        if num_tokens > have:
            more = capacity_for(num_tokens) - have
            self.k, self.v = (mx.pad(x, [(0, 0), (0, 0), (0, more), (0, 0)]) for x in (self.k, self.v))

    def write(self, start: int, k: mx.array, v: mx.array) -> None:
        stop = start + k.shape[TOKENS]
        self.reserve(stop)
        self.k[:, :, start:stop] = k
        self.v[:, :, start:stop] = v

    def attend(self, q: mx.array, stop: int, scale: float, sinks: mx.array | None) -> mx.array:
        return attend_dense(q, self.k[:, :, :stop], self.v[:, :, :stop], scale, self._layer.window, sinks)

    def read(self, start: int, stop: int) -> tuple[mx.array, mx.array]:
        return self.k[:, :, start:stop], self.v[:, :, start:stop]

    def seal(self, start: int, codes: CodesPair, sinks: DensePair | None) -> None:
        """Tokens from `start` become what `codes` stand for; the first of them, where given, `sinks`."""
        assert self._spec.bits is not None
        stop = start + codes[0].packed.shape[TOKENS]
        k, v = (decode(c, bits, self._spec.dtype) for c, bits in zip(codes, self._spec.bits, strict=True))
        self.k[:, :, start:stop] = k
        self.v[:, :, start:stop] = v
        if sinks is not None:
            self.write(start, *sinks)

    def arrays(self) -> list[mx.array]:
        return [self.k, self.v]


class CodesLayer:
    """One layer's working copy that stays codes: about 0.28 of the dense one in RAM. The open block is dense."""

    def __init__(self, spec: KVCacheSpec, layer: int):
        self._spec, self._layer = spec, spec.layers[layer]
        self._sealed = 0
        self._codes: CodesPair | None = None
        self._first: DensePair | None = None  # sinks
        self._open = DenseLayer(spec, layer)

    def load(self, sources: Sequence[Arrays], ends: Arrays, capacity: int) -> None:
        blocks = [s for s in sources if s["k.packed"].shape[TOKENS] == self._spec.block_size]
        open_parts = sources[len(blocks) :]
        if open_parts or ends:
            self._open.load(open_parts, ends, self._spec.block_size)
        if blocks:
            self._codes = concatenate_codes(blocks, "k"), concatenate_codes(blocks, "v")
            self._first = blocks[0]["k.sinks"], blocks[0]["v.sinks"]
            self._sealed = len(blocks) * self._spec.block_size

    def reserve(self, num_tokens: int) -> None:
        self._open.reserve(self._spec.block_size)

    def write(self, start: int, k: mx.array, v: mx.array) -> None:
        self._open.write(start - self._sealed, k, v)

    def attend(self, q: mx.array, stop: int, scale: float, sinks: mx.array | None) -> mx.array:
        k, v = self._open.read(0, stop - self._sealed)
        if self._codes is None:
            return attend_dense(q, k, v, scale, self._layer.window, sinks)
        assert self._first is not None and self._spec.bits is not None
        if q.shape[2] <= FEW_QUERIES and self._layer.window is None and sinks is None:
            return attend_codes(q, *self._codes, *self._first, k, v, scale, self._spec.bits)
        k, v = (self._dense(i, part) for i, part in enumerate((k, v)))
        return attend_dense(q, k, v, scale, self._layer.window, sinks)

    def _dense(self, i: int, open_part: mx.array) -> mx.array:
        """Keys (i = 0) or values (1) of all tokens, decoded for this one call."""
        assert self._codes is not None and self._first is not None and self._spec.bits is not None
        first = self._first[i]
        sealed = decode(self._codes[i], self._spec.bits[i], self._spec.dtype)
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
            k, v = (_replace(old, new, start, stop) for old, new in zip(self._codes, codes, strict=True))
            self._codes = k, v
        self._sealed = max(self._sealed, stop)

    def arrays(self) -> list[mx.array]:
        kept = [a for pair in (self._codes or ()) for a in pair] + list(self._first or ())
        return kept + self._open.arrays()
