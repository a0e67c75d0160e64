"""DESIGN's invariants 1 to 3 on tiny models.

What a token sees depends on positions alone, a restore is exact, batchmates do not matter.
"""

import threading
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from agentmem.engine.model_runner import ModelRunner
from agentmem.kvcache import attention
from agentmem.kvcache.attention import attend_dense, observed
from agentmem.kvcache.backend import FusedAttention, attention_backend
from agentmem.kvcache.block import Snapshot, Tail, from_host, to_host
from agentmem.kvcache.quantize import decode, encode, hadamard
from agentmem.kvcache.spec import ChunkedAttention, FullAttention, KVCacheSpec, SlidingWindow
from support.tiny import BLOCK, KINDS, random_tokens, run, tiny_model, tiny_runner

TOKENS = random_tokens(150)


def close(a: mx.array, b: mx.array, tolerance: float) -> bool:
    return bool((mx.abs(a - b).max() <= tolerance * mx.abs(b).max()).item())


def attend(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
    return attend_dense(q, k, v, sinks=None, backend=attention_backend(), **options)


def naive_logits(runner: ModelRunner, tokens: list[int]) -> mx.array:
    """Run invariant 1 word for word: one token a pass, and logits of each.

    After each full block the cache is rebuilt from its codes alone.
    """
    cache, logits = runner.new_cache(), []
    for token in tokens:
        logits.append(run(runner, cache, [token], 1))
        if cache.length % BLOCK == 0:
            cache = runner.new_cache(Snapshot(tuple(cache.blocks)))
    return mx.concatenate(logits)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "deepseek_v2", "gpt_oss"])
@pytest.mark.parametrize("chunk", [1, 7, 32, 64, 150])
def test_logits_do_not_depend_on_the_prefill_chunk(kind, chunk):
    runner = tiny_runner(kind)
    # a code may flip where a rounding decides it, so "beyond float rounding" is a code's worth in
    # one channel
    assert close(run(runner, runner.new_cache(), TOKENS, chunk), naive_logits(runner, TOKENS), 5e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_without_quantization_logits_equal_mlx_lms(kind):
    from mlx_lm.models.cache import make_prompt_cache

    runner = tiny_runner(kind, kv_bits="16")
    theirs = make_prompt_cache(runner.model)
    cache = runner.new_cache()
    for start in (0, 40, 100, 101, 149):
        part = mx.array([TOKENS[start : {0: 40, 40: 100, 100: 101, 101: 149, 149: 150}[start]]])
        expected, (got, _) = runner.model(part, cache=theirs), runner.forward(part, [cache])
        assert close(got, expected, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("on_codes", [False, True])
@pytest.mark.parametrize("at", [5, BLOCK, 3 * BLOCK + 7])
def test_logits_after_a_restore_are_bit_identical(kind, on_codes, at):
    runner = tiny_runner(kind, on_codes=on_codes)
    stayed = runner.new_cache()
    run(runner, stayed, TOKENS[:at], 32)
    snapshot = stayed.snapshot()
    blocks = [type(b)(from_host(to_host(b.arrays))) for b in snapshot.blocks]
    tail = snapshot.tail and Tail.from_arrays(
        from_host(to_host(snapshot.tail.to_arrays())), snapshot.tail.num_tokens, 0, runner.spec
    )
    returned = runner.new_cache(Snapshot(blocks, tail))
    assert mx.array_equal(
        run(runner, stayed, TOKENS[at:], 9), run(runner, returned, TOKENS[at:], 9)
    )


@pytest.mark.parametrize("n", [1, 2, 40])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
@pytest.mark.parametrize(
    "kind, window", [(FullAttention, None), (SlidingWindow, 30), (ChunkedAttention, 32)]
)
def test_attention_of_the_last_positions_is_softmax_over_what_they_see(kind, window, dtype, n):
    layer, stop = kind(2, 16, 8, window), 100
    first = layer.first_visible(stop - n)
    mx.random.seed(n)
    q = mx.random.normal((1, n, 6, 16)).swapaxes(1, 2).astype(dtype)
    k, v = (mx.random.normal((1, 2, 128, d)).astype(dtype)[:, :, first:stop] for d in (16, 8))
    got = np.array(attend(q, k, v, scale=0.3, layer=layer, first=first).astype(mx.float32))
    q, k, v = (np.array(a.astype(mx.float32), dtype=np.float64) for a in (q, k, v))
    for head, row in np.ndindex(6, n):
        position = stop - n + row
        seen = slice(layer.first_visible(position) - first, position + 1 - first)
        weights = np.exp(0.3 * k[0, head // 3, seen] @ q[0, head, row])
        np.testing.assert_allclose(
            got[0, head, row],
            weights @ v[0, head // 3, seen] / weights.sum(),
            atol=1e-5 if dtype == mx.float32 else 5e-3,
        )


def test_attention_does_not_round_by_what_comes_after_in_the_chunk():
    """So few columns make one block of a BLAS; of more, its own sums are split by their number."""
    mx.random.seed(0)
    layer, n, fewer = FullAttention(2, 64, 64), 40, 20
    q = mx.random.normal((1, n, 6, 64)).swapaxes(1, 2)
    k, v = (mx.random.normal((1, 2, 300, 64)) for _ in "kv")
    whole = attend(q, k, v, scale=0.125, layer=layer, first=0)[:, :, : n - fewer]
    part = attend(
        q[:, :, : n - fewer], k[:, :, :-fewer], v[:, :, :-fewer], scale=0.125, layer=layer, first=0
    )
    assert (np.array(whole) == np.array(part)).mean() > 0.95


@pytest.mark.parametrize("kind", ["llama", "qwen3", "deepseek_v2"])
@pytest.mark.parametrize("kv_bits", ["4", "k5v3", "k5v4", "8"])
def test_attention_on_codes_equals_attention_on_their_dequantized_copy(kind, kv_bits):
    on_codes, dense = tiny_runner(kind, kv_bits, on_codes=True), tiny_runner(kind, kv_bits)
    start = dense.new_cache()
    run(dense, start, TOKENS[: 3 * BLOCK + 3], 32)
    snapshot = start.snapshot()
    for chunk in (1, 3):
        a = run(on_codes, on_codes.new_cache(snapshot), TOKENS[3 * BLOCK + 3 : 4 * BLOCK], chunk)
        b = run(dense, dense.new_cache(snapshot), TOKENS[3 * BLOCK + 3 : 4 * BLOCK], chunk)
        assert close(a, b, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("on_codes", [False, True])
def test_a_gpus_way_of_attention_gives_the_logits_of_this_devices(kind, on_codes):
    runners = [
        ModelRunner(tiny_model(kind), block_size=BLOCK, backend=backend)
        for backend in (FusedAttention(), attention_backend())
    ]
    prefilled, decoded = [], []
    for runner in runners:
        runner.on_codes = on_codes
        caches = [runner.new_cache(), runner.new_cache()]
        prefilled.append(run(runner, caches[0], TOKENS[: BLOCK + 30], 40))
        run(runner, caches[1], TOKENS[: BLOCK - 1], 40)
        steps = [runner.decode(caches, [TOKENS[i], 7]) for i in range(3)]
        decoded.append(mx.concatenate([logits for logits, _ in steps]))
    assert close(*prefilled, 5e-3) and close(*decoded, 5e-3)  # a code's worth, as above
    if kind != "gpt_oss":  # with sinks a CPU has no way of its own
        assert not mx.array_equal(*prefilled)


@pytest.mark.parametrize("on_codes", [False, True])
def test_a_batch_of_unequal_lengths_gives_each_its_own_logits(on_codes):
    runner = tiny_runner(on_codes=on_codes)
    lengths = (1, BLOCK - 1, BLOCK, 100)
    alone, together = [], []
    for caches in (alone, together):
        for n in lengths:
            cache = runner.new_cache()
            run(runner, cache, TOKENS[:n], 50)
            caches.append(cache)
    logits, fresh = runner.decode(together, [TOKENS[n] for n in lengths])
    assert [len(f) for f in fresh] == [0, 1, 0, 0]  # one was a token short of a block
    for row, cache, n in zip(logits, alone, lengths, strict=True):
        assert close(row, run(runner, cache, [TOKENS[n]], 1)[0], 1e-4)


@pytest.mark.parametrize("on_codes", [False, True])
@pytest.mark.parametrize("cut", [1, 3, 11, 31])
def test_a_block_cut_inside_keeps_its_codes_through_another_seal(on_codes, cut):
    runner = tiny_runner(on_codes=on_codes)
    cache = runner.new_cache()
    run(runner, cache, TOKENS, 50)
    for index in (0, 2):
        block = cache.blocks[index]
        tail = Tail.of_cut_block(block, cut, runner.spec)
        again = runner.new_cache(Snapshot(cache.blocks[:index], tail))
        run(runner, again, random_tokens(40, seed=7), 9)
        for name, codes in block.arrays.items():
            kept = again.blocks[index].arrays[name]
            assert mx.array_equal(codes[:, :, :cut], kept[:, :, :cut]), name


def test_a_cut_sequence_goes_on_alike_from_codes_and_from_a_stored_tail():
    runner = tiny_runner()
    cache = runner.new_cache()
    run(runner, cache, TOKENS, 50)
    tail = Tail.of_cut_block(cache.blocks[3], 20, runner.spec)
    grown = runner.new_cache(Snapshot(cache.blocks[:3], tail))
    run(runner, grown, TOKENS[116:120], 2)  # 20 codes, then 4 in full precision
    stored = grown.snapshot().tail
    assert stored is not None and (stored.num_tokens, stored.prefix_len) == (24, 20)
    read = Tail.from_arrays(from_host(to_host(stored.to_arrays())), 24, 20, runner.spec)
    for tail in (read, read.cut(22), read.cut(10)):
        back = runner.new_cache(Snapshot(cache.blocks[:3], tail))
        twin = runner.new_cache(Snapshot(cache.blocks[:3], stored.cut(tail.num_tokens)))
        assert back.length == 96 + tail.num_tokens
        assert mx.array_equal(run(runner, back, TOKENS[:40], 9), run(runner, twin, TOKENS[:40], 9))


@pytest.mark.parametrize(("kind", "kv_bits"), [("llama", "4"), ("llama", "16"), ("gemma3", "16")])
def test_adopting_anothers_block_changes_what_is_attended_to(kind, kv_bits):
    runner = tiny_runner(kind, kv_bits)
    ours, others = runner.new_cache(), runner.new_cache()
    run(runner, ours, TOKENS[:64], 64)
    run(runner, others, random_tokens(64, seed=5), 64)
    ours.adopt(1, others.blocks[1])
    rebuilt = runner.new_cache(Snapshot((ours.blocks[0], others.blocks[1])))
    assert mx.array_equal(
        run(runner, ours, TOKENS[64:90], 26), run(runner, rebuilt, TOKENS[64:90], 26)
    )


def test_an_idle_cache_takes_the_bytes_that_the_paper_counts():
    runner = tiny_runner()
    cache = runner.new_cache()
    run(runner, cache, TOKENS, 50)
    fp16 = 2 * 2 * 2 * 64 * 2 * BLOCK  # keys and values, layers, heads, head dim, bytes, tokens
    assert cache.blocks[1].nbytes == fp16 * (1 + 8 / 64) / 4


def test_a_code_is_within_a_step_of_its_value_and_scales_take_16_bits():
    x = mx.random.normal((1, 2, 32, 64))
    codes = encode(x, 4)
    assert codes.scales.dtype == codes.biases.dtype == mx.float16
    error = mx.abs(decode(codes, 4, mx.float32, 64) - x)
    step = mx.abs(codes.scales.astype(mx.float32))
    assert mx.all(error <= step).item()
    assert error.mean().item() < 0.3 * step.mean().item()


@pytest.mark.parametrize(
    ("dim", "group"), [(48, 48), (64, 64), (80, 80), (96, 96), (100, 100), (192, 64), (576, 64)]
)
def test_the_rotation_is_its_own_inverse(dim, group):
    matrix = hadamard(dim)
    assert matrix.shape == (group, group)
    assert close(matrix @ matrix, mx.eye(group), 1e-6)


def test_the_spec_is_read_off_the_model():
    gemma, deepseek = tiny_runner("gemma3").spec, tiny_runner("deepseek_v2").spec
    assert [layer.kind for layer in gemma.layers] == ["sliding"] * 5 + ["global"]
    assert {layer.window for layer in gemma.layers} == {40, None}
    assert (deepseek.layers[0].k_dim, deepseek.layers[0].v_dim) == (192, 128)
    assert all(layer.attention_sinks for layer in tiny_runner("gpt_oss").spec.layers)


def test_a_model_whose_attention_is_not_understood_keeps_mlx_lms_caches(monkeypatch):
    from mlx_lm.models.cache import make_prompt_cache

    from agentmem.kvcache.layers import dense, kv

    def unscaled(q, k, v, *, scale, **_):
        return mx.fast.scaled_dot_product_attention(
            q, k, v, scale=2 * scale, mask="causal" if q.shape[2] > 1 else None
        )

    monkeypatch.setattr(dense, "attend_dense", unscaled)
    monkeypatch.setattr(kv, "true_mask", lambda *_: None)
    runner = ModelRunner(tiny_model(), block_size=BLOCK)
    assert runner.spec.opaque is not None
    assert "attention is not understood" in runner.spec.opaque.reason
    logits, [fresh] = runner.forward(mx.array([TOKENS]), [runner.new_cache()])
    assert fresh == []
    assert mx.array_equal(
        logits, runner.model(mx.array([TOKENS]), cache=make_prompt_cache(runner.model))
    )


def test_a_model_that_is_traced_is_not_told_of_another_threads_attention():
    model, seen = tiny_runner().model, []

    def call() -> None:
        mx.eval(model(mx.array([[1, 2]])))

    with observed(lambda *what: seen.append(what)):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        assert not seen
        call()
        assert len(seen) == 2
    call()
    assert len(seen) == 2


def test_the_seam_hands_opaque_caches_to_mlx_lm():
    from mlx_lm.models.cache import make_prompt_cache

    model = tiny_model()
    before = model(mx.array([TOKENS[:20]]), cache=make_prompt_cache(model))
    attention.install_seam(model)
    attention.install_seam(model)
    assert mx.array_equal(model(mx.array([TOKENS[:20]]), cache=make_prompt_cache(model)), before)


@pytest.mark.parametrize("dim", [24, 48, 72, 80, 96, 100, 112, 120, 192, 256, 576])
def test_head_dims_of_any_size_are_quantized_and_attended_to_alike_from_codes(dim):
    from mlx_lm.models import llama

    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=96,
        num_hidden_layers=1,
        intermediate_size=64,
        num_attention_heads=2,
        rms_norm_eps=1e-5,
        vocab_size=256,
        head_dim=dim,
    )
    runner = ModelRunner(llama.Model(args), block_size=BLOCK)
    assert runner.spec.bits == (4, 4)
    cache = runner.new_cache()
    run(runner, cache, TOKENS[:100], 50)
    assert cache.blocks[1].nbytes == BLOCK * runner.spec.sealed_bytes
    runner.on_codes = True
    on_codes = runner.new_cache(cache.snapshot())
    assert close(
        run(runner, on_codes, TOKENS[100:110], 3), run(runner, cache, TOKENS[100:110], 3), 1e-4
    )


def test_head_dims_that_would_not_gain_are_kept_whole_and_the_reason_is_given():
    spec = KVCacheSpec((FullAttention(2, 8, 8),), mx.float16)
    assert spec.bits is None
    assert "[8]" in (spec.unquantized_reason or "")
