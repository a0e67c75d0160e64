"""What mlx-lm's own models and caches do, fed in one go and in pieces.

Every model type is built tiny.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

from support.zoo import ALIASES, INCONSISTENT, MODEL_TYPES, UNBUILDABLE, tiny

CHUNKS = (23, 17, 20, 1, 1, 1, 1)  # 64 tokens; the sliding window is 40
TOLERANCE = 2e-3
# they round keys and values to a grid, where the last bit of a sum can decide between two steps
ROUNDING = {
    "afm7": 0.05,
    "deepseek_v41": 0.05,
}
RECURRENT = [
    "baichuan_m1",
    "bailing_hybrid",
    "bailing_moe_linear",
    "bailing_moe_v3",
    "falcon_h1",
    "falcon_mamba",
    "gear",
    "granitemoehybrid",
    "jamba",
    "kimi_k3",
    "kimi_linear",
    "lfm2",
    "lfm2-vl",
    "lfm2_moe",
    "longcat_flash_ngram",
    "mamba",
    "mamba2",
    "nemotron_h",
    "olmo_hybrid",
    "plamo2",
    "prism_hadamard_qwen35",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_next",
    "recurrent_gemma",
    "rwkv7",
]
TOKENS = np.random.default_rng(0).integers(1, 255, sum(CHUNKS)).tolist()
BUILDABLE = [t for t in (*MODEL_TYPES, *ALIASES) if t not in UNBUILDABLE]


def logits_of(model: nn.Module, tokens: list[int], chunks: tuple[int, ...]) -> np.ndarray:
    """Return logits [tokens, vocab] with the caches mlx-lm makes, `chunks` tokens at a time."""
    cache = make_prompt_cache(model)
    logits = []
    for end, n in zip(np.cumsum(chunks), chunks, strict=True):
        logits.append(model(mx.array([tokens[end - n : end]]), cache=cache))
        mx.eval(logits[-1])
    return np.array(mx.concatenate(logits, axis=1)[0])


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("model_type", BUILDABLE)
def test_logits_see_the_whole_past_however_it_was_fed(model_type: str) -> None:
    model = tiny(model_type)
    once = logits_of(model, TOKENS, (len(TOKENS),))
    assert np.isfinite(once).all()
    other = logits_of(model, [TOKENS[0] ^ 1, *TOKENS[1:]], (len(TOKENS),))
    assert relative_error(other[50], once[50]) > 1e-3, "token 0 is forgotten at 50"

    error = relative_error(logits_of(model, TOKENS, CHUNKS), once)
    if model_type in INCONSISTENT:
        assert error > TOLERANCE, f"consistent now: {INCONSISTENT[model_type]}"
    else:
        assert error < ROUNDING.get(model_type, TOLERANCE)


def recurrent(cache: Any) -> Iterator[ArraysCache]:
    if isinstance(cache, ArraysCache):
        yield cache
    for part in getattr(cache, "caches", ()):
        yield from recurrent(part)


def other_state(state: mx.array) -> mx.array:
    if mx.issubdtype(state.dtype, mx.integer):  # token ids
        return state % 255 + 1
    return state * (1 + 0.5 * mx.random.normal(state.shape))


@pytest.mark.parametrize("model_type", RECURRENT)
def test_every_recurrent_state_counts(model_type: str) -> None:
    model = tiny(model_type)
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([TOKENS[:50]]), cache=cache))
    states = [
        (i, j) for i, c in enumerate(cache) for part in recurrent(c) for j in range(len(part.cache))
    ]
    assert states
    next_token = mx.array([TOKENS[50:51]])
    want = np.array(model(next_token, cache=deepcopy(cache)))
    for i, j in states:
        changed = deepcopy(cache)
        (part,) = recurrent(changed[i])
        part[j] = other_state(part[j])
        assert relative_error(np.array(model(next_token, cache=changed)), want) > 1e-4, (
            f"state {j} of cache {i}"
        )


@pytest.mark.parametrize("model_type", UNBUILDABLE)
def test_what_cannot_run_still_cannot(model_type: str) -> None:
    with pytest.raises(
        (RuntimeError, ValueError), match=UNBUILDABLE[model_type].rsplit(", ", 1)[1]
    ):
        logits_of(tiny(model_type), TOKENS, (len(TOKENS),))


def test_no_model_type_is_missing() -> None:
    assert len(MODEL_TYPES) >= 120
    assert {"Klear", "lfm2-vl", "lille-130m", "nemotron-nas", "solar_open"} <= set(MODEL_TYPES)
    assert not set(UNBUILDABLE) - set(MODEL_TYPES)
