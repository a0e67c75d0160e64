"""How attention over dense keys and values is computed: MLX's way, or that of a CPU."""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Protocol

import mlx.core as mx

from ..linux_cpu.softmax import attention_for


class AttentionBackend(Protocol):
    """What a layer asks for. `attention_backend` chooses one, once."""

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

        `mask` is None, "causal", or bool [n, T]; `sinks` [Hq] are logits that join the softmax.
        """

    def decode(
        self,
        q: mx.array,
        seen: Sequence[tuple[mx.array, mx.array]],
        *,
        scale: float,
        sinks: mx.array | None,
    ) -> mx.array:
        """Attend from q [B, Hq, 1, Dk], one query a sequence; return [B, Hq, 1, Dv].

        `seen`: of each sequence its keys and values [1, H, T, D], all of which its query sees.
        """

    def start(self, out: mx.array, sealing: Iterable[mx.array]) -> None:
        """Begin, where it pays, to compute a layer's output of a decode step and what it seals."""


class FusedAttention:
    """MLX's fused kernel, whatever the device; nothing is started before the whole step is."""

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
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)

    def decode(
        self,
        q: mx.array,
        seen: Sequence[tuple[mx.array, mx.array]],
        *,
        scale: float,
        sinks: mx.array | None,
    ) -> mx.array:
        out = [
            self.attend(q[b : b + 1], k, v, scale=scale, mask=None, sinks=sinks)
            for b, (k, v) in enumerate(seen)
        ]
        return out[0] if len(out) == 1 else mx.concatenate(out, axis=0)

    def start(self, out: mx.array, sealing: Iterable[mx.array]) -> None:
        pass


@cache
def attention_backend() -> AttentionBackend:
    """Return the backend for MLX's default device."""
    return attention_for(mx.default_device()) or FusedAttention()
