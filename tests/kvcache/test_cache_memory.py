"""What a running cache and its blocks hold is no more than they say."""

import gc

import mlx.core as mx
import pytest
from mlx_lm.models import llama

from agentmem.agent_key import AgentKey
from agentmem.engine.model_runner import ModelRunner
from support.tiny import BLOCK, VOCAB, random_tokens, tiny_engine
from support.zoo import tiny


def one_layer() -> llama.Model:
    args = {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = llama.Model(
        llama.ModelArgs(
            "llama", num_hidden_layers=1, head_dim=64, rms_norm_eps=1e-5, vocab_size=VOCAB, **args
        )
    )
    mx.eval(model.parameters())
    return model


def active_memory() -> int:
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()


@pytest.mark.parametrize("kv_bits", ["16", "4"])
def test_blocks_of_a_layer_that_is_alone_of_its_kind_hold_their_own_bytes_only(kv_bits):
    runner, blocks = ModelRunner(one_layer(), kv_bits=kv_bits, block_size=BLOCK), []
    before, cache, tokens = active_memory(), runner.new_cache(), random_tokens(20 * BLOCK)
    for start in range(0, len(tokens), BLOCK):
        blocks += runner.prefill(cache, tokens[start : start + BLOCK])
    del cache
    assert active_memory() - before < sum(block.nbytes for block in blocks) + 100_000


@pytest.mark.parametrize("model_type", ["lfm2", "mamba2", "falcon_h1"])
def test_recurrent_state_after_a_prefill_is_no_view_of_the_prompts_activations(model_type):
    runner = ModelRunner(tiny(model_type), block_size=256)
    before, cache = active_memory(), runner.new_cache()
    [block] = runner.prefill(cache, random_tokens(256))
    held = sum(a.nbytes for a in cache.arrays()) + block.nbytes
    assert active_memory() - before < held + 50_000


@pytest.mark.parametrize("cut", [9, 521])  # in the first block; in the tail
def test_a_fork_of_a_few_tokens_keeps_nothing_else_of_what_it_was_cut_from(tmp_path, cut):
    with tiny_engine(tmp_path, block_size=512) as engine:
        before = engine.on_engine(active_memory)
        engine.ask("alice", random_tokens(1000), 1)
        engine.call(engine.engine.forks.fork(AgentKey("default", "alice"), "bob", None))
        engine.call(engine.engine.forks.truncate(AgentKey("default", "bob"), cut, None))
        engine.call(engine.engine.agents.delete(AgentKey("default", "alice")))
        engine.wait_until_saved()
        counted = engine.core.prefix_cache.pool.nbytes
        assert engine.on_engine(active_memory) - before < counted + 50_000
