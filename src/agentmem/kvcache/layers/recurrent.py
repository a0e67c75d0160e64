"""A recurrent layer: its state, and what a model sees of it."""

from collections.abc import Sequence

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from ..spec import LayerSpec


class RecurrentLayer:
    """One layer's state of one sequence, [1, ...] each.

    None before the first token: what that stands for is the model's business.
    """

    def __init__(self, layer: LayerSpec):
        self.state: list[mx.array | None] = [None] * len(layer.state)

    def arrays(self) -> list[mx.array]:
        """Return the arrays of the state; none before the first token."""
        return [a for a in self.state if a is not None]


class RecurrentView(ArraysCache):  # type: ignore[misc]
    """Such a layer of B sequences, as a model sees it: [B, ...] each."""

    def __init__(self, rows: Sequence[RecurrentLayer]):
        super().__init__(len(rows[0].state))
        self._rows = rows
        states = zip(*(row.state for row in rows), strict=True)
        self.cache = [s[0] if len(rows) == 1 else mx.concatenate(list(s)) for s in states]

    def finish(self, num_tokens: int) -> None:
        """Close the pass: give each sequence its state."""
        if num_tokens > 1:
            # the last columns of a prompt's activations would keep all of them in RAM
            self.cache = [mx.contiguous(a) for a in self.cache]
        for b, row in enumerate(self._rows):
            alone = len(self._rows) == 1
            row.state = [a if alone else a[b : b + 1] for a in self.cache]
