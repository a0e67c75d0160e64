"""The cache of a running sequence whose model only mlx-lm's own cache objects will do for."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..block import SealedBlock, Snapshot


class OpaqueCache:
    """A running sequence over mlx-lm's own cache objects.

    Correct for any model, but nothing can be kept of it. It answers what SequenceCache does.
    """

    batchable = False

    def __init__(self, caches: list[Any]):
        self.caches, self.length = caches, 0
        self.num_sealed = 0
        self.pass_limit = 1 << 30

    def advance(self, num_tokens: int) -> list[SealedBlock]:
        """Count `num_tokens` more positions. No block fills up."""
        self.length += num_tokens
        return []

    def adopt(self, index: int, block: SealedBlock) -> None:
        """Never called: there is no block that another one could stand for."""
        raise AssertionError("nothing is sealed")

    def snapshot(self) -> Snapshot:
        """Return the idle form: nothing."""
        return Snapshot()

    def arrays(self) -> list[mx.array]:
        """Return what a forward pass leaves to evaluate."""
        leaves = tree_flatten([cache.state for cache in self.caches])
        return [a for _, a in leaves if isinstance(a, mx.array)]
