"""RAM for caches stays within `kv_budget`, by real bytes, and nobody starves."""

import asyncio
import threading

import pytest

from agentmem.agent_key import AgentKey
from agentmem.engine.api import GenerateRequest, SamplingParams
from agentmem.errors import Busy, ContextLengthExceeded, MemoryPressure, StartupError
from agentmem.kvcache.layers.working import working_bytes
from agentmem.kvcache.quantize import sealed_bytes
from support.engines import Sampler
from support.tiny import (
    BLOCK,
    KINDS,
    ONE_SEQUENCE,
    EngineThread,
    random_tokens,
    tiny_engine,
    tiny_runner,
    word_ids,
)

PROMPTS = {f"a{i}": random_tokens(200, seed=i) for i in range(4)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("kv_bits", "on_codes"), [("4", False), ("4", True), ("k5v4", True), ("16", False)]
)
def test_the_bytes_of_a_sequence_are_known_before_it_runs(kind, kv_bits, on_codes):
    runner = tiny_runner(kind, kv_bits, on_codes)
    for length in (1, BLOCK, 3 * BLOCK + 5):
        cache = runner.new_cache(capacity=300)
        runner.prefill(cache, random_tokens(length))
        runner.prefill(
            cache, [9]
        )  # the working copy of codes has its final form after the block is closed
        sealed = length // BLOCK * BLOCK
        blocks, working = sum(b.nbytes for b in cache.blocks), sum(a.nbytes for a in cache.arrays())
        if not runner.spec.needs_all_parts:
            kept = [len(block.parts) for block in cache.blocks]
            assert kept == [len(runner.spec.needed(i, sealed)) for i in range(len(kept))]
            assert blocks <= sealed_bytes(runner.spec, sealed)
            assert working <= working_bytes(runner.spec, 300, on_codes=on_codes)
        else:
            assert blocks == sealed_bytes(runner.spec, sealed)
            assert working == working_bytes(
                runner.spec, length if on_codes else 300, on_codes=on_codes
            )


def test_many_agents_stay_within_the_budget_and_say_what_they_say_without_one(tmp_path):
    async def talk(engine: EngineThread, name: str) -> list[str]:
        tokens, said = PROMPTS[name], []
        for turn in range(3):
            text, _ = await engine.answer(name, tokens, 20)
            said.append(text)
            tokens = tokens + word_ids(text) + random_tokens(5, seed=turn)
        return said

    async def all_talk(engine: EngineThread) -> list[list[str]]:
        return await asyncio.gather(*[talk(engine, name) for name in PROMPTS])

    with tiny_engine(tmp_path / "free") as engine:
        expected = engine.call(all_talk(engine))
    budget = 5 * ONE_SEQUENCE // 2
    with tiny_engine(tmp_path / "tight", kv_budget=budget, tail_delay=0.0) as engine:
        with Sampler(engine) as sampler:
            assert engine.call(all_talk(engine)) == expected
            for i in range(20):  # more than fit; the four may have found room, one after the other
                engine.ask(f"b{i}", random_tokens(200, seed=20 + i), 1)
        assert 0 < sampler.most <= budget
        assert sampler.uncounted <= 0
        assert engine.core.prefix_cache.pool.evicted_bytes > 0
        assert engine.engine.health()["reserved_bytes"] == 0


def test_a_sequence_that_gives_its_ram_to_others_goes_on_with_the_same_tokens(tmp_path):
    prompts = {name: tokens + random_tokens(40, seed=9) for name, tokens in PROMPTS.items()}

    async def all_at_once(engine: EngineThread) -> list[str]:
        answers = [engine.answer(name, tokens, 120) for name, tokens in prompts.items()]
        return [text for text, _ in await asyncio.gather(*answers)]

    with tiny_engine(tmp_path / "free") as engine:
        expected = engine.call(all_at_once(engine))
        assert "agentmem_preemptions_total 0.0" in engine.engine.metrics().decode()
    with tiny_engine(tmp_path / "tight", kv_budget=4 * ONE_SEQUENCE, tail_delay=0.0) as engine:
        with Sampler(engine) as sampler:
            assert engine.call(all_at_once(engine)) == expected
        assert sampler.most <= 4 * ONE_SEQUENCE
        assert sampler.uncounted <= 0
        assert "agentmem_preemptions_total 0.0" not in engine.engine.metrics().decode()
        assert all(branch.in_use is False for branch in engine.core.prefix_cache.branches())


def test_a_preempted_answer_may_finish_at_shutdown(tmp_path):
    with tiny_engine(
        tmp_path, kv_budget=ONE_SEQUENCE * 11 // 4, tail_delay=0.0, grace=30.0
    ) as engine:

        async def stop_when_one_is_preempted() -> list[int]:
            answers = [engine.answer(name, PROMPTS[name], 160) for name in ("a0", "a1")]
            tasks = [asyncio.create_task(answer) for answer in answers]
            while "agentmem_preemptions_total 0.0" in engine.engine.metrics().decode():
                await asyncio.sleep(0.005)
            assert not any(task.done() for task in tasks)
            engine.engine.begin_drain()
            return [stats.completion_tokens for _, stats in await asyncio.gather(*tasks)]

        assert engine.call(stop_when_one_is_preempted()) == [160] * 2


def test_what_does_not_fit_now_waits_and_a_full_queue_says_so(tmp_path):
    with tiny_engine(tmp_path, kv_budget=ONE_SEQUENCE, max_queue=2, tail_delay=0.0) as engine:

        async def four() -> list[object]:
            answers = []
            for name, tokens in PROMPTS.items():
                answers.append(asyncio.create_task(engine.answer(name, tokens, 50)))
                while not engine.engine.health()[
                    "running"
                ]:  # the others come while the first one runs
                    await asyncio.sleep(0.001)
            return await asyncio.gather(*answers, return_exceptions=True)

        results = engine.call(four())
        refusals = [r for r in results if isinstance(r, Exception)]
        assert [type(r) for r in refusals] == [Busy]
        assert "max_queue" in refusals[0].message
        queued = [stats.queue_ms for _, stats in (r for r in results if r not in refusals)]
        assert sorted(queued)[0] < 50 < sorted(queued)[2]


def test_a_prompt_that_can_never_fit_is_refused_with_the_numbers(tmp_path):
    with (
        tiny_engine(tmp_path, kv_budget=ONE_SEQUENCE) as engine,
        pytest.raises(
            ContextLengthExceeded,
            match=f"256 tokens .*kv_budget, {ONE_SEQUENCE:,} bytes.* 300 tokens",
        ),
    ):
        engine.ask("alice", random_tokens(300))


def test_an_answer_ends_where_the_budget_does(tmp_path):
    with tiny_engine(tmp_path, kv_budget=ONE_SEQUENCE) as engine:
        _, stats = engine.ask("alice", random_tokens(200), 500)
        assert stats.prompt_tokens + stats.completion_tokens == 256


def test_a_budget_too_small_for_anything_is_refused_at_start(tmp_path):
    with pytest.raises(
        StartupError,
        match=r"kv_budget: 1,000 bytes .* needs \d{3},\d{3} for a sequence of 256 tokens",
    ):
        tiny_engine(tmp_path, kv_budget=1000).__enter__()
    with tiny_engine(tmp_path, kv_budget=ONE_SEQUENCE) as engine:  # the store was let go of
        assert engine.engine.max_context == 256


def test_a_pinned_agent_stays_in_ram(tmp_path):
    with tiny_engine(tmp_path, kv_budget=ONE_SEQUENCE + 30_000, tail_delay=0.0) as engine:
        engine.ask("a0", PROMPTS["a0"])
        engine.on_engine(
            lambda: setattr(engine.core.prefix_cache.agents["default", "a0"], "pinned", True)
        )
        for name in ("a1", "a2", "a3"):
            engine.ask(name, PROMPTS[name])
            engine.wait_until_saved()
        tiers = {name: agent.tier for name, agent in engine.agents().items()}
        assert tiers["a0"] == "hot"
        assert "warm" in tiers.values()


def test_a_store_that_cannot_write_costs_prefills_and_stops_nobody(tmp_path):
    with tiny_engine(tmp_path, kv_budget=ONE_SEQUENCE, tail_delay=0.0) as engine:
        for directory in (
            engine.core.store._writer._layout.blocks,
            engine.core.store._writer._layout.tails,
        ):
            directory.rmdir()
            directory.write_text("in the way")  # every write fails from here on
        first = {name: engine.ask(name, tokens)[0] for name, tokens in PROMPTS.items()}
        assert engine.engine.health()["status"] == "degraded"
        again = {name: engine.ask(name, tokens) for name, tokens in PROMPTS.items()}
        assert {name: text for name, (text, _) in again.items()} == first
        assert again["a0"][1].cached_tokens == 0
        assert engine.engine.health()["ram_bytes"] <= ONE_SEQUENCE


def test_prefetch_makes_an_agent_hot_if_there_is_room(tmp_path):
    with tiny_engine(tmp_path) as engine:
        expected = engine.ask("a0", PROMPTS["a0"])
        engine.ask("a1", PROMPTS["a1"])
    with tiny_engine(tmp_path) as engine:
        assert engine.call(engine.engine.agents.prefetch(AgentKey("default", "nobody"))) is None
        assert engine.agents()["a0"].tier == "warm"
        assert engine.call(engine.engine.agents.prefetch(AgentKey("default", "a0"))) > 10_000
        assert engine.agents()["a0"].tier == "hot"
        assert engine.call(engine.engine.agents.prefetch(AgentKey("default", "a0"))) == 0
        text, stats = engine.ask("a0", PROMPTS["a0"])
        assert (stats.cache, stats.restored_bytes, stats.cached_tokens) == ("hot", 0, 199)
        assert len(text.split()) == len(expected[0].split())
        engine.on_engine(
            lambda: setattr(engine.core.budget, "limit", engine.core.budget.used_bytes)
        )
        engine.on_engine(
            lambda: setattr(engine.core.prefix_cache.agents["default", "a0"], "pinned", True)
        )
        with pytest.raises(Busy, match="kv_budget"):
            engine.call(engine.engine.agents.prefetch(AgentKey("default", "a1")))


def test_a_request_in_the_queue_is_read_ahead_and_still_counts_as_warm(tmp_path):
    with tiny_engine(tmp_path) as engine:
        engine.ask("a0", PROMPTS["a0"])
    with tiny_engine(tmp_path, max_running=1) as engine:

        async def overlap() -> tuple[object, object]:
            running = asyncio.create_task(engine.answer("a1", PROMPTS["a1"], 200))
            await asyncio.sleep(0.1)
            waiting = asyncio.create_task(engine.answer("a0", PROMPTS["a0"]))
            for _ in range(200):
                await asyncio.sleep(0.01)
                if engine.agents()["a0"].tier == "hot":
                    break
            tier = engine.agents()["a0"].tier, running.done()
            await running
            return tier, (await waiting)[1].cache

        assert engine.call(overlap()) == (("hot", False), "warm")


def test_agents_that_start_at_once_prefill_their_common_prompt_once(tmp_path):
    system = random_tokens(4 * BLOCK, seed=5)
    prompts = [system + random_tokens(20, seed=i) for i in range(4)]
    with tiny_engine(tmp_path / "alone") as engine:
        alone = [engine.ask(f"a{i}", tokens)[0] for i, tokens in enumerate(prompts)]
    with tiny_engine(tmp_path / "together") as engine:

        async def all_at_once() -> list[tuple[str, object]]:
            return await asyncio.gather(
                *[engine.answer(f"a{i}", tokens) for i, tokens in enumerate(prompts)]
            )

        results = engine.call(all_at_once())
        assert [text for text, _ in results] == alone
        assert sorted(stats.cached_tokens for _, stats in results) == [0] + [4 * BLOCK] * 3


def test_above_the_memory_limit_idle_caches_leave_and_new_requests_are_refused_until_it_is_over(
    tmp_path,
):
    with tiny_engine(tmp_path, tail_delay=0.0) as engine:
        engine.ask("a0", PROMPTS["a0"])
        engine.wait_until_saved()
        limit = engine.core.budget.memory_limit
        engine.on_engine(lambda: setattr(engine.core.budget, "memory_limit", 1))

        async def stream() -> int:
            """A running answer goes on; meanwhile a new one is refused."""
            request = GenerateRequest(
                AgentKey("default", "a1"), PROMPTS["a1"], SamplingParams(600, ignore_eos=True)
            )
            events, refused = 0, 0
            async for _ in engine.engine.generate(request):
                events += 1
                if events % 100 == 0:
                    try:
                        await engine.answer("a2", PROMPTS["a2"])
                    except MemoryPressure as e:
                        refused += 1
                        assert (e.status, e.retry_after) == (503, 5)
            return refused

        assert engine.call(stream()) > 0
        assert engine.agents()["a0"].tier == "warm"
        assert engine.engine.health()["status"] == "degraded"
        engine.on_engine(lambda: setattr(engine.core.budget, "memory_limit", limit))
        for _ in range(100):
            if engine.engine.health()["status"] == "ok":
                break
            engine.on_engine(lambda: None)
            threading.Event().wait(0.02)
        assert engine.ask("a3", PROMPTS["a3"])[1].cache == "cold"


def test_a_prompt_sent_again_and_preempted_goes_on_over_what_it_computed_itself(tmp_path):
    """Not over the agent's other branch of the same tokens, which saw other precision at other
    places.
    """

    def second_answers(home, preempt_at: int) -> list[str]:
        with tiny_engine(home, tail_delay=0.0) as engine:
            admission, answers = engine.core.admission, []
            grow = admission.grow

            def preempt_once() -> None:
                for seq in list(engine.core.scheduler.active):
                    if (
                        seq.num_generated == preempt_at
                        and seq.cached_at_start
                        and not seq.preempted
                    ):
                        admission._preempt(seq)
                        assert seq.kept is not None
                grow()

            engine.on_engine(lambda: setattr(admission, "grow", preempt_once))
            for seed in range(4):
                prompt, params = (
                    random_tokens(100, seed=seed),
                    {"temperature": 0.0, "frequency_penalty": 1.0},
                )
                engine.ask(f"a{seed}", prompt, 150, **params)
                answers.append(engine.ask(f"a{seed}", prompt, 150, **params)[0])
            preemptions = 4 if preempt_at < 150 else 0
            assert f"agentmem_preemptions_total {preemptions}.0" in engine.engine.metrics().decode()
            return answers

    assert second_answers(tmp_path / "suspended", 70) == second_answers(tmp_path / "alone", 999)


def test_blocks_that_many_wait_for_are_read_once(tmp_path):
    system = random_tokens(6 * BLOCK, seed=3)
    with tiny_engine(tmp_path) as engine:
        for i in range(4):
            engine.ask(f"a{i}", system + random_tokens(20, seed=i))
    with tiny_engine(tmp_path) as engine:
        read, read_block = [], engine.core.store.read_block
        engine.core.store.read_block = lambda key, parts: read.append(key) or read_block(key, parts)

        async def all_at_once() -> list[str]:
            asked = [engine.answer(f"a{i}", system + random_tokens(20, seed=i)) for i in range(4)]
            return [stats.cache for _, stats in await asyncio.gather(*asked)]

        assert engine.call(all_at_once()) == ["warm"] * 4
        assert len(read) == len(set(read)) >= 6


def test_a_tail_that_a_cancelled_request_had_claimed_is_still_saved(tmp_path):
    with tiny_engine(tmp_path, tail_delay=0.3) as engine:
        engine.ask("a0", PROMPTS["a0"])

        def claim_and_abandon() -> None:
            [branch] = engine.core.prefix_cache.branches()
            match = engine.core.prefix_cache.match(
                AgentKey("default", "a0"), [*branch.tokens().tolist(), 9]
            )
            assert engine.core.write_back.claim_branch(branch.agent, match, persist=True) is branch
            engine.core.write_back.save_idle()
            engine.core.write_back.abandon(branch)

        engine.on_engine(claim_and_abandon)
        engine.wait_until_saved()
