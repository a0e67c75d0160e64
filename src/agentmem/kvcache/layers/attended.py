"""What a model sees of a layer whose attention comes through the seam, dense or as codes."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from ..quantize import Stored
from ..spec import KVCacheSpec
from .dense import DenseLayer
from .kv import KVLayer, KVView, Positions


class AttendedView(KVView):
    """One layer of B sequences, each over its own working copy."""

    def __init__(self, spec: KVCacheSpec, rows: Sequence[KVLayer], at: Positions):
        super().__init__(rows[0].layer, at)
        self._spec, self._rows = spec, rows
        self._codec = rows[0].codec
        self._pending: tuple[mx.array, mx.array] | None = None

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """Return a mask for the model's eyes only: `attend` masks by itself."""
        if self._spec.model_attends_somewhere:  # one mask may serve its own attention too
            return super().make_mask(n, return_array, window_size)
        if return_array and n > 1:
            return create_causal_mask(n, window_size=window_size)
        return None if n == 1 else "causal"

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Take keys [B, H, L, Dk] and values [B, H, L, Dv].

        They are written when `attend` brings the queries, to rotate all in one.
        """
        self._pending = keys, values
        self.offset = self.offset + keys.shape[2]
        return keys, values

    def attend(self, queries: mx.array, scale: float, sinks: mx.array | None) -> mx.array:
        """Attend from queries [B, Hq, L, Dk]; return [B, Hq, L, Dv]. The seam calls it."""
        assert self._pending is not None, "attention before update_and_fetch"
        (keys, vals), self._pending = self._pending, None
        space = self._codec.space
        q, new = space.enter(self._codec.index, queries, keys, vals)
        news = [tuple(a[b : b + 1] for a in new) for b in range(len(self._rows))]
        if queries.shape[2] > 1:
            return space.leave(_joined(self._each(q, news, scale, sinks)))
        left = space.leave(self._decode(q, news, scale, sinks))
        self._rows[0].backend.start(left, (a for row in self._rows for a in row.sealing()))
        return left

    def finish(self, num_tokens: int) -> None:
        """Close the pass."""
        assert self._pending is None, "a layer never attended"

    def _each(
        self, q: mx.array, news: list[Stored], scale: float, sinks: mx.array | None
    ) -> list[mx.array]:
        return [
            self._walk(row, start, q[b : b + 1], new, scale, sinks)
            for b, (row, start, new) in enumerate(zip(self._rows, self._starts, news, strict=True))
        ]

    def _walk(
        self,
        row: KVLayer,
        start: int,
        q: mx.array,
        new: Stored,
        scale: float,
        sinks: mx.array | None,
    ) -> mx.array:
        """Write keys and values of the L positions from `start` and attend from q [1, Hq, L, Dk].

        A token sees its own block in full precision and every earlier block as codes, so the chunk
        is walked block by block, and a block is sealed when its last token has attended.
        """
        size, stop = self._spec.block_size, start + q.shape[2]
        # where a sealed block's value is what it was, and nothing leaves the window, there is
        # nothing to walk for
        whole = self._spec.bits is None and self._layer.window is None
        first_end = (start // size + 1) * size
        ends = [] if whole else list(range(first_end, stop, size))
        out = []
        for lo, hi in pairwise([start, *ends, stop]):
            span = slice(lo - start, hi - start)
            row.write(lo, tuple(a[:, :, span] for a in new))
            out.append(row.attend(q[:, :, span], hi, scale, sinks))
            for block in range(lo // size, hi // size):
                row.seal(block)
        return out[0] if len(out) == 1 else mx.concatenate(out, axis=2)

    def _decode(
        self, q: mx.array, news: list[Stored], scale: float, sinks: mx.array | None
    ) -> mx.array:
        """Attend from one query a sequence, q [B, Hq, 1, Dk]."""
        dense = [row for row in self._rows if isinstance(row, DenseLayer)]
        if len(dense) < len(self._rows):
            return _joined(self._each(q, news, scale, sinks))
        of_each = zip(dense, self._starts, news, strict=True)
        seen = [row.fetch(start, new) for row, start, new in of_each]
        return dense[0].backend.decode(q, seen, scale=scale, sinks=sinks)


def _joined(out: list[mx.array]) -> mx.array:
    return out[0] if len(out) == 1 else mx.concatenate(out, axis=0)
