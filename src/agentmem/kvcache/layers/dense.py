"""The working copy of a layer as dequantized keys and values."""

from collections.abc import Sequence

import mlx.core as mx

from ..attention import attend_dense
from ..backend import AttentionBackend
from ..block import Arrays
from ..quantize import TOKENS, LayerCodec, Stored
from ..spec import KVCacheSpec
from .kv import CodesPair, DensePair, KVLayer, most_capacity


class DenseLayer(KVLayer):
    """Keys and values [1, H, capacity, D], stored as `join` gives them.

    Sealed tokens hold the value of their codes. A layer with a window has what can still be seen,
    and the open block.
    """

    def __init__(self, spec: KVCacheSpec, codec: LayerCodec, backend: AttentionBackend):
        super().__init__(spec, codec, backend)
        self._base = 0  # position of the first token here
        self._stored = self._empty(0)

    @staticmethod
    def working_bytes(spec: KVCacheSpec, stack: int, num_tokens: int) -> int:
        """Count the bytes of a stack of such layers, with room for `num_tokens` tokens."""
        layers = spec.stacks[stack]
        layer = spec.layers[layers[0]]
        values = len(layers) * layer.token_values
        return most_capacity(spec, layer, num_tokens) * values * spec.dtype.size

    def _empty(self, capacity: int) -> Stored:
        heads, (k_dim, v_dim) = self.layer.num_kv_heads, self.layer.dims
        shapes = [(2 * heads, k_dim)] if k_dim == v_dim else [(heads, k_dim), (heads, v_dim)]
        return tuple(mx.zeros((1, n, capacity, dim), self._spec.dtype) for n, dim in shapes)

    @property
    def _capacity(self) -> int:
        return self._stored[0].shape[TOKENS]

    def _place(self, i: int, start: int, stop: int) -> tuple[mx.array, tuple[slice, ...]]:
        """Return the array and the index in it of keys (i = 0) or values (1) of positions."""
        span = slice(start - self._base, stop - self._base)
        if len(self._stored) == 2:
            return self._stored[i], (slice(None), slice(None), span)
        heads = self.layer.num_kv_heads
        return self._stored[0], (slice(None), slice(i * heads, (i + 1) * heads), span)

    def _put(self, i: int, start: int, x: mx.array) -> None:
        stored, at = self._place(i, start, start + x.shape[TOKENS])
        stored[at] = x

    def read(self, start: int, stop: int) -> DensePair:
        k, at_k = self._place(0, start, stop)
        v, at_v = self._place(1, start, stop)
        return k[at_k], v[at_v]

    def load(self, sources: Sequence[Arrays], ends: Arrays, base: int, capacity: int) -> None:
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
        """What one part ("k", "v") of consecutive blocks and the open one stands for, in order."""
        pieces = self._values(sources, part) if sources else []
        return pieces + ([ends[f"{part}.full"]] if ends else [])

    def _values(self, sources: Sequence[Arrays], part: str) -> list[mx.array]:
        """Decode `sources`, of which the first may carry sinks: pieces [1, H, n, D], in order."""
        if self._spec.bits is None:
            return [source[f"{part}.full"] for source in sources]
        dense = self.codec.decode_blocks(part, sources)
        sinks = sources[0].get(f"{part}.sinks")
        if sinks is None:
            return dense
        return [sinks, dense[0][:, :, sinks.shape[TOKENS] :], *dense[1:]]

    def _room_for(self, stop: int) -> int:
        """Capacity to have for tokens up to `stop`."""
        return most_capacity(self._spec, self.layer, stop - self._base)

    def reserve(self, num_tokens: int) -> None:
        self._grow(self._room_for(num_tokens))

    def _grow(self, capacity: int) -> None:
        more = capacity - self._capacity
        if more > 0:
            room = [(0, 0), (0, 0), (0, more), (0, 0)]
            self._stored = tuple(mx.pad(x, room) for x in self._stored)

    def write(self, start: int, new: Stored) -> None:
        stop = start + new[0].shape[TOKENS]
        if stop - self._base > self._capacity:
            self._make_room(start, stop)
        for old, x in zip(self._stored, new, strict=True):
            old[:, :, start - self._base : stop - self._base] = x

    def _make_room(self, start: int, stop: int) -> None:
        """Grow for tokens start..stop-1, after letting go of what no later token sees."""
        block_start = start // self._spec.block_size * self._spec.block_size
        unseen = min(self.layer.first_visible(start), block_start)
        gone = unseen - self._base
        if self.layer.window is not None and gone > 0:
            self._base = unseen
            self._stored = tuple(x[:, :, gone:] for x in self._stored)
        self._grow(max(self._room_for(stop), stop - self._base))

    def visible(self, start: int, stop: int) -> tuple[mx.array, mx.array, int]:
        """Return keys and values that positions start..stop-1 see, and the position of the first.

        They go up to the last one's own.
        """
        first = max(self.layer.first_visible(start), self._base)
        k, v = self.read(first, stop)
        return k, v, first

    def fetch(self, start: int, new: Stored) -> DensePair:
        """Write the next positions and return all keys and values [1, H, T, D] that they see.

        They lie within one block, which is sealed when it is full.
        """
        size, stop = self._spec.block_size, start + new[0].shape[TOKENS]
        assert (stop - 1) // size == start // size
        self.write(start, new)
        keys, vals, _ = self.visible(start, stop)
        if stop % size == 0:
            self.seal(start // size)
        return keys, vals

    def attend(self, q: mx.array, stop: int, scale: float, sinks: mx.array | None) -> mx.array:
        k, v, first = self.visible(stop - q.shape[2], stop)
        return attend_dense(
            q,
            k,
            v,
            scale=scale,
            sinks=sinks,
            layer=self.layer,
            first=first,
            backend=self.backend,
        )

    def kept_keys(self, stop: int) -> mx.array:
        """Return all keys that are here up to position `stop`, [1, H, n, Dk]."""
        return self.read(self._base, stop)[0]

    def take_codes(self, start: int, codes: CodesPair, sinks: DensePair | None) -> None:
        k, v = self.codec.decode("k", codes[0]), self.codec.decode("v", codes[1])
        if sinks is not None:
            n = sinks[0].shape[TOKENS]
            k = mx.concatenate([sinks[0], k[:, :, n:]], TOKENS)
            v = mx.concatenate([sinks[1], v[:, :, n:]], TOKENS)
        self._replace(start, k, v)

    def adopt(self, block: int, parts: Arrays) -> None:
        if self._spec.bits is None:
            self._replace(block * self._spec.block_size, parts["k.full"], parts["v.full"])
        else:
            super().adopt(block, parts)

    def _replace(self, start: int, k: mx.array, v: mx.array) -> None:
        """Overwrite, of tokens from `start`, all written before, those that are still here."""
        gone = max(0, self._base - start)
        for i, x in enumerate((k, v)):
            self._put(i, start + gone, x[:, :, gone:])

    def arrays(self) -> list[mx.array]:
        return list(self._stored)
