"""From logits to perplexity, divergence and agreement, and to what can be said of them from a few
windows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx


@dataclass(frozen=True)
class Score:
    """Sums over scored tokens. Logarithms are natural."""

    tokens: int = 0
    nll: float = 0.0  # of the token that the corpus goes on with
    kl: float = 0.0  # from the 16-bit cache's distribution of the next token to this one
    agreed: int = 0  # the likeliest next token is the 16-bit cache's

    def __add__(self, other: "Score") -> "Score":
        return Score(
            self.tokens + other.tokens,
            self.nll + other.nll,
            self.kl + other.kl,
            self.agreed + other.agreed,
        )


def log_probabilities(logits: mx.array) -> mx.array:
    """logits [n, vocab] to float32 log-probabilities, evaluated."""
    logits = logits.astype(mx.float32)
    result = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(result)
    return result


def score(reference: mx.array, log_probs: mx.array, targets: Sequence[int]) -> Score:
    """Of n positions: log-probabilities [n, vocab] over the 16-bit cache and over another one, and
    what came next.
    """
    kl = (mx.exp(reference) * (reference - log_probs)).sum()
    nll = -mx.take_along_axis(log_probs, mx.array(list(targets))[:, None], axis=-1).sum()
    agreed = (mx.argmax(reference, axis=-1) == mx.argmax(log_probs, axis=-1)).sum()
    return Score(
        len(targets), cast(float, nll.item()), cast(float, kl.item()), cast(int, agreed.item())
    )


def delta_percent(
    reference: Sequence[Score], scores: Sequence[Score]
) -> tuple[float, tuple[float, float] | None]:
    """Change of perplexity against `reference`, window by window the same tokens; percent, with a
    95 % interval.

    The interval is Student's t over the windows' differences in log-perplexity, weighted by their
    tokens. A window is the unit since tokens within one share a cache. None for a single window.
    """
    total = sum(s.tokens for s in scores)
    weights = [s.tokens / total for s in scores]
    differences = [(s.nll - r.nll) / s.tokens for r, s in zip(reference, scores, strict=True)]
    mean = sum(w * d for w, d in zip(weights, differences, strict=True))
    count = len(scores)
    if count == 1:
        return _percent(mean), None
    spread = sum((w * (d - mean)) ** 2 for w, d in zip(weights, differences, strict=True))
    error = math.sqrt(count / (count - 1) * spread)
    reach = student_t(count - 1) * error
    return _percent(mean), (_percent(mean - reach), _percent(mean + reach))


def _percent(log_ratio: float) -> float:
    return 100 * math.expm1(log_ratio)


_T = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
)  # 1 to 10 degrees of freedom


def student_t(degrees: int) -> float:
    """97.5 % quantile. Beyond the table by its expansion around the normal one's, right to 0.002."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
