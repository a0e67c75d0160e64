"""Layers with a window through a whole engine: what stays in RAM, what is read back, and that
nothing else changes.
"""

import asyncio
import time
from concurrent.futures import Future
from typing import Any

import pytest

from agentmem.agent_key import AgentKey
from agentmem.engine.api import GenerateRequest, SamplingParams
from agentmem.errors import CorruptSegment
from agentmem.prefix_cache.load import forget
from agentmem.prefix_cache.resume import missing, unsaved_blocks
from agentmem.store.upkeep.trim import Trimmed
from agentmem.store.writer.writer import StoreWriteSkipped
from support.engines import Sampler, settle
from support.lifecycle import drain
from support.tiny import BLOCK, EngineThread, random_tokens, tiny_engine, tiny_loader

PROMPT = random_tokens(600, seed=1)
LOAD = tiny_loader("gemma3")
WINDOW = "0"  # the stack of its five sliding layers; "1" is the global one


def newest(engine: EngineThread, agent: str = "alice") -> Any:
    return engine.core.prefix_cache.agents["default", agent].newest


def evict(engine: EngineThread, agent: str = "alice") -> int:
    return engine.call(engine.engine.agents.evict(AgentKey("default", agent)))


def test_what_rests_has_in_ram_only_what_its_end_sees(tmp_path):
    with tiny_engine(tmp_path, LOAD) as engine:
        engine.ask("alice", PROMPT, 8)
        settle(engine)
        branch, spec = newest(engine), engine.core.runner.spec
        parts = [node.data.parts for node in branch.blocks]
        assert parts == [spec.needed(i, len(branch)) for i in range(len(branch.blocks))]
        assert (
            sum(len(p) == len(spec.stacks) for p in parts) == 1
        )  # 39 tokens before 607 lie in it and in the tail
        info = engine.agents()["alice"]
        assert (info.tier, info.ram_bytes) == ("hot", engine.core.prefix_cache.pool.nbytes)
        assert all(len(node.disk_parts) == len(spec.stacks) for node in branch.blocks)


def test_an_evicted_agent_answers_as_if_it_had_not_been_and_only_what_it_needs_is_read(tmp_path):
    more = random_tokens(20, seed=2)

    def second(engine: EngineThread, evicted: bool) -> tuple[str, Any]:
        engine.ask("alice", PROMPT, 8)
        settle(engine)
        tokens = newest(engine).tokens().tolist()
        if evicted:
            assert evict(engine) > 0
            assert engine.core.prefix_cache.pool.nbytes == 0
        return engine.ask("alice", [*tokens, *more], 30)

    with tiny_engine(tmp_path / "stayed", LOAD) as engine:
        expected, _ = second(engine, False)
    with tiny_engine(tmp_path / "evicted", LOAD) as engine:
        text, stats = second(engine, True)
        files = engine.agents()["alice"].disk_bytes
    assert text == expected
    assert stats.cached_tokens == 607
    assert 0 < stats.restored_bytes < 0.6 * files  # a third of the files is the tail


@pytest.mark.parametrize("restarted", [False, True])
def test_truncated_to_any_block_boundary_it_answers_as_a_fresh_agent_with_the_same_blocks(
    tmp_path, restarted
):
    prompt, more = PROMPT[:200], random_tokens(12, seed=3)
    with tiny_engine(tmp_path / "a", LOAD) as engine:
        engine.ask("alice", prompt, 8)
        settle(engine)
        for end in range(BLOCK, 200, BLOCK):
            engine.call(engine.engine.forks.fork(AgentKey("default", "alice"), f"cut-{end}", None))
        settle(engine)
    with tiny_engine(tmp_path / "b", LOAD) as fresh, tiny_engine(tmp_path / "a", LOAD) as engine:
        if not restarted:
            engine.ask("alice", prompt, 8)
            settle(engine)
        for end in range(BLOCK, 200, BLOCK):
            shown = engine.call(
                engine.engine.forks.truncate(AgentKey("default", f"cut-{end}"), end, None)
            )
            assert shown.agent.tokens == end
            text, stats = engine.ask(f"cut-{end}", [*prompt[:end], *more], 8)
            assert stats.cached_tokens == end
            fresh.ask(f"fresh-{end}", [*prompt[:end], 9], 0)
            assert text == fresh.ask(f"fresh-{end}", [*prompt[:end], *more], 8)[0]


def test_an_ephemeral_agent_goes_on_from_its_end_and_is_prefilled_where_its_windows_are_gone(
    tmp_path,
):
    with tiny_engine(tmp_path / "a", LOAD) as engine:

        async def answer(tokens: list[int]) -> Any:
            request = GenerateRequest(
                AgentKey("default", "eve"),
                tokens,
                SamplingParams(max_tokens=8, seed=7, ignore_eos=True),
                ephemeral=True,
            )
            return [event async for event in engine.engine.generate(request)][-1].stats

        engine.call(answer(PROMPT))
        branch = newest(engine, "eve")
        lacking = missing(engine.core.runner.spec, branch.blocks, branch.tail, len(branch))
        assert not lacking and engine.agents()["eve"].disk_bytes == 0
        tokens = branch.tokens().tolist()
        assert engine.call(answer([*tokens, 9, 9])).cached_tokens == 607
        assert engine.call(answer([*PROMPT[:300], 9, 9])).cached_tokens == 0


def test_a_truncated_ephemeral_agent_keeps_the_windows_of_its_new_end(tmp_path):
    """They are in RAM alone, and between the old branch and the new one nothing else holds them."""
    with tiny_engine(tmp_path, LOAD) as engine:
        params = SamplingParams(max_tokens=0)
        drain(
            engine,
            GenerateRequest(AgentKey("default", "eve"), PROMPT[:330], params, ephemeral=True),
        )
        detail = engine.call(engine.engine.forks.truncate(AgentKey("default", "eve"), 327, None))
        _, stats = engine.ask("eve", PROMPT[:327] + random_tokens(9, seed=3), 1)
        assert (detail.agent.tokens, stats.cache, stats.cached_tokens) == (327, "hot", 327)


def test_a_request_that_leaves_nothing_new_leaves_no_windows_in_ram(tmp_path):
    with tiny_engine(tmp_path, LOAD) as engine:
        engine.ask("alice", PROMPT, 8)
        settle(engine)
        rested = engine.core.prefix_cache.pool.nbytes
        _, stats = engine.ask(
            "alice", PROMPT[:300], 1
        )  # its windows are read back, and it ends where it began
        assert stats.cached_tokens == 299
        assert engine.on_engine(lambda: engine.core.prefix_cache.pool.nbytes) == rested


@pytest.mark.parametrize("sequences", [1.5, 2.5])
def test_while_long_prompts_prefill_and_decode_nothing_is_used_that_was_not_reserved(
    tmp_path, sequences
):
    prompts = {f"a{i}": random_tokens(490, seed=i) for i in range(4)}

    async def all_at_once(engine: EngineThread) -> list[int]:
        answers = [engine.answer(name, tokens, 60) for name, tokens in prompts.items()]
        return [stats.completion_tokens for _, stats in await asyncio.gather(*answers)]

    with tiny_engine(tmp_path / "free", LOAD) as engine:
        kv_budget = int(sequences * engine.core.budget.running_bytes(768))
    with tiny_engine(tmp_path / "tight", LOAD, kv_budget=kv_budget, tail_delay=0.0) as engine:
        with Sampler(engine) as sampler:
            assert engine.call(all_at_once(engine), timeout=120) == [60] * 4
        assert sampler.most <= kv_budget
        assert sampler.uncounted <= 0


def test_of_a_block_that_two_wait_for_each_part_is_read_once(tmp_path):
    more = random_tokens(20, seed=4)
    with tiny_engine(tmp_path, LOAD) as engine:
        engine.ask("alice", PROMPT, 8)
        settle(engine)
        engine.call(engine.engine.forks.fork(AgentKey("default", "alice"), "bob", 10 * BLOCK))
        settle(engine)
    with tiny_engine(tmp_path, LOAD) as engine:
        read: list[tuple[bytes, str]] = []
        read_block = engine.core.store.read_block

        def noted(key: bytes, parts: frozenset[str]) -> Any:
            read.extend((key, part) for part in parts)
            return read_block(key, parts)

        engine.core.store.read_block = noted
        tokens = {"alice": newest(engine).tokens().tolist(), "bob": PROMPT[: 10 * BLOCK]}

        async def both() -> list[int]:
            asked = [engine.answer(name, [*tokens[name], *more]) for name in tokens]
            return [stats.cached_tokens for _, stats in await asyncio.gather(*asked)]

        assert engine.call(both()) == [607, 320]
        assert (
            len(read) == len(set(read)) == 18 + 1 + 2
        )  # the global stack of all, windows where two ends look


def test_a_file_that_lacks_what_it_should_hold_is_put_aside_and_prefilled_again(tmp_path):
    with tiny_engine(tmp_path, LOAD) as engine:
        engine.ask("alice", PROMPT, 8)
        settle(engine)
        evict(engine)
        tokens, read_block = newest(engine).tokens().tolist(), engine.core.store.read_block

        def without_windows(key: bytes, parts: frozenset[str]) -> Any:
            return read_block(key, parts - {WINDOW})

        engine.core.store.read_block = without_windows
        text, stats = engine.ask("alice", [*tokens, 9, 9])
        engine.core.store.read_block = read_block
        assert stats.cached_tokens < 17 * BLOCK
        assert engine.core.store.stats()["quarantined"] > 0
    with tiny_engine(tmp_path / "fresh", LOAD) as engine:
        engine.ask("alice", tokens, 0)
        assert engine.ask("alice", [*tokens, 9, 9])[0] == text


@pytest.mark.parametrize("fails", [False, True])
def test_a_prefill_that_outruns_the_disk_keeps_few_windows_and_what_is_lost_is_prefilled_again(
    tmp_path, fails
):
    with tiny_engine(tmp_path, LOAD, tail_delay=3600) as engine:
        store, late = engine.core.store, []
        save_block = store.save_block

        def later(*args: Any, **options: Any) -> Future[Any]:
            future: Future[Any] = Future()
            late.append((future, args, options))
            return future

        store.save_block = later
        engine.ask("alice", PROMPT, 8)
        branch = newest(engine)
        windows = [i for i, node in enumerate(branch.blocks) if WINDOW in node.data.parts]
        most = unsaved_blocks(engine.core.runner.spec)[int(WINDOW)]
        assert windows == list(range(18 - most, 18))
        store.save_block = save_block

        def now() -> None:
            for future, args, options in late:
                if fails:
                    future.set_exception(StoreWriteSkipped("the disk is slow"))
                else:
                    save_block(*args, **options).add_done_callback(
                        lambda saved, f=future: f.set_result(saved.result())
                    )

        engine.on_engine(now)
        if fails:
            engine.call(engine.engine.agents.evict(AgentKey("default", "alice")))
        settle_blocks(engine)
        assert len(branch.tokens()) == 607
        assert [WINDOW in node.there for node in branch.blocks] == [
            not fails or i in windows for i in range(18)
        ]
        _, stats = engine.ask("bob", [*PROMPT[: 5 * BLOCK], 9, 9])
        assert stats.cached_tokens == (0 if fails else 5 * BLOCK)
        _, stats = engine.ask("bob", [*PROMPT[: 16 * BLOCK], 9, 9])
        assert stats.cached_tokens == 16 * BLOCK


def settle_blocks(engine: EngineThread) -> None:
    deadline = time.monotonic() + 10
    while not all(node.disk_bytes for node in newest(engine).blocks):
        assert time.monotonic() < deadline, "not everything was persisted"
        time.sleep(0.02)


def test_what_runs_counts_on_windows_that_leave_until_another_sequence_shares_them(tmp_path):
    """While the disk is slow a long prefill lets go of old windows as it makes new ones, unless
    they are shared.
    """

    def shared() -> tuple[int, int] | None:
        core = engine.core
        if not any(seq.cache is not None and len(seq.blocks) > 14 for seq in core.scheduler.active):
            return None
        match, before = (
            core.prefix_cache.match(AgentKey("default", "bob"), PROMPT[: 14 * BLOCK]),
            core.budget.reserved_bytes,
        )
        announced = core.budget.sharing_bytes(match)
        core.prefix_cache.hold(match.blocks)
        more = core.budget.reserved_bytes - before
        core.prefix_cache.release(match.blocks)
        return announced, more

    with tiny_engine(tmp_path, LOAD) as engine:
        engine.core.store.save_block = lambda *args, **options: Future()
        task = asyncio.run_coroutine_threadsafe(
            engine.answer("alice", PROMPT + random_tokens(300), 1), engine.loop
        )
        while (found := engine.on_engine(shared)) is None:
            assert not task.done()
        assert found[0] == found[1] > 2 * BLOCK * engine.core.runner.spec.stack_bytes[0]
        task.result(60)
        for branch in engine.core.prefix_cache.branches():  # nothing waits for the disk
            branch.agent.ephemeral = True


def test_what_a_full_store_lets_go_of_while_it_is_read_is_no_damage_to_what_is_in_ram(tmp_path):
    with tiny_engine(tmp_path, LOAD) as engine:
        engine.ask("alice", PROMPT, 8)
        settle(engine)
        late: list[Future[Any]] = []
        tokens, store = newest(engine).tokens().tolist(), engine.core.store
        store.read_block = lambda *_: late.append(Future()) or late[-1]
        task = asyncio.run_coroutine_threadsafe(engine.answer("bob", PROMPT[:300], 1), engine.loop)
        while not late:
            time.sleep(0.01)

        def trimmed() -> None:
            forget(engine.core.prefix_cache, Trimmed([node.key for node in newest(engine).blocks]))
            for future in late:
                future.set_exception(CorruptSegment("it isn't in the store"))

        engine.on_engine(trimmed)
        assert task.result(60)[1].cached_tokens == 0
        _, stats = engine.ask("alice", [*tokens, 9], 1)
        assert (stats.cache, stats.cached_tokens) == ("hot", len(tokens))
