"""The demo model: exactness against mlx-lm, quality of 4 bits, chunk sizes, restore."""

import pydoc_data.topics
from dataclasses import replace

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, make_prompt_cache

from agentmem.engine.model_runner import ModelRunner
from agentmem.kvcache.block import Snapshot
from agentmem.kvcache.calibrate import calibration_tokens
from agentmem.kvcache.quantize import CacheSpace
from agentmem.models.loading import LoadedModel, load_model
from support.tiny import run

pytestmark = pytest.mark.demo


@pytest.fixture(scope="module")
def demo(demo_model_dir) -> LoadedModel:
    return load_model(str(demo_model_dir), demo_model_dir.parent.parent)


@pytest.fixture(scope="module")
def runner(demo) -> ModelRunner:
    runner = ModelRunner(demo.model)
    runner.use_centres(runner.calibrate(calibration_tokens(lambda t: demo.tokenizer.encode(t))))
    return runner


@pytest.fixture(scope="module")
def unquantized(runner) -> ModelRunner:
    plain = object.__new__(ModelRunner)  # the same model and seam, another precision
    plain.__dict__ = runner.__dict__ | {
        "spec": runner.plain_spec,
        "_space": CacheSpace(runner.plain_spec),
    }
    return plain


@pytest.fixture(scope="module")
def corpus(demo) -> list[int]:
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    return demo.tokenizer.encode(text[:6000])[:700]


class PlainAffineCache(KVCache):
    """Every token in 4 bits at once, as mlx-lm's QuantizedKVCache and the paper do it.

    It is dequantized for speed on a CPU.
    """

    def update_and_fetch(self, keys, values):
        keys, values = (
            mx.dequantize(*mx.quantize(x, group_size=64, bits=4), group_size=64, bits=4)
            for x in (keys, values)
        )
        return super().update_and_fetch(keys, values)


def mean_kl(logits: mx.array, reference: mx.array) -> float:
    """Return KL(reference || logits) in nats, the mean over positions."""
    p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (reference, logits))
    return (mx.exp(p) * (p - q)).sum(axis=-1).mean().item()


def test_sixteen_bits_give_mlx_lms_tokens(demo, unquantized):
    prompt = demo.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Tell me about the history of lighthouses."}],
        add_generation_prompt=True,
    )
    theirs, cache = make_prompt_cache(demo.model), unquantized.new_cache()
    unquantized.prefill(cache, prompt[:-1])
    demo.model(mx.array([prompt[:-1]]), cache=theirs)
    ours, expected = [prompt[-1]], [prompt[-1]]
    for _ in range(24):
        logits, fresh = unquantized.decode([cache], [ours[-1]])
        unquantized.evaluate([logits], fresh)
        ours.append(logits.argmax().item())
        expected.append(demo.model(mx.array([[expected[-1]]]), cache=theirs)[0, -1].argmax().item())
    assert ours == expected


def test_four_bits_cost_almost_nothing_and_plain_affine_ones_over_five_times_more(
    demo, runner, unquantized, corpus
):
    reference = run(unquantized, unquantized.new_cache(), corpus, 512)
    ours = mean_kl(run(runner, runner.new_cache(), corpus, 512), reference)
    caches = [PlainAffineCache() for _ in demo.model.layers]
    parts = [corpus[i : i + 350] for i in range(0, len(corpus), 350)]
    plain = mean_kl(
        mx.concatenate([demo.model(mx.array([part]), cache=caches)[0] for part in parts]), reference
    )
    print(f"mean KL over {len(corpus)} tokens: ours {ours:.5f}, plain affine {plain:.5f} nats")
    assert ours < 0.01
    assert plain > 5 * ours


def test_logits_do_not_depend_on_the_chunk_size(runner, corpus):
    prompt = corpus[:600]
    by_size = {
        size: run(runner, runner.new_cache(), prompt, size)[-90:] for size in (64, 512, 2048)
    }
    for size in (64, 512):
        # what may differ is a code that a rounding flips: far below what quantization itself
        # changes
        assert mean_kl(by_size[size], by_size[2048]) < 1e-6, size


def test_a_restored_cache_gives_bit_identical_logits(runner, corpus):
    stayed = runner.new_cache()
    runner.prefill(stayed, corpus[:300])
    snapshot = stayed.snapshot()
    assert (
        len(snapshot.blocks) == 1 and snapshot.tail is not None and snapshot.tail.num_tokens == 44
    )
    returned = runner.new_cache(Snapshot(snapshot.blocks, snapshot.tail))
    for chunk in (5, 1):
        tokens = corpus[300:310]
        assert mx.array_equal(
            run(runner, stayed, tokens, chunk), run(runner, returned, tokens, chunk)
        )


def test_the_blocks_of_the_demo_model_take_0_281_of_fp16(runner, corpus):
    cache = runner.new_cache()
    [first] = runner.prefill(cache, corpus[:256])
    fp16 = 2 * 30 * 3 * 64 * 2 * 256
    sinks = 2 * 30 * 3 * 64 * 4 * runner.spec.num_sinks
    assert (first.nbytes - sinks) / fp16 == pytest.approx(0.28125)
    assert replace(runner.spec, kv_bits="16").bits is None
