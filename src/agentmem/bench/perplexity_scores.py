"""Scores of one cache against another: perplexity, divergence and agreement, window by window.

From logits to what can be said of them from a few windows.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import mlx.core as mx

from ..engine.model_runner import ModelRunner
from ..errors import ModelError
from ..kvcache.calibrate import calibration_tokens
from ..kvcache.spec import KVBits, KVCacheSpec
from ..models.loading import LoadedModel
from .harness.corpus import Window
from .plain_cache import plain_cache

PLAIN = "plain4"  # mlx-lm's 4 bits
REFERENCE = "16"


@dataclass(frozen=True)
class Score:
    """Sums over scored tokens. Logarithms are natural."""

    tokens: int = 0
    nll: float = 0.0  # of the token that the corpus goes on with
    kl: float = 0.0  # from the 16-bit cache's distribution of the next token to this one
    agreed: int = 0  # the likeliest next token is the 16-bit cache's

    def __add__(self, other: "Score") -> "Score":
        return Score(
            tokens=self.tokens + other.tokens,
            nll=self.nll + other.nll,
            kl=self.kl + other.kl,
            agreed=self.agreed + other.agreed,
        )


def log_probabilities(logits: mx.array) -> mx.array:
    """Turn logits [n, vocab] into float32 log-probabilities, evaluated."""
    logits = logits.astype(mx.float32)
    result = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(result)
    return result


def score(reference: mx.array, log_probs: mx.array, targets: Sequence[int]) -> Score:
    """Score n positions.

    Log-probabilities [n, vocab] are over the 16-bit cache and over another one; `targets` are what
    came next.
    """
    kl = (mx.exp(reference) * (reference - log_probs)).sum()
    next_tokens = mx.array(list(targets))[:, None]
    nll = -mx.take_along_axis(log_probs, next_tokens, axis=-1).sum()
    agreed = (mx.argmax(reference, axis=-1) == mx.argmax(log_probs, axis=-1)).sum()
    return Score(
        tokens=len(targets),
        nll=cast(float, nll.item()),
        kl=cast(float, kl.item()),
        agreed=cast(int, agreed.item()),
    )


def delta_percent(
    reference: Sequence[Score], scores: Sequence[Score]
) -> tuple[float, tuple[float, float] | None]:
    """Return the change of perplexity against `reference` in percent, with a 95 % interval.

    Both are of the same tokens, window by window. The interval is Student's t over the windows'
    differences in log-perplexity, weighted by their tokens. A window is the unit since tokens
    within one share a cache. It is None for a single window.
    """
    total = sum(s.tokens for s in scores)
    weights = [s.tokens / total for s in scores]
    pairs = zip(reference, scores, strict=True)
    differences = [(s.nll - r.nll) / s.tokens for r, s in pairs]
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


# 1 to 10 degrees of freedom
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def student_t(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t.

    Beyond the table it is an expansion around the normal one's, right to 0.002.
    """
    if degrees <= len(_T):
        return _T[degrees - 1]
    z = 1.959964
    first = (z**3 + z) / (4 * degrees)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    return z + first + second


class Feed(Protocol):
    """One cache in one window: takes the next tokens, returns their logits [n, vocab]."""

    def __call__(self, tokens: list[int]) -> mx.array: ...


Begin = Callable[[int], Feed]  # with an empty cache that has room for so many tokens


@dataclass(frozen=True)
class Preset:
    kv_bits: str
    begin: Begin | None  # None where `unavailable` says why
    bytes_per_token: float | None = None
    ratio_to_fp16: float | None = None
    unavailable: str | None = None


def presets(loaded: LoadedModel, names: Sequence[str], block_size: int) -> list[Preset]:
    """Prepare the caches to compare, in the order of `names`, among which 16 bits are."""
    runners = {}
    for name in names:
        if name != PLAIN:
            bits = cast(KVBits, name)
            runners[name] = ModelRunner(loaded.model, kv_bits=bits, block_size=block_size)
    quantized = [runner for runner in runners.values() if runner.spec.bits is not None]
    if quantized:
        tokens = calibration_tokens(
            lambda text: loaded.tokenizer.encode(text, add_special_tokens=False)
        )
        centres = quantized[0].calibrate(tokens)
        for runner in quantized:
            runner.use_centres(centres)
    made = []
    for name in names:
        if name == PLAIN:
            made.append(_plain_preset(loaded, runners[REFERENCE].spec))
        else:
            runner = runners[name]
            made.append(_preset(name, production(runner), runner.spec))
    return made


def _plain_preset(loaded: LoadedModel, reference: KVCacheSpec) -> Preset:
    try:
        mx.eval(loaded.model(mx.array([[0]]), cache=plain_cache(loaded.model)))
    except ModelError as e:
        return Preset(PLAIN, None, unavailable=e.message)
    spec = replace(reference, kv_bits="4")  # the same codes and scales, of other numbers
    return _preset(PLAIN, lambda capacity: _plain(loaded.model), spec)


def _preset(name: str, begin: Begin, spec: KVCacheSpec) -> Preset:
    fp16 = spec.dense_bytes / spec.dtype.size * 2
    sealed = fp16 if spec.bits is None else spec.sealed_bytes
    return Preset(
        name,
        begin,
        bytes_per_token=sealed,
        # a recurrent model keeps nothing of a single token
        ratio_to_fp16=sealed / fp16 if fp16 else 1.0,
    )


def production(runner: ModelRunner) -> Begin:
    """Begin sequences over the cache that serving uses."""

    def begin(capacity: int) -> Feed:
        cache = runner.new_cache(capacity=capacity)

        def feed(tokens: list[int]) -> mx.array:
            logits, fresh = runner.forward(mx.array([tokens]), [cache])
            sealed = [block.arrays for block in itertools.chain(*fresh)]
            mx.eval(logits, sealed)
            return logits[0]

        return feed

    return begin


def _plain(model: Any) -> Feed:
    cache = plain_cache(model)
    return lambda tokens: model(mx.array([tokens]), cache=cache)[0]


def score_windows(
    begin: Sequence[Begin],
    windows: Iterable[Window],
    block_size: int,
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[list[Score]]:
    """Score each way to begin a sequence in every window; the first is the reference of all.

    All go through a window together, a block at a time, so that of logits one block's are in
    memory. `progress` gets tokens done, counted for each way.
    """
    by_window = [_score_window(begin, window, block_size, progress) for window in windows]
    return [list(scores) for scores in zip(*by_window, strict=True)]


def _score_window(
    begin: Sequence[Begin],
    window: Window,
    block_size: int,
    progress: Callable[[int], object],
) -> list[Score]:
    feeds = [with_room(len(window.inputs)) for with_room in begin]
    scores = [Score() for _ in begin]
    for start in range(0, len(window.inputs), block_size):
        tokens = window.inputs[start : start + block_size]
        first = max(0, window.first_scored - start)
        targets = window.targets[start : start + block_size][first:]
        reference = None
        for i, feed in enumerate(feeds):
            logits = feed(tokens)
            if targets:
                log_probs = log_probabilities(logits[first:])
                reference = log_probs if reference is None else reference
                scores[i] += score(reference, log_probs, targets)
            else:
                mx.eval(logits)
            progress(len(tokens))
    return scores
