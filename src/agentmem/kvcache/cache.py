"""The running form of a cache: what attention reads while a sequence prefills and decodes."""

from collections.abc import Sequence

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from .block import TOKENS, Arrays, SealedBlock, Snapshot, Tail, concatenate_codes
from .quantize import CacheSpace, Codes, encode
from .spec import KVCacheSpec
from .working import CodesLayer, DenseLayer

_ON_CPU = mx.default_device() == mx.Device(mx.cpu)


class SequenceCache:
    """The cache of one running sequence, over all layers.

    A token sees its own block in full precision and every earlier block as codes, whatever the chunks: `attend` walks
    a chunk block by block and seals each block when its last token has attended. A model's forward pass calls it once
    per layer; `advance` then closes the pass.
    """

    def __init__(
        self,
        spec: KVCacheSpec,
        space: CacheSpace,
        snapshot: Snapshot | None = None,
        *,
        capacity: int = 0,
        on_codes: bool = False,
    ):
        """`capacity`: tokens known to come, the snapshot's included, so that prefill does not copy as it grows."""
        self._spec, self.space = spec, space
        layer_type = CodesLayer if on_codes and spec.bits is not None else DenseLayer
        self._layers = [layer_type(spec, i) for i in range(len(spec.layers))]
        self._sealing: dict[int, list[Arrays]] = {}  # block index -> per layer, named without the stack: "k.packed"
        snapshot = snapshot or Snapshot()
        self.blocks: list[SealedBlock] = list(snapshot.blocks)
        self._tail_prefix = (snapshot.tail.prefix, snapshot.tail.prefix_len) if snapshot.tail else (None, 0)
        self.length = len(self.blocks) * spec.block_size + (snapshot.tail.num_tokens if snapshot.tail else 0)
        if self.length:
            self._load(snapshot, max(capacity, self.length + 1))
        else:
            for layer in self._layers:
                layer.reserve(capacity)

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def num_sealed(self) -> int:
        """Tokens in sealed blocks."""
        return len(self.blocks) * self._spec.block_size

    def attend(
        self, layer: int, q: mx.array, k: mx.array, v: mx.array, scale: float, sinks: mx.array | None = None
    ) -> mx.array:
        """q [1, Hq, L, Dk], k [1, H, L, Dk], v [1, H, L, Dv] in cache space, for the next L positions."""
        work, size = self._layers[layer], self._spec.block_size
        start, stop = self.length, self.length + q.shape[2]
        if self._spec.bits is None:  # a sealed block's value is what it was: nothing to walk for
            work.write(start, k, v)
            for block in range(start // size, stop // size):
                self._seal(layer, block)
            return work.attend(q, stop, scale, sinks)
        out = []
        for lo in [start, *range((start // size + 1) * size, stop, size)]:
            hi = min(stop, (lo // size + 1) * size)
            span = slice(lo - start, hi - start)
            work.write(lo, k[:, :, span], v[:, :, span])
            out.append(work.attend(q[:, :, span], hi, scale, sinks))
            if hi % size == 0:
                self._seal(layer, lo // size)
        return out[0] if len(out) == 1 else mx.concatenate(out, axis=2)

    def advance(self, num_tokens: int) -> list[SealedBlock]:
        """Count `num_tokens` more positions; returns the blocks that filled up, in order, not evaluated yet."""
        self.length += num_tokens
        fresh = [SealedBlock(self._stack(self._sealing[block])) for block in sorted(self._sealing)]
        self._sealing.clear()
        if fresh:
            self._tail_prefix = None, 0
        self.blocks += fresh
        return fresh

    def adopt(self, index: int, block: SealedBlock) -> None:
        """Take `block`, which another sequence sealed for the same tokens, in place of our own."""
        self.blocks[index] = block
        if self._spec.bits is None:
            return
        for i, work in enumerate(self._layers):
            parts = self._unstack(block.arrays, i)
            sinks = (parts["k.sinks"], parts["v.sinks"]) if "k.sinks" in parts else None
            codes = concatenate_codes([parts], "k"), concatenate_codes([parts], "v")
            work.seal(index * self._spec.block_size, codes, sinks)

    def snapshot(self) -> Snapshot:
        """The idle form. Its tail is a copy: the working copy may go on or be dropped."""
        n = self.length - self.num_sealed
        if n == 0:
            return Snapshot(tuple(self.blocks))
        prefix, prefix_len = self._tail_prefix
        ends = [work.read(self.num_sealed + prefix_len, self.length) for work in self._layers]
        full = _compact(self._stack([{"k.full": k, "v.full": v} for k, v in ends]))
        if prefix is not None:
            prefix = SealedBlock(_compact(prefix.arrays))
        return Snapshot(tuple(self.blocks), Tail(n, full, prefix, prefix_len))

    def all_keys(self) -> list[mx.array]:
        """Per layer the keys so far, [1, H, length, Dk]. Of dense working copies only."""
        return [work.read(0, self.length)[0] for work in self._layers]

    def arrays(self) -> list[mx.array]:
        """What a forward pass leaves to evaluate."""
        return [a for work in self._layers for a in work.arrays()]

    def _seal(self, layer: int, block: int) -> None:
        work, size = self._layers[layer], self._spec.block_size
        k, v = work.read(block * size, (block + 1) * size)
        if self._spec.bits is None:
            parts = {"k.full": k, "v.full": v}
        else:
            codes = encode(k, self._spec.bits[0]), encode(v, self._spec.bits[1])
            if block == len(self.blocks):  # the block that was open when the pass began
                codes = self._with_prefix(layer, "k", codes[0]), self._with_prefix(layer, "v", codes[1])
            parts = {
                f"{part}.{field}": a for part, c in zip("kv", codes, strict=True) for field, a in c._asdict().items()
            }
            sinks = None
            if block == 0:
                sinks = k[:, :, : self._spec.num_sinks], v[:, :, : self._spec.num_sinks]
                parts |= {"k.sinks": sinks[0], "v.sinks": sinks[1]}
            work.seal(block * size, codes, sinks)
        self._sealing.setdefault(block, []).append(parts)

    def _with_prefix(self, layer: int, part: str, codes: Codes) -> Codes:
        """Tokens that came from a block cut inside keep the codes they had."""
        prefix, n = self._tail_prefix
        if prefix is None:
            return codes
        had = concatenate_codes([self._unstack(prefix.arrays, layer)], part)
        return Codes(*(mx.concatenate([a, b[:, :, n:]], TOKENS) for a, b in zip(had, codes, strict=True)))

    def _load(self, snapshot: Snapshot, capacity: int) -> None:
        """Layer by layer, so that what is decoded on the way takes the memory of one layer, not of all."""
        tail = snapshot.tail
        sources = [b.arrays for b in snapshot.blocks] + ([tail.prefix.arrays] if tail and tail.prefix else [])
        for i, work in enumerate(self._layers):
            parts = [self._unstack(arrays, i) for arrays in sources]
            ends = self._unstack(tail.full, i) if tail else {}
            work.load(parts, ends, capacity)
            mx.async_eval(work.arrays())

    def _stack(self, per_layer: list[Arrays]) -> Arrays:
        """Per layer {"k.packed": [1, ...]} to {"k0.packed": [layers of stack 0, ...]}."""
        return {
            f"{name[0]}{s}{name[1:]}": mx.concatenate([per_layer[i][name] for i in stack], axis=0)
            for s, stack in enumerate(self._spec.stacks)
            for name in per_layer[stack[0]]
        }

    def _unstack(self, arrays: Arrays, layer: int) -> Arrays:
        s, j = self._spec.position_in_stack[layer]
        tag = str(s)
        return {
            f"{name[0]}{name[1 + len(tag) :]}": a[j : j + 1]
            for name, a in arrays.items()
            if name[1:].partition(".")[0] == tag
        }


def _compact(arrays: Arrays) -> Arrays:
    """Evaluated copies of what may be views, so that a tail of a few tokens does not keep a whole buffer in RAM."""
    copies = {name: mx.contiguous(a) for name, a in arrays.items()}
    mx.eval(copies)
    return copies


class _BatchLayer:
    """What mlx-lm's model files see as one layer's cache: B sequences, each over its own working copy."""

    def __init__(self, caches: Sequence[SequenceCache], index: int, offset: int | mx.array):
        self._caches, self._index = caches, index
        self.offset = offset
        self._pending: tuple[mx.array, mx.array] | None = None

    @property
    def attended(self) -> bool:
        return self._pending is None

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None):
        """Only for the model's eyes: `attend` masks by itself."""
        if return_array and n > 1:
            return create_causal_mask(n, window_size=window_size)
        return None if n == 1 else "causal"

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """keys [B, H, L, Dk], values [B, H, L, Dv]; written when `attend` brings the queries, to rotate all in one."""
        self._pending = keys, values
        self.offset = self.offset + keys.shape[2]
        return keys, values

    def attend(self, queries: mx.array, scale: float, sinks: mx.array | None) -> mx.array:
        assert self._pending is not None, "attention before update_and_fetch"
        (keys, vals), self._pending = self._pending, None
        space = self._caches[0].space
        q, k, v = space.enter(self._index, queries, keys, vals)
        out = [
            cache.attend(self._index, q[b : b + 1], k[b : b + 1], v[b : b + 1], scale, sinks)
            for b, cache in enumerate(self._caches)
        ]
        left = space.leave(out[0] if len(out) == 1 else mx.concatenate(out, axis=0))
        if _ON_CPU and queries.shape[2] == 1:
            mx.async_eval(left)  # compute this layer while Python builds the next: 3-7 % of a decode step
        return left


class BatchQuantizedKVCache:
    """Several sequences' caches for one forward pass: `model(tokens [B, L], cache=batch.layers)`, then `advance`.

    Nothing is padded, merged or copied: attention runs per sequence, all other arithmetic on the batch.
    """

    def __init__(self, caches: Sequence[SequenceCache]):
        self._caches = caches
        offset = caches[0].length if len(caches) == 1 else mx.array([c.length for c in caches])
        # layers don't refer back to the batch: a cycle would keep working copies in RAM until Python's collector runs
        self.layers = [_BatchLayer(caches, i, offset) for i in range(caches[0].num_layers)]

    def advance(self, num_tokens: int) -> list[list[SealedBlock]]:
        """Close the pass; returns for each sequence the blocks that filled up."""
        assert all(layer.attended for layer in self.layers), "a layer never attended"
        return [cache.advance(num_tokens) for cache in self._caches]
