"""Log probabilities of tokens, and of the likeliest ones in their place."""

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .api import TokenLogprob


@dataclass(frozen=True)
class Logprobs:
    """Rows of log probabilities, lazy until `arrays` are evaluated."""

    tokens: mx.array  # [n], ids
    chosen: mx.array  # [n], float32: of `tokens`
    top_ids: mx.array  # [n, k], the likeliest in no order
    top: mx.array  # [n, k], float32: of `top_ids`

    @property
    def arrays(self) -> list[mx.array]:
        return [self.tokens, self.chosen, self.top_ids, self.top]

    def rows(self) -> Iterator[TokenLogprob]:
        """Yield each token's, once the arrays are evaluated."""
        tokens = np.array(self.tokens)
        chosen = np.array(self.chosen)
        top_ids = np.array(self.top_ids)
        top = np.array(self.top)
        order = np.argsort(-top, axis=-1, kind="stable")
        for i, likeliest in enumerate(order):
            pairs = zip(top_ids[i, likeliest].tolist(), top[i, likeliest].tolist(), strict=True)
            yield TokenLogprob(int(tokens[i]), float(chosen[i]), tuple(pairs))


def log_probabilities(logits: mx.array, tokens: mx.array, num_top: int) -> Logprobs:
    """Return those of `tokens` [n], and of the `num_top` likeliest, under `logits` [n, vocab].

    All of them come from the same operations in float32: the likeliest token's own one is equal to
    the first of the likeliest, bit for bit.
    """
    logits = logits.astype(mx.float32)
    total = mx.logsumexp(logits, axis=-1, keepdims=True)
    num_top = min(num_top, logits.shape[-1])
    if num_top == 0:
        top_ids = mx.zeros((len(tokens), 0), mx.uint32)
    elif num_top == 1:
        top_ids = mx.argmax(logits, axis=-1, keepdims=True)
    else:
        top_ids = mx.argpartition(-logits, kth=num_top - 1, axis=-1)[:, :num_top]
    chosen = mx.take_along_axis(logits, tokens[:, None], axis=-1) - total
    top = mx.take_along_axis(logits, top_ids, axis=-1) - total
    return Logprobs(tokens, chosen[:, 0], top_ids, top)
