"""The working copy of a layer as codes: about 0.28 of the dense one in RAM."""

from collections.abc import Sequence

import mlx.core as mx

from ..attention import FEW_QUERIES, attend_codes, attend_dense
from ..backend import AttentionBackend
from ..block import Arrays
from ..quantize import TOKENS, Codes, LayerCodec, Stored, concatenate_codes
from ..spec import KVCacheSpec
from .kv import CodesPair, DensePair, KVLayer, capacity_for


class CodesLayer(KVLayer):
    """Sealed tokens as codes, which attention reads in place; the open block is dense.

    For attention over all tokens; a window is small, and stays dense.
    """

    def __init__(
        self,
        spec: KVCacheSpec,
        codec: LayerCodec,
        backend: AttentionBackend,
        open_block: KVLayer,
    ):
        """`open_block` is an empty dense layer."""
        super().__init__(spec, codec, backend)
        self._num_sealed = 0
        self._codes: CodesPair | None = None
        self._first: DensePair | None = None  # sinks
        self._open = open_block

    @staticmethod
    def working_bytes(spec: KVCacheSpec, stack: int, num_tokens: int) -> int:
        """Count the bytes of a stack of such layers, with room for `num_tokens` tokens."""
        layers = spec.stacks[stack]
        dense = len(layers) * spec.layers[layers[0]].token_values * spec.dtype.size
        sealed = num_tokens // spec.block_size * spec.block_size
        sinks = min(sealed, spec.num_sinks)
        return (capacity_for(spec.block_size) + sinks) * dense + sealed * spec.stack_bytes[stack]

    def load(self, sources: Sequence[Arrays], ends: Arrays, base: int, capacity: int) -> None:
        blocks = [s for s in sources if s["k.packed"].shape[TOKENS] == self._spec.block_size]
        open_parts = sources[len(blocks) :]
        if open_parts or ends:
            self._open.load(open_parts, ends, base, self._spec.block_size)
        if blocks:
            self._codes = concatenate_codes(blocks, "k"), concatenate_codes(blocks, "v")
            self._first = blocks[0]["k.sinks"], blocks[0]["v.sinks"]
            self._num_sealed = len(blocks) * self._spec.block_size

    def reserve(self, num_tokens: int) -> None:
        self._open.reserve(self._spec.block_size)

    def write(self, start: int, new: Stored) -> None:
        self._open.write(start - self._num_sealed, new)

    def read(self, start: int, stop: int) -> DensePair:
        return self._open.read(start - self._num_sealed, stop - self._num_sealed)

    def attend(self, q: mx.array, stop: int, scale: float, sinks: mx.array | None) -> mx.array:
        k, v = self._open.read(0, stop - self._num_sealed)
        if self._codes is not None:
            assert self._first is not None and self._spec.bits is not None
            if q.shape[2] <= FEW_QUERIES and sinks is None:
                return attend_codes(q, *self._codes, *self._first, k, v, scale, self._spec.bits)
            k, v = self._dense(0, k), self._dense(1, v)
        return attend_dense(
            q,
            k,
            v,
            scale=scale,
            sinks=sinks,
            layer=self.layer,
            first=0,
            backend=self.backend,
        )

    def _dense(self, i: int, open_part: mx.array) -> mx.array:
        """Decode keys (i = 0) or values (1) of all tokens, for this one call."""
        assert self._codes is not None and self._first is not None
        first, sealed = self._first[i], self.codec.decode("kv"[i], self._codes[i])
        return mx.concatenate([first, sealed[:, :, first.shape[TOKENS] :], open_part], TOKENS)

    def take_codes(self, start: int, codes: CodesPair, sinks: DensePair | None) -> None:
        stop = start + codes[0].packed.shape[TOKENS]
        if sinks is not None:
            self._first = mx.contiguous(sinks[0]), mx.contiguous(sinks[1])
        if self._codes is None:
            self._codes = codes
        else:
            k, v = self._codes
            self._codes = _replaced(k, codes[0], start, stop), _replaced(v, codes[1], start, stop)
        self._num_sealed = max(self._num_sealed, stop)

    def arrays(self) -> list[mx.array]:
        kept = [a for codes in self._codes or () for a in codes] + list(self._first or ())
        return kept + self._open.arrays()


def _replaced(old: Codes, new: Codes, start: int, stop: int) -> Codes:
    """Return `old` with tokens start..stop-1 from `new`; start may be its end."""
    pairs = zip(old, new, strict=True)
    return Codes(*(mx.concatenate([a[:, :, :start], b, a[:, :, stop:]], TOKENS) for a, b in pairs))
