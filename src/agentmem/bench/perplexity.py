"""What fewer bits cost: the production cache at each precision against 16 bits, over windows of a
text.

Each window starts an empty cache and is fed block by block as in serving. KL divergence is of the
next token's distribution from that of 16 bits, a mean over all tokens scored; top-1 how often both
have the same likeliest token. The interval of the change of perplexity is of 95 %, by Student's t
over the windows. Nothing here is timed.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import exp
from typing import Any, Protocol, cast

import mlx.core as mx

from ..engine.model_runner import ModelRunner
from ..errors import ModelError
from ..kvcache.calibrate import calibration_tokens
from ..kvcache.spec import KVBits, KVCacheSpec
from ..models.loading import LoadedModel
from .plain import plain_cache
from .scores import Score, delta_percent, log_probabilities, score
from .windows import Window

PLAIN = "plain4"
REFERENCE = "16"
PRESETS = (REFERENCE, "8", "k5v4", "k5v3", "4", PLAIN)


@dataclass(frozen=True)
class PresetResult:
    """A row of the table; figures are None where `unavailable` says why."""

    kv_bits: str
    bytes_per_token: (
        float | None
        # of a sealed token, sinks and snapshots of state aside; 16-bit values count 2 bytes on a
        # CPU too
    )
    ratio_to_fp16: float | None
    ppl: float | None = None
    delta_percent: float | None = None  # of perplexity, against 16 bits
    # see delta_percent(); None for one window
    delta_ci95_percent: tuple[float, float] | None = None
    kl: float | None = None  # nats a token
    top1: float | None = None  # share of tokens, 0 to 1
    unavailable: str | None = None

    def to_json(self) -> dict[str, Any]:
        row = asdict(self)
        return (
            row
            if self.unavailable
            else {name: value for name, value in row.items() if name != "unavailable"}
        )


class _Sequence(Protocol):
    """One preset's cache in one window: the next tokens to logits [n, vocab]."""

    def __call__(self, tokens: list[int]) -> mx.array: ...


Begin = Callable[[int], _Sequence]  # with an empty cache that has room for so many tokens


@dataclass(frozen=True)
class _Preset:
    kv_bits: str
    begin: Begin
    sizes: tuple[float, float]  # bytes a token, ratio to FP16


def measure(
    loaded: LoadedModel,
    windows: Iterable[Window],
    presets: Sequence[str],
    *,
    block_size: int = 256,
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[PresetResult]:
    """Rows in the order of PRESETS, 16 bits always among them. `progress` gets tokens done, counted
    for each preset.

    All presets go through a window together, a block at a time, so that of logits one block's are
    in memory.
    """
    ready, missing = _prepare(
        loaded, [p for p in PRESETS if p in presets or p == REFERENCE], block_size
    )
    scores = score_windows([preset.begin for preset in ready], windows, block_size, progress)
    rows = [_result(preset, scores[0], of) for preset, of in zip(ready, scores, strict=True)]
    return rows + missing


def _prepare(
    loaded: LoadedModel, names: list[str], block_size: int
) -> tuple[list[_Preset], list[PresetResult]]:
    """What can be measured, 16 bits first, and rows for what can't."""
    runners = {
        n: ModelRunner(loaded.model, kv_bits=cast(KVBits, n), block_size=block_size)
        for n in names
        if n != PLAIN
    }
    quantized = [runner for runner in runners.values() if runner.spec.bits is not None]
    if quantized:
        tokens = calibration_tokens(
            lambda text: loaded.tokenizer.encode(text, add_special_tokens=False)
        )
        centres = quantized[0].calibrate(tokens)
        for runner in quantized:
            runner.use_centres(centres)
    ready = [
        _Preset(name, production(runner), _sizes(runner.spec)) for name, runner in runners.items()
    ]
    if PLAIN not in names:
        return ready, []
    try:
        mx.eval(loaded.model(mx.array([[0]]), cache=plain_cache(loaded.model)))
    except ModelError as e:
        return ready, [PresetResult(PLAIN, None, None, unavailable=e.message)]
    sizes = _sizes(
        replace(runners[REFERENCE].spec, kv_bits="4")
    )  # the same codes and scales, of other numbers
    return [*ready, _Preset(PLAIN, lambda capacity: _plain(loaded.model), sizes)], []


def production(runner: ModelRunner) -> Begin:
    def begin(capacity: int) -> _Sequence:
        cache = runner.new_cache(capacity=capacity)

        def feed(tokens: list[int]) -> mx.array:
            logits, fresh = runner.forward(mx.array([tokens]), [cache])
            mx.eval(logits, [block.arrays for blocks in fresh for block in blocks])
            return logits[0]

        return feed

    return begin


def _plain(model: Any) -> _Sequence:
    cache = plain_cache(model)
    return lambda tokens: model(mx.array([tokens]), cache=cache)[0]


def _sizes(spec: KVCacheSpec) -> tuple[float, float]:
    fp16 = spec.dense_bytes / spec.dtype.size * 2
    sealed = fp16 if spec.bits is None else spec.sealed_bytes
    return (
        sealed,
        sealed / fp16 if fp16 else 1.0,
    )  # a recurrent model keeps nothing of a single token


def score_windows(
    begin: Sequence[Begin],
    windows: Iterable[Window],
    block_size: int,
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[list[Score]]:
    """For each way to begin a sequence its score in every window; the first is the reference of
    all.
    """
    by_window = [_score_window(begin, window, block_size, progress) for window in windows]
    return [list(scores) for scores in zip(*by_window, strict=True)]


def _score_window(
    begin: Sequence[Begin], window: Window, block_size: int, progress: Callable[[int], object]
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


def _result(preset: _Preset, reference: list[Score], scores: list[Score]) -> PresetResult:
    total = sum(scores, Score())
    change, interval = delta_percent(reference, scores)
    return PresetResult(
        preset.kv_bits,
        *preset.sizes,
        ppl=exp(total.nll / total.tokens),
        delta_percent=change,
        delta_ci95_percent=interval,
        kl=total.kl / total.tokens,
        top1=total.agreed / total.tokens,
    )
