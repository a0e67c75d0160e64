"""Attention on a CPU without a GPU: NumPy's softmax, and rows of a batch side by side."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import mlx.core as mx
import numpy as np


class CPUAttention:
    """What kvcache's FusedAttention does, in the way that is fast on a CPU."""

    def attend(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        *,
        scale: float,
        mask: Any,
        sinks: mx.array | None,
    ) -> mx.array:
        """Attend from q [1, Hq, n, Dk] to k, v [1, H, T, D]; return [1, Hq, n, Dv].

        `mask` is None, "causal", or bool [n, T].
        """
        if q.shape[2] > 1 and sinks is None and q.dtype == mx.float32:
            return _with_numpys_softmax(q, k, v, scale, None if mask == "causal" else mask)
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)

    def decode(
        self,
        q: mx.array,
        seen: Sequence[tuple[mx.array, mx.array]],
        *,
        scale: float,
        sinks: mx.array | None,
    ) -> mx.array:
        """Attend from q [B, Hq, 1, Dk], one query a sequence, each to its own k, v [1, H, T, D].

        What does not depend on a sequence's length is done once for all: 2 % of a decode step.
        """
        if sinks is not None:
            each = zip(range(len(seen)), seen, strict=True)
            attended = [
                self.attend(q[b : b + 1], k, v, scale=scale, mask=None, sinks=sinks)
                for b, (k, v) in each
            ]
            return _joined(attended)
        batch, heads_q, _, dim = q.shape
        rows = (q * scale).reshape(batch, seen[0][0].shape[1], -1, 1, dim)
        out = [_attend_row(rows[b : b + 1], k, v) for b, (k, v) in enumerate(seen)]
        return _joined(out).reshape(batch, heads_q, 1, -1)

    def start(self, out: mx.array, sealing: Iterable[mx.array]) -> None:
        """Begin to compute a layer's output of a decode step, and what it seals.

        Python builds the next layer meanwhile: 3 to 7 % of a decode step.
        """
        mx.async_eval(out, *sealing)  # type: ignore[no-untyped-call]


def attention_for(device: mx.Device) -> CPUAttention | None:
    """Return the way of attention that `device` wants; None where it is MLX's own."""
    return CPUAttention() if device.type == mx.DeviceType.cpu else None


def _with_numpys_softmax(
    q: mx.array, k: mx.array, v: mx.array, scale: float, seen: mx.array | None
) -> mx.array:
    """Attend with a softmax that NumPy computes in place.

    On x86-64 the `exp` of MLX takes 12 ns, that of NumPy 0.5.

    q [1, Hq, n, D], n > 1; k, v [1, H, T, D]; seen [n, T], bool; None: causal, the queries being
    the last n.
    """
    _, heads_q, n, dim = q.shape
    rows = (q * scale).reshape(1, k.shape[1], -1, n, dim)
    scores = rows @ k[:, :, None].swapaxes(-1, -2)
    mx.eval(scores)
    # columns, at the end, some of which some rows don't see
    width = k.shape[2] if seen is not None else n
    hidden = ~np.array(seen) if seen is not None else np.triu(np.ones((n, n), bool), 1)
    # views; one head's fit into the CPU's cache
    for weights in chain.from_iterable(np.array(scores, copy=False)[0]):
        np.copyto(weights[:, -width:], -np.inf, where=hidden)
        weights -= weights.max(axis=-1, keepdims=True)
        np.exp(weights, out=weights)
        # in float64, where rounding does not depend on how many columns there are, which is the
        # chunk's business
        weights /= weights.sum(axis=-1, keepdims=True, dtype=np.float64).astype(np.float32)
    return (scores @ v[:, :, None]).reshape(1, heads_q, n, -1)


def _attend_row(row: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Attend from one position to all of k, v [1, H, T, D].

    `row` is [1, H, Hq / H, 1, Dk], scaled; the result has the same shape, with Dv.
    """
    weights = mx.softmax(row @ k[:, :, None].swapaxes(-1, -2), axis=-1, precise=True)
    return weights @ v[:, :, None]


def _joined(out: list[mx.array]) -> mx.array:
    return out[0] if len(out) == 1 else mx.concatenate(out, axis=0)
