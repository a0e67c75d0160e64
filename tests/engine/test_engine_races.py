"""Requests that overlap with evictions, deletions, failed writes and each other's restores."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import SPMStreamingDetokenizer, TokenizerWrapper

from agentmem.agent_key import AgentKey
from agentmem.errors import StartupError
from support.engines import hold_back
from support.fake_engine import tiny_tokenizer
from support.tiny import (
    BLOCK,
    ONE_SEQUENCE,
    EngineThread,
    random_tokens,
    tiny_engine,
    tiny_loader,
    word_ids,
)

PROMPT = random_tokens(100)
SYSTEM = random_tokens(2 * BLOCK)


def on_engine(engine: EngineThread, function: Callable[[], Any]) -> Any:
    done: Future[Any] = Future()
    engine.engine._post(lambda: done.set_result(function()))
    return done.result(10)


def branches(engine: EngineThread) -> list[Any]:
    return list(engine.engine._core.prefix_cache.branches())


def wait_until_saved(engine: EngineThread) -> None:
    deadline = time.monotonic() + 10
    while any(b.save_at is not None for b in branches(engine)):
        assert time.monotonic() < deadline, "not everything was persisted"
        time.sleep(0.02)


def test_what_a_restore_matched_in_ram_is_not_evicted_meanwhile(tmp_path):
    with tiny_engine(tmp_path, tail_delay=0.0) as engine:
        engine.ask("alice", PROMPT)
        wait_until_saved(engine)
        core = engine.engine._core
        on_engine(engine, lambda: core.prefix_cache.pool.drop(branches(engine)[0].blocks[0]))
        gate = threading.Event()
        hold_back(engine, "read_block", {1}, gate)

        async def overlap():
            alice = asyncio.create_task(engine.answer("alice", PROMPT))
            await asyncio.sleep(0.2)
            await asyncio.to_thread(on_engine, engine, lambda: core.budget.evict_idle(1 << 30))
            assert core.prefix_cache.pool.nbytes > 0
            gate.set()
            return await alice

        assert engine.call(overlap())[1].cached_tokens == 99
        assert engine.engine.health()["status"] == "ok"


def test_many_agents_in_a_tiny_budget_never_break_the_engine(tmp_path):
    system = random_tokens(3 * BLOCK)
    with tiny_engine(tmp_path, tail_delay=0.0, kv_budget=4 * ONE_SEQUENCE) as engine:

        async def agent(i: int) -> None:
            tokens = system + random_tokens(40 + 7 * i, seed=i)
            for turn in range(8):
                text, _ = await engine.answer(f"a{i}", tokens, 12)
                tokens = tokens + word_ids(text) + random_tokens(5, seed=turn)
                await asyncio.sleep(0.02 * (i % 3))

        async def all_agents():
            await asyncio.gather(*[agent(i) for i in range(8)])

        engine.call(all_agents())
        assert engine.engine.health()["status"] == "ok"


@pytest.mark.parametrize("cancel", [False, True])
def test_a_turn_that_ends_while_another_one_restores_the_same_tail_is_kept_whole(tmp_path, cancel):
    prompt = random_tokens(70)
    with tiny_engine(tmp_path, tail_delay=0.0) as engine:
        turn = prompt + word_ids(engine.ask("alice", prompt, 8)[0])
    with tiny_engine(tmp_path, tail_delay=0.0) as engine:
        gate = threading.Event()
        hold_back(engine, "read_tail", {2}, gate)

        async def overlap():
            first = asyncio.create_task(engine.answer("alice", [*turn, 11, 12, 13], 2))
            second = asyncio.create_task(engine.answer("alice", [*turn, 50, 51], 2))
            text, _ = await first
            if cancel:
                second.cancel()
                await asyncio.sleep(0.05)
            gate.set()
            await asyncio.gather(second, return_exceptions=True)
            await asyncio.sleep(0.2)
            return text

        third = [*turn, 11, 12, 13, *word_ids(engine.call(overlap())), 20, 21]
        text, stats = engine.ask("alice", third, 20)
        assert stats.cached_tokens == len(turn) + 4
    with tiny_engine(tmp_path / "control") as engine:
        engine.ask("alice", prompt, 8)
        engine.ask("alice", [*turn, 11, 12, 13], 2)
        assert engine.ask("alice", third, 20)[0] == text


def test_an_agent_deleted_while_its_request_waits_does_not_come_back(tmp_path):
    with tiny_engine(tmp_path, max_running=1) as engine:
        engine.ask("bob", [*SYSTEM, 8, 8, 8])
        engine.ask("alice", [*SYSTEM, 9, 9, 9])

        async def overlap():
            busy = asyncio.create_task(engine.answer("bob", [*SYSTEM, 5, 6], 60))
            await asyncio.sleep(0.02)
            alice = asyncio.create_task(engine.answer("alice", [*SYSTEM, 9, 9, 9, 9], 4))
            await asyncio.sleep(0.02)
            assert await engine.engine.agents.delete(AgentKey("default", "alice"))
            await asyncio.gather(busy, alice)

        engine.call(overlap())
    with tiny_engine(tmp_path) as engine:
        assert list(engine.agents()) == ["bob"]


def test_a_first_request_cancelled_before_its_prefill_leaves_no_agent(tmp_path):
    with tiny_engine(tmp_path) as engine:
        engine.ask("bob", [*SYSTEM, 8, 8, 8])
    with tiny_engine(tmp_path) as engine:
        gate = threading.Event()
        hold_back(engine, "read_block", {1, 2}, gate)

        async def overlap():
            carol = asyncio.create_task(engine.answer("carol", [*SYSTEM, 9, 9, 9, 9], 4))
            await asyncio.sleep(0.1)  # restoring the blocks that bob has
            carol.cancel()
            await asyncio.gather(carol, return_exceptions=True)
            gate.set()

        engine.call(overlap())
    with tiny_engine(tmp_path) as engine:
        assert list(engine.agents()) == ["bob"]


def test_blocks_shared_with_a_deleted_agent_are_saved_again(tmp_path):
    with tiny_engine(tmp_path, tiny_loader(max_context=100_000)) as engine:

        async def overlap():
            alice = asyncio.create_task(engine.answer("alice", [*SYSTEM, 9, 9, 9], 20_000))
            while not engine.engine.health()["store"]["blocks"]:
                await asyncio.sleep(0.01)
            await engine.engine.agents.delete(AgentKey("default", "alice"))
            answer = await engine.answer("bob", [*SYSTEM, 8, 8, 8], 4)
            assert not alice.done()
            alice.cancel()
            return answer

        assert engine.call(overlap())[1].cached_tokens == 2 * BLOCK
        wait_until_saved(engine)
        writes = engine.engine.health()["store"]["writes"]
        time.sleep(0.4)
        assert engine.engine.health()["store"]["writes"] == writes
    with tiny_engine(tmp_path) as engine:
        assert engine.ask("bob", [*SYSTEM, 8, 8, 8, 7])[1].cached_tokens == 2 * BLOCK + 3


def test_blocks_that_a_slow_disk_made_the_store_skip_are_saved_later(tmp_path):
    with tiny_engine(tmp_path) as engine:
        writer = engine.engine._core.store._writer
        gate, process, backlog = threading.Event(), writer._process, writer._max_backlog
        writer._process = lambda jobs: (gate.wait(20), process(jobs))
        writer._max_backlog = 1
        engine.ask("alice", PROMPT, 40)
        assert engine.engine.health()["store"]["skipped"] > 0
        writer._max_backlog = backlog
        gate.set()
    with tiny_engine(tmp_path) as engine:
        assert engine.ask("alice", PROMPT)[1].cached_tokens == 99


def test_a_tail_is_saved_in_time_while_others_decode(tmp_path):
    with tiny_engine(tmp_path, tiny_loader(max_context=100_000), tail_delay=0.05) as engine:
        time.sleep(0.2)

        async def overlap():
            busy = asyncio.create_task(engine.answer("bob", PROMPT, 20_000))
            await asyncio.sleep(0.1)
            await engine.answer("alice", PROMPT[:20], 2)
            began = time.monotonic()
            while time.monotonic() - began < 5:
                await asyncio.sleep(0.02)
                if any(
                    b.agent.key.agent_id == "alice" and b.tail.disk_bytes for b in branches(engine)
                ):
                    break
            assert not busy.done()
            busy.cancel()
            return time.monotonic() - began

        assert engine.call(overlap()) < 4


def test_a_tie_between_branches_is_decided_alike_after_a_restart(tmp_path):
    prompt = random_tokens(20)
    tie = [*prompt, 200, 201, 202]

    def history(engine: EngineThread) -> None:
        engine.ask("alice", [*prompt, 30], 3)  # a tail only
        engine.ask("alice", prompt + random_tokens(60, seed=4), 3)  # sealed blocks, to be cut

    with tiny_engine(tmp_path / "a", tail_delay=5.0) as engine:
        history(engine)
        expected = engine.ask("alice", tie, 40)[0]
    with tiny_engine(tmp_path / "b", tail_delay=5.0) as engine:
        history(engine)
    with tiny_engine(tmp_path / "b") as engine:
        assert engine.ask("alice", tie, 40)[0] == expected


def test_a_late_bad_read_does_not_undo_a_block_that_was_sealed_again(tmp_path):
    with tiny_engine(tmp_path) as engine:
        engine.ask("alice", [*SYSTEM, 9, 9, 9])
        engine.ask("bob", [*SYSTEM, 8, 8, 8])
    for file in tmp_path.rglob("blocks/*/*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
    with tiny_engine(tmp_path) as engine:
        gate = threading.Event()
        hold_back(engine, "read_block", {3, 4}, gate)

        async def overlap():
            alice = asyncio.create_task(engine.answer("alice", [*SYSTEM, 9, 9, 9, 1], 4))
            bob = asyncio.create_task(engine.answer("bob", [*SYSTEM, 8, 8, 8, 1], 4))
            await alice
            await asyncio.sleep(0.2)
            gate.set()
            await bob

        engine.call(overlap())
    with tiny_engine(tmp_path) as engine:
        for name, token in (("alice", 9), ("bob", 8)):
            assert (
                engine.ask(name, [*SYSTEM, token, token, token, 1])[1].cached_tokens
                == 2 * BLOCK + 3
            )


def test_prewarms_of_one_prompt_at_once_answer_nothing(tmp_path):
    """The second one finds its whole prompt, but for the last token, in blocks of the first."""
    prompt = random_tokens(2 * BLOCK + 1)
    with tiny_engine(tmp_path) as engine:

        async def at_once():
            asked = [engine.answer("alice", prompt, max_tokens=0) for _ in range(4)]
            return await asyncio.gather(*asked)

        answers = engine.call(at_once())
    assert [(text, stats.completion_tokens) for text, stats in answers] == [("", 0)] * 4
    assert max(stats.cached_tokens for _, stats in answers) == 2 * BLOCK


def test_ids_that_the_tokenizer_does_not_know_are_never_sampled(tmp_path):
    def load():
        bare = tiny_tokenizer(size=200)._tokenizer
        return replace(tiny_loader()(), tokenizer=TokenizerWrapper(bare, SPMStreamingDetokenizer))

    with tiny_engine(tmp_path, load) as engine:
        assert (
            engine.ask("a", random_tokens(20), 3, logit_bias=((250, 100.0),))[1].completion_tokens
            == 3
        )


def test_a_home_that_cannot_be_written_is_a_startup_error(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StartupError), tiny_engine(tmp_path / "file" / "home"):
        pass
