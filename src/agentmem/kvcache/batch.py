"""What mlx-lm's model files see as a model's caches: several sequences' working copies, for one
forward pass.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import ArraysCache, CacheList

from .attention import ON_CPU, attend_row, visible
from .block import SealedBlock
from .quantize import Stored, join
from .sequence import SequenceCache
from .spec import KVCacheSpec, LayerSpec


class _KVLayer:
    """What models ask of any cache of keys and values, and what some set on it."""

    start_position = 0  # llama 4 builds a mask from it, which `attend` does not look at
    keys: mx.array | None = None
    values: mx.array | None = None

    def __init__(
        self, caches: Sequence[SequenceCache], index: int, offset: int | mx.array, layer: LayerSpec
    ):
        self._caches, self._index, self._layer = caches, index, layer
        self.offset = offset

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Any:
        return _true_mask(self._layer, self._caches, n, return_array, window_size)

    def maybe_trim_front(self) -> None:
        """Llama 4's way to keep a chunk only."""

    def empty(self) -> bool:
        return isinstance(self.offset, int) and self.offset == 0


class _AttendLayer(_KVLayer):
    """One attention layer of B sequences, each over its own working copy."""

    def __init__(
        self,
        caches: Sequence[SequenceCache],
        index: int,
        offset: int | mx.array,
        layer: LayerSpec,
        *,
        true_masks: bool,
    ):
        """`true_masks`: in a model that also has fetched layers one mask may serve both."""
        super().__init__(caches, index, offset, layer)
        self._true_masks = true_masks
        self._pending: tuple[mx.array, mx.array] | None = None

    @property
    def attended(self) -> bool:
        return self._pending is None

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """Only for the model's eyes: `attend` masks by itself."""
        if self._true_masks:
            return super().make_mask(n, return_array, window_size)
        if return_array and n > 1:
            return create_causal_mask(n, window_size=window_size)
        return None if n == 1 else "causal"

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """keys [B, H, L, Dk], values [B, H, L, Dv]; written when `attend` brings the queries, to
        rotate all in one.
        """
        self._pending = keys, values
        self.offset = self.offset + keys.shape[2]
        return keys, values

    def attend(self, queries: mx.array, scale: float, sinks: mx.array | None) -> mx.array:
        assert self._pending is not None, "attention before update_and_fetch"
        (keys, vals), self._pending = self._pending, None
        space = self._caches[0].space
        q, new = space.enter(self._index, queries, keys, vals)
        news = [tuple(a[b : b + 1] for a in new) for b in range(len(self._caches))]
        if not (ON_CPU and queries.shape[2] == 1):
            return space.leave(_joined(self._each(q, news, scale, sinks)))
        by_row = sinks is None and all(cache.is_dense(self._index) for cache in self._caches)
        left = space.leave(
            self._rows(q, news, scale) if by_row else _joined(self._each(q, news, scale, sinks))
        )
        # compute this layer, and what it seals, while Python builds the next: 3-7 % of a decode
        # step
        mx.async_eval(left, *(a for cache in self._caches for a in cache.sealing(self._index)))
        return left

    def _each(
        self, q: mx.array, news: list[Stored], scale: float, sinks: mx.array | None
    ) -> list[mx.array]:
        return [
            cache.attend(self._index, q[b : b + 1], new, scale, sinks)
            for b, (cache, new) in enumerate(zip(self._caches, news, strict=True))
        ]

    def _rows(self, q: mx.array, news: list[Stored], scale: float) -> mx.array:
        """One query a sequence. What does not depend on its length is done once for all: 2 % of a
        decode step.
        """
        batch, heads_q, _, dim = q.shape
        rows = (q * scale).reshape(batch, self._layer.num_kv_heads, -1, 1, dim)
        out = [
            attend_row(rows[b : b + 1], *cache.fetch(self._index, new))
            for b, (cache, new) in enumerate(zip(self._caches, news, strict=True))
        ]
        return _joined(out).reshape(batch, heads_q, 1, -1)


def _joined(out: list[mx.array]) -> mx.array:
    return out[0] if len(out) == 1 else mx.concatenate(out, axis=0)


class _FetchLayer(_KVLayer):
    """One layer whose keys and values the model computes with by itself, MLA's latents say.

    A batch of unequal lengths is padded on the left, for one pass.
    """

    attended = True

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """keys [B, H, L, Dk], values [B, H, L, Dv]; the same of all that they see."""
        self.offset = self.offset + keys.shape[2]
        seen = [
            cache.fetch(self._index, join(keys[b : b + 1], values[b : b + 1]))
            for b, cache in enumerate(self._caches)
        ]
        self.keys, self.values = _padded([k for k, _ in seen]), _padded([v for _, v in seen])
        return self.keys, self.values

    def keys_and_values(self) -> tuple[mx.array | None, mx.array | None]:
        return self.keys, self.values


def _padded(arrays: list[mx.array]) -> mx.array:
    """[1, H, T, D] each, the ends of all in line."""
    if len(arrays) == 1:
        return arrays[0]
    most = max(a.shape[2] for a in arrays)
    return mx.concatenate(
        [mx.pad(a, [(0, 0), (0, 0), (most - a.shape[2], 0), (0, 0)]) for a in arrays]
    )


def _true_mask(
    layer: LayerSpec,
    caches: Sequence[SequenceCache],
    n: int,
    return_array: bool,
    window_size: int | None,
) -> Any:
    """What the next n positions see of the columns that `fetch` returns for them; of a batch, n =
    1.
    """
    if window_size not in (None, layer.window):
        raise ValueError(
            f"a window of {window_size} over a cache that keeps {layer.window or 'all'}"
        )
    starts = [cache.length for cache in caches]
    if len(starts) == 1:
        return _mask_of_one(layer, starts[0], n, return_array)
    assert n == 1
    seen = [start + 1 - layer.first_visible(start) for start in starts]
    if min(seen) == max(seen):
        return None
    return mx.arange(max(seen))[None] >= max(seen) - mx.array(seen)[:, None, None, None]


def _mask_of_one(layer: LayerSpec, start: int, n: int, return_array: bool) -> Any:
    if n == 1:
        return None
    first = layer.first_visible(start)
    if not return_array and layer.first_visible(start + n - 1) == first:
        return "causal"
    return visible(layer, mx.arange(start, start + n)[:, None], mx.arange(first, start + n)[None])


class BatchQuantizedKVCache:
    """Several sequences' caches for one forward pass: `model(tokens [B, L], cache=batch.layers)`,
    then `advance`.

    Sequences of a recurrent model that are still empty go alone.

    Nothing is padded, merged or copied but state and what is fetched: attention runs per sequence,
    the rest on the batch.
    """

    def __init__(self, spec: KVCacheSpec, caches: Sequence[SequenceCache]):
        self._caches = caches
        offset = caches[0].length if len(caches) == 1 else mx.array([c.length for c in caches])
        any_model_attends = any(layer.model_attends for layer in spec.layers)
        # layers don't refer back to the batch: a cycle would keep working copies in RAM until
        # Python's collector runs
        self._layers = [
            _layer(caches, i, layer, offset, any_model_attends=any_model_attends)
            for i, layer in enumerate(spec.layers)
        ]
        self.layers = [
            self._layers[slot]
            if isinstance(slot, int)
            else CacheList(*(self._layers[i] for i in slot))
            for slot in spec.slots
        ]

    def advance(self, num_tokens: int) -> list[list[SealedBlock]]:
        """Close the pass; returns for each sequence the blocks that filled up."""
        for i, layer in enumerate(self._layers):
            if isinstance(layer, ArraysCache):
                if (
                    num_tokens > 1
                ):  # the last columns of a prompt's activations would keep all of them in RAM
                    layer.cache = [mx.contiguous(a) for a in layer.cache]
                for b, cache in enumerate(self._caches):
                    cache.set_state(
                        i, [a if len(self._caches) == 1 else a[b : b + 1] for a in layer.cache]
                    )
            else:
                assert layer.attended, "a layer never attended"
        return [cache.advance(num_tokens) for cache in self._caches]


def _layer(
    caches: Sequence[SequenceCache],
    index: int,
    layer: LayerSpec,
    offset: int | mx.array,
    *,
    any_model_attends: bool,
) -> Any:
    if layer.kind == "recurrent":
        arrays = ArraysCache(len(layer.state))
        states = [cache.state(index) for cache in caches]
        alone = len(states) == 1
        arrays.cache = [
            s[0] if alone else mx.concatenate(list(s)) for s in zip(*states, strict=True)
        ]
        return arrays
    if layer.model_attends:
        return _FetchLayer(caches, index, offset, layer)
    return _AttendLayer(caches, index, offset, layer, true_masks=any_model_attends)
