"""DESIGN's invariants 1 to 3 for every model type of the installed mlx-lm.

docs/models.md says what came out.

After mlx-lm gained types: add them to zoo.toml, then `PYTHONPATH=tests python -m
support.support_matrix` writes docs/models.md.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models import base, olmo3
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from agentmem.engine.model_runner import ModelRunner
from agentmem.kvcache.attention import relative_error
from agentmem.kvcache.block import SealedBlock, Snapshot, Tail, from_host, to_host
from support.support_matrix import DOCUMENT, document
from support.tiny import random_tokens, run
from support.zoo import ALIASES, INCONSISTENT, MODEL_TYPES, UNBUILDABLE, tiny

BLOCK = 32
TOKENS = random_tokens(130)
TYPES = [t for t in (*MODEL_TYPES, *ALIASES) if t not in UNBUILDABLE]
NO_REUSE = ("deepseek_v41", "deepseek_v41_text", "longcat_flash_ngram", "minimax_m3_vl")
ROUNDING = 1e-3  # of the largest logit: float32, in another order
# where a rounding decides a code, or which experts are asked, a logit may move by more
STEP = 0.03


def runner_of(model_type: str, kv_bits: str = "4") -> ModelRunner:
    runner = ModelRunner(tiny(model_type), kv_bits=kv_bits, block_size=BLOCK)
    runner.spec = replace(runner.spec, state_interval=BLOCK)
    runner.plain_spec = replace(runner.spec, kv_bits="16")
    if runner.spec.bits is not None:
        runner.use_centres(runner.calibrate(random_tokens(64, seed=99)))
    return runner


def pieces(runner: ModelRunner, cache: object, tokens: list[int], sizes: Sequence[int]) -> mx.array:
    """Return the logits of `tokens`, run `sizes` at a time."""
    logits, at = [], 0
    for n in sizes:
        logits.append(run(runner, cache, tokens[at : at + n], n))
        at += n
    assert at == len(tokens)
    return mx.concatenate(logits)


@pytest.mark.parametrize("model_type", [t for t in TYPES if t not in INCONSISTENT])
def test_with_16_bits_logits_equal_mlx_lms(model_type):
    runner, sizes = runner_of(model_type, "16"), (23, 17, 20, 1, 1)
    theirs, at = make_prompt_cache(runner.model), 0
    got = pieces(runner, runner.new_cache(), TOKENS[: sum(sizes)], sizes)
    for n in sizes:
        expected = runner.model(mx.array([TOKENS[at : at + n]]), cache=theirs)[0]
        assert relative_error(got[at : at + n], expected) < ROUNDING
        at += n


def through_the_store(runner: ModelRunner, snapshot: Snapshot, length: int) -> Snapshot:
    """Return what a restore reads: of every block what is needed, as bytes and back."""
    blocks = []
    for i, block in enumerate(snapshot.blocks):
        part = block.only(runner.spec.needed(i, length))
        assert part.parts == runner.spec.needed(i, length)
        blocks.append(SealedBlock(from_host(to_host(part.arrays))))
    tail = snapshot.tail
    if tail is not None:
        arrays = from_host(to_host(tail.to_arrays()))
        tail = Tail.from_arrays(arrays, tail.num_tokens, tail.prefix_len, runner.spec)
    return Snapshot(blocks, tail)


@pytest.mark.parametrize("model_type", NO_REUSE)
def test_what_cannot_be_kept_runs_on_mlx_lms_caches_and_leaves_nothing(model_type):
    runner = runner_of(model_type)
    assert runner.spec.opaque is not None
    cache = runner.new_cache()
    assert runner.prefill(cache, TOKENS[:70]) == []
    assert cache.snapshot().tail is None


def test_a_window_that_the_model_itself_cuts_out_of_a_cache_of_everything_is_left_to_mlx_lm(
    monkeypatch,
):
    attention = base.scaled_dot_product_attention
    monkeypatch.setattr(olmo3, "scaled_dot_product_attention", lambda *a, **k: attention(*a, **k))
    monkeypatch.setattr(olmo3.Model, "make_cache", lambda model: [KVCache() for _ in model.layers])
    runner = ModelRunner(tiny("olmo3"), kv_bits="16", block_size=BLOCK)
    expected = runner.model(mx.array([TOKENS]), cache=make_prompt_cache(runner.model))
    assert (
        relative_error(runner.forward(mx.array([TOKENS]), [runner.new_cache()])[0], expected)
        < ROUNDING
    )
    assert runner.spec.opaque is not None
    assert "a window of 40" in runner.spec.opaque.reason


@pytest.mark.parametrize(
    "error", [AssertionError, KeyError, NotImplementedError, UnboundLocalError]
)
@pytest.mark.parametrize("traced", [True, False])
def test_a_model_that_refuses_caches_other_than_mlx_lms_runs_on_those(monkeypatch, error, traced):
    forward = olmo3.Model.__call__

    def picky(model, tokens, cache=None):
        if cache is not None and not isinstance(
            cache[0], RotatingKVCache if traced else (RotatingKVCache, KVCache)
        ):
            raise error("not mine")
        return forward(model, tokens, cache)

    monkeypatch.setattr(olmo3.Model, "__call__", picky)
    runner = ModelRunner(tiny("olmo3"), block_size=BLOCK)
    assert runner.spec.opaque is not None
    assert f"{error.__name__}: " in runner.spec.opaque.reason


def test_what_mlx_cannot_compute_here_is_refused_at_load(monkeypatch):
    def failing(model, tokens, cache=None):
        raise RuntimeError("[metal_kernel] No Metal back-end")

    monkeypatch.setattr(olmo3.Olmo3Model, "__call__", failing)
    with pytest.raises(RuntimeError, match="No Metal"):
        ModelRunner(tiny("olmo3"), block_size=BLOCK)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gemma3n", "qwen3_next"])
def test_a_model_is_understood_with_blocks_smaller_than_what_it_is_checked_with(model_type):
    assert ModelRunner(tiny(model_type), block_size=8).spec.opaque is None


@pytest.mark.parametrize("model_type", [t for t in TYPES if t not in NO_REUSE])
def test_logits_after_a_restore_are_bit_identical(model_type):
    runner = runner_of(model_type)
    for at in (3 * BLOCK, 3 * BLOCK + 13):
        stayed, blocks = runner.new_cache(), []
        for piece in (TOKENS[:50], TOKENS[50:at]):
            blocks += runner.prefill(stayed, piece)
        snapshot = replace(stayed.snapshot(), blocks=blocks)
        returned = runner.new_cache(through_the_store(runner, snapshot, at))
        rest, sizes = TOKENS[at : at + 15], (9, 5, 1)
        assert mx.array_equal(
            pieces(runner, stayed, rest, sizes), pieces(runner, returned, rest, sizes)
        )


@pytest.mark.parametrize("model_type", TYPES)
def test_each_of_a_batch_gets_the_logits_it_gets_alone(model_type):
    runner, lengths = runner_of(model_type), (1, BLOCK - 1, 70)
    alone, together = ([runner.new_cache() for _ in lengths] for _ in range(2))
    for cache, n in zip([*alone, *together], lengths * 2, strict=True):
        runner.prefill(cache, TOKENS[:n])
    for step in range(3):
        logits, _ = runner.decode(together, [TOKENS[n + step] for n in lengths])
        for row, cache, n in zip(logits, alone, lengths, strict=True):
            assert relative_error(row, run(runner, cache, [TOKENS[n + step]], 1)[0]) < ROUNDING


def naive_logits(runner: ModelRunner, tokens: list[int]) -> mx.array:
    """Run invariant 1 word for word: one token a pass, and logits of each.

    After each full block the cache is rebuilt from its blocks.
    """
    cache, blocks, logits = runner.new_cache(), [], []
    for token in tokens:
        part, [fresh] = runner.forward(mx.array([[token]]), [cache])
        mx.eval(part, [b.arrays for b in fresh])
        logits.append(part[0])
        if fresh:
            blocks += fresh
            cache = runner.new_cache(Snapshot(blocks))
    return mx.concatenate(logits)


@pytest.mark.parametrize("model_type", [t for t in TYPES if t not in (*INCONSISTENT, *NO_REUSE)])
def test_a_token_sees_its_block_in_full_and_earlier_ones_as_codes(model_type):
    runner = runner_of(model_type)
    n = 2 * BLOCK + 10
    naive = naive_logits(runner, TOKENS[:n])
    assert (
        relative_error(pieces(runner, runner.new_cache(), TOKENS[:n], (n - 25, 25)), naive) < STEP
    )


@pytest.mark.parametrize("model_type", TYPES)
def test_attention_on_codes_equals_attention_on_their_dequantized_copy(model_type):
    runner, n = runner_of(model_type), 3 * BLOCK + 3
    if runner.spec.bits is None:
        return
    dense = runner.new_cache()
    snapshot = Snapshot(runner.prefill(dense, TOKENS[:n]), dense.snapshot().tail)
    runner.on_codes = True
    on_codes = runner.new_cache(snapshot)
    rest, sizes = TOKENS[n : n + 6], (5, 1)
    assert (
        relative_error(pieces(runner, on_codes, rest, sizes), pieces(runner, dense, rest, sizes))
        < ROUNDING
    )


@pytest.mark.skipif(
    mx.metal.is_available(),
    reason="some types can be built on Metal alone: the document is of a CPU",
)
def test_the_document_says_what_the_models_are():
    assert Path(DOCUMENT).read_text() == document()
