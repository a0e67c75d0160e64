"""What mlx-lm's model files see as a model's caches: the working copies of several sequences."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList

from .block import SealedBlock
from .layers.attended import AttendedView
from .layers.kv import Positions
from .layers.model_attends import ModelAttendsView
from .layers.recurrent import RecurrentLayer, RecurrentView
from .sequence import SequenceCache
from .spec import KVCacheSpec


class BatchQuantizedKVCache:
    """The caches of several sequences for one forward pass.

    `model(tokens [B, L], cache=batch.layers)` runs it, then `advance` closes it. Sequences that are
    not `batchable` go alone. Nothing is padded, merged or copied but state and what a model attends
    to by itself: attention runs per sequence, the rest on the batch.
    """

    def __init__(self, spec: KVCacheSpec, caches: Sequence[SequenceCache]):
        self._caches = caches
        starts = tuple(cache.length for cache in caches)
        at = Positions(starts, starts[0] if len(starts) == 1 else mx.array(starts))
        # views don't refer back to the batch: a cycle would keep working copies in RAM until
        # Python's collector runs
        each_layer = zip(*(cache.layers for cache in caches), strict=True)
        self._views = [_view(spec, rows, at) for rows in each_layer]
        self.layers = [
            self._views[slot]
            if isinstance(slot, int)
            else CacheList(*(self._views[i] for i in slot))
            for slot in spec.slots
        ]

    def advance(self, num_tokens: int) -> list[list[SealedBlock]]:
        """Close the pass; return for each sequence the blocks that filled up."""
        for view in self._views:
            view.finish(num_tokens)
        return [cache.advance(num_tokens) for cache in self._caches]


def _view(spec: KVCacheSpec, rows: Sequence[Any], at: Positions) -> Any:
    """Return what a model sees of one layer, whose working copies are `rows`."""
    if isinstance(rows[0], RecurrentLayer):
        return RecurrentView(rows)
    if rows[0].layer.model_attends:
        return ModelAttendsView(rows, at)
    return AttendedView(spec, rows, at)
