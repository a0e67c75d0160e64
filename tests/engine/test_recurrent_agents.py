"""Models with recurrent state, and models of which nothing can be kept, through a whole engine."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from agentmem.agent_key import AgentKey
from agentmem.errors import Conflict
from support.engines import Sampler, settle
from support.tiny import BLOCK, EngineThread, random_tokens, tiny_engine
from support.zoo import zoo_loader as loader

PROMPT = random_tokens(200, seed=1)
MORE = random_tokens(20, seed=2)
KINDS = ("qwen3_next", "mamba2", "recurrent_gemma")  # with global attention, alone, with a window


def tokens_of(engine: EngineThread, agent: str = "alice") -> list[int]:
    return engine.core.prefix_cache.agents["default", agent].newest.tokens().tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "max_tokens", [8, 7 * BLOCK - 199]
)  # it rests in the middle of a block, and at the end of one
def test_an_evicted_agent_goes_on_from_its_very_end_with_the_same_answer(
    tmp_path, kind, max_tokens
):
    def second(home: Path, evicted: bool) -> tuple[str, Any]:
        with tiny_engine(home, loader(kind)) as engine:
            engine.ask("alice", PROMPT, max_tokens)
            settle(engine)
            tokens = tokens_of(engine)
            if evicted:
                engine.call(engine.engine.agents.evict(AgentKey("default", "alice")))
                assert engine.core.prefix_cache.pool.nbytes == 0
            return engine.ask("alice", [*tokens, *MORE], 30)

    text, stayed = second(tmp_path / "stayed", False)
    assert stayed.cache == "hot"
    again, stats = second(tmp_path / "evicted", True)
    assert again == text
    assert stats.cache == "warm"
    assert stats.cached_tokens == stayed.cached_tokens == 199 + max_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_is_sent_again_goes_on_from_its_end_and_another_from_the_last_snapshot_before(
    tmp_path, kind
):
    with tiny_engine(tmp_path / "a", loader(kind), state_interval=1024) as engine:
        engine.ask("alice", PROMPT, 60)
        settle(engine)
        assert engine.ask("alice", PROMPT, 8)[1].cached_tokens == 199
        text, stats = engine.ask("alice", [*PROMPT, *MORE], 8)
        assert stats.cached_tokens == 199
        assert engine.ask("alice", [*PROMPT[:150], *MORE], 8)[1].cached_tokens == 0
    with tiny_engine(tmp_path / "b", loader(kind)) as engine:
        engine.ask("bob", PROMPT, 0)
        assert engine.ask("bob", [*PROMPT, *MORE], 8)[0] == text


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_goes_to_the_last_snapshot_before_it_and_says_so(tmp_path, kind):
    with tiny_engine(tmp_path, loader(kind), state_interval=1024) as engine:
        engine.ask("alice", PROMPT, 60)
        settle(engine)
        fork = engine.call(engine.engine.forks.fork(AgentKey("default", "alice"), "bob", 240))
        assert fork.agent.tokens == 199
        cut = engine.call(engine.engine.forks.truncate(AgentKey("default", "alice"), 240, None))
        assert cut.agent.tokens == 199
        assert engine.ask("alice", [*PROMPT, *MORE], 8)[1].cached_tokens == 199
        with pytest.raises(Conflict, match="Nothing is kept"):
            engine.call(engine.engine.forks.fork(AgentKey("default", "alice"), "eve", 100))


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_agent_goes_on_where_it_is_imported(tmp_path, kind):
    with tiny_engine(tmp_path, loader(kind)) as engine:
        engine.ask("alice", PROMPT, 30)
        settle(engine)
        export = engine.call(engine.engine.archives.export(AgentKey("default", "alice")))
        path = tmp_path / "alice.agentmem"
        path.write_bytes(b"".join(export.chunks))
        export.close()
        with path.open("rb") as file:
            engine.call(engine.engine.archives.import_("default", "bob", file))
        tokens = [*tokens_of(engine), *MORE]
        mine, theirs = engine.ask("alice", tokens, 8), engine.ask("bob", tokens, 8)
        assert theirs[0] == mine[0]
        assert theirs[1].cached_tokens == mine[1].cached_tokens == 229


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_is_used_than_was_reserved(tmp_path, kind):
    prompts = {f"a{i}": random_tokens(300, seed=i) for i in range(4)}

    async def all_at_once(engine: EngineThread) -> list[str]:
        answers = [engine.answer(name, tokens, 60) for name, tokens in prompts.items()]
        return [text for text, _ in await asyncio.gather(*answers)]

    with tiny_engine(tmp_path / "free", loader(kind)) as engine:
        expected = engine.call(all_at_once(engine), timeout=120)
        kv_budget = int(2.5 * engine.core.budget.running_bytes(512))
    with tiny_engine(
        tmp_path / "tight", loader(kind), kv_budget=kv_budget, tail_delay=0.0
    ) as engine:
        with Sampler(engine) as sampler:
            assert engine.call(all_at_once(engine), timeout=120) == expected
        assert sampler.most <= kv_budget
        assert sampler.uncounted <= 0


def test_of_a_model_with_caches_of_its_own_nothing_is_kept_and_requests_are_counted(tmp_path):
    with tiny_engine(tmp_path, loader("deepseek_v41"), kv_budget=50_000_000) as engine:
        first = engine.ask("alice", PROMPT, 8, temperature=0.0)
        again = engine.ask("alice", [*PROMPT, *MORE], 8, temperature=0.0)
        assert again[1].cached_tokens == 0
        assert engine.ask("alice", PROMPT, 8, temperature=0.0)[0] == first[0]
        alice = engine.agents()["alice"]
        assert (alice.requests, alice.tokens, alice.ram_bytes, alice.disk_bytes) == (3, 0, 0, 0)
        assert engine.core.prefix_cache.pool.nbytes == 0
        assert engine.core.budget.used_bytes == 0
