"""What a model sees of a layer whose keys and values it computes with by itself, MLA's latents say.

The working copy is a dense one in the model's own space; only its codes are in cache space
(quantize.ModelSpaceCodec).
"""

from collections.abc import Sequence

import mlx.core as mx

from ..quantize import join
from .dense import DenseLayer
from .kv import KVView, Positions


class ModelAttendsView(KVView):
    """Such a layer of B sequences.

    A batch of unequal lengths is padded on the left, for one pass.
    """

    def __init__(self, rows: Sequence[DenseLayer], at: Positions):
        super().__init__(rows[0].layer, at)
        self._rows = rows

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Take keys [B, H, L, Dk] and values [B, H, L, Dv]; return those of all that they see."""
        self.offset = self.offset + keys.shape[2]
        seen = [
            row.fetch(start, join(keys[b : b + 1], values[b : b + 1]))
            for b, (row, start) in enumerate(zip(self._rows, self._starts, strict=True))
        ]
        self.keys, self.values = _padded([k for k, _ in seen]), _padded([v for _, v in seen])
        return self.keys, self.values

    def keys_and_values(self) -> tuple[mx.array | None, mx.array | None]:
        """Return what `update_and_fetch` returned in this pass; None before it."""
        return self.keys, self.values

    def finish(self, num_tokens: int) -> None:
        """Close the pass: nothing is left to do."""


def _padded(arrays: list[mx.array]) -> mx.array:
    """Put arrays [1, H, T, D] of unequal T in one, [B, H, T, D], the ends of all in line."""
    if len(arrays) == 1:
        return arrays[0]
    most = max(a.shape[2] for a in arrays)
    rows = [mx.pad(a, [(0, 0), (0, 0), (most - a.shape[2], 0), (0, 0)]) for a in arrays]
    return mx.concatenate(rows)
