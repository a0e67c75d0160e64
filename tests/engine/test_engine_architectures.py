"""A conversation over the whole engine and its store, for models that are more than attention over
all tokens.
"""

from itertools import pairwise
from pathlib import Path

import pytest

from agentmem.agent_key import AgentKey
from agentmem.engine.api import GenerateRequest, SamplingParams
from agentmem.models.loading import LoadedModel
from support.fake_engine import NOWHERE, tiny_tokenizer
from support.tiny import BLOCK, VOCAB, random_tokens, tiny_engine, word_ids
from support.zoo import tiny

PROMPT = random_tokens(150)
KINDS = {
    "gemma3_text": "windows",
    "gpt_oss": "windows with sinks",
    "llama4": "chunks",
    "deepseek_v3": "latents",
    "gemma4_text": "layers that share a cache",
    "qwen3_next": "gated delta rule",
    "falcon_h1": "attention and state in one layer",
    "recurrent_gemma": "windows and recurrence",
    "mamba2": "state alone",
}


def loader(model_type: str):
    return lambda: LoadedModel(
        f"tiny-{model_type}",
        Path("/nowhere"),
        tiny(model_type),
        tiny_tokenizer(size=VOCAB),
        {},
        1024,
        model_type,
        NOWHERE,
    )


def converse(engine, agent: str, turns: int, then=lambda: None) -> list[str]:
    """Each turn extends the last; `then` is called after each."""
    tokens, said = PROMPT, []
    for turn in range(turns):
        text, _ = engine.ask(agent, tokens, 20)
        said.append(text)
        tokens = tokens + word_ids(text) + random_tokens(40, seed=turn)
        then()
    return said


@pytest.mark.parametrize("model_type", KINDS)
def test_an_agent_says_the_same_evicted_after_each_turn_and_never(tmp_path, model_type):
    with tiny_engine(tmp_path / "a", loader(model_type)) as engine:
        expected = converse(engine, "a", 3)
    with tiny_engine(tmp_path / "b", loader(model_type)) as engine:

        def evict() -> None:
            engine.wait_until_saved()
            assert engine.call(engine.engine.agents.evict(AgentKey("default", "a"))) is not None
            assert engine.agents()["a"].ram_bytes == 0

        assert converse(engine, "a", 3, evict) == expected


@pytest.mark.parametrize("model_type", KINDS)
def test_after_a_restart_every_token_of_the_last_turn_is_cached(tmp_path, model_type):
    with tiny_engine(tmp_path, loader(model_type)) as engine:
        text, _ = engine.ask("a", PROMPT, 20)
    more = PROMPT + word_ids(text) + random_tokens(30, seed=5)
    with tiny_engine(tmp_path / "cold", loader(model_type)) as engine:
        cold, stats = engine.ask("a", PROMPT, 20)
        assert cold == text
        expected, _ = engine.ask("a", more, 20)
    with tiny_engine(tmp_path, loader(model_type)) as engine:
        got, stats = engine.ask("a", more, 20)
    assert (got, stats.cache, stats.cached_tokens) == (expected, "warm", len(PROMPT) + 19)


@pytest.mark.parametrize("model_type", KINDS)
def test_an_answer_that_was_dropped_costs_the_answer_alone(tmp_path, model_type):
    """Drop an answer, as a template does that leaves out the reasoning of earlier turns.

    Recurrent models have a state kept there.
    """
    with tiny_engine(tmp_path, loader(model_type), state_interval=8 * BLOCK) as engine:
        engine.ask("a", PROMPT, 70)
        for _ in range(2):
            _, stats = engine.ask("a", PROMPT + random_tokens(40, seed=6), 5)
            assert stats.cached_tokens >= len(PROMPT) - 1
        engine.wait_until_saved()
        engine.call(engine.engine.agents.evict(AgentKey("default", "a")))
        _, stats = engine.ask("a", PROMPT + random_tokens(40, seed=7), 5)
        assert stats.cached_tokens >= len(PROMPT) - 1


@pytest.mark.parametrize("model_type", ["qwen3_next", "mamba2"])
def test_an_edit_in_the_middle_goes_on_from_the_nearest_state(tmp_path, model_type):
    with tiny_engine(tmp_path, loader(model_type), state_interval=2 * BLOCK) as engine:
        engine.ask("a", PROMPT, 5)
        _, stats = engine.ask("a", PROMPT[:100] + random_tokens(40, seed=6), 5)
        assert stats.cached_tokens == 2 * BLOCK


@pytest.mark.parametrize("model_type", ["qwen3_next", "mamba2"])
@pytest.mark.parametrize(("prompt", "answer"), [(4 * BLOCK + 1, 3), (4 * BLOCK - 8, 9)])
def test_a_prompt_or_a_rest_that_ends_with_a_block_is_kept_like_any_other(
    tmp_path, model_type, prompt, answer
):
    with tiny_engine(tmp_path, loader(model_type)) as engine:
        text, _ = engine.ask("a", PROMPT[:prompt], answer)
        if prompt > 4 * BLOCK:
            _, stats = engine.ask("b", PROMPT[:prompt] + random_tokens(5), 2)
            assert stats.cached_tokens == 4 * BLOCK  # shared: its state is in the block
        _, stats = engine.ask("a", PROMPT[:prompt] + word_ids(text) + random_tokens(5), 2)
        assert stats.cached_tokens == prompt + answer - 1


@pytest.mark.parametrize("model_type", ["qwen3_next", "mamba2"])
def test_a_state_is_kept_where_a_request_says_that_later_ones_go_on(tmp_path, model_type):
    with tiny_engine(tmp_path, loader(model_type)) as engine:
        request = GenerateRequest(
            AgentKey("default", "a"),
            PROMPT,
            SamplingParams(max_tokens=20, ignore_eos=True),
            checkpoint=140,
        )
        engine.call(drain(engine.engine.generate(request)))
        _, stats = engine.ask(
            "a", PROMPT[:142] + random_tokens(9, seed=3), 2
        )  # without the header of the answer
        assert stats.cached_tokens == 140


async def drain(events) -> None:
    async for _ in events:
        pass


def test_many_short_turns_store_states_a_quarter_of_the_interval_apart(tmp_path):
    with tiny_engine(
        tmp_path, loader("mamba2"), state_interval=8 * BLOCK, tail_delay=60.0
    ) as engine:
        tokens = PROMPT
        for turn in range(12):
            text, stats = engine.ask("a", tokens, 4)
            assert stats.cached_tokens == (len(tokens) - 7 if turn else 0)
            tokens = tokens + word_ids(text) + random_tokens(6, seed=turn)
        nodes = engine.agents_blocks("a")
        at = [
            i * BLOCK + int(p[1:])
            for i, node in enumerate(nodes)
            for p in node.there
            if p.startswith("@")
        ]
    assert len(at) >= 2
    assert all(b - a >= 2 * BLOCK or b % (8 * BLOCK) == 0 for a, b in pairwise(at))


@pytest.mark.parametrize("model_type", ["deepseek_v41", "minimax_m3_vl"])
def test_what_cannot_be_kept_is_answered_alike_every_time_and_leaves_nothing(tmp_path, model_type):
    with tiny_engine(tmp_path, loader(model_type)) as engine:
        first, _ = engine.ask("a", PROMPT, 20)
        again, stats = engine.ask("a", PROMPT, 20)
        assert (again, stats.cache, stats.cached_tokens) == (first, "cold", 0)
        assert engine.core.prefix_cache.pool.nbytes == 0
        assert "nothing is kept" in engine.engine.health()["cache"]
        assert engine.core.store.stats()["blocks"] == 0
