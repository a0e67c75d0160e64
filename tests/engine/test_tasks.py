"""Coroutines on the engine thread: who hears of what comes of them, and what ends them."""

import asyncio
import queue
import threading
from concurrent.futures import Future

import pytest

from agentmem.agent_key import AgentKey
from agentmem.engine.tasks import Tasks, finished
from agentmem.errors import Busy, EngineFailed, ShuttingDown
from support.lifecycle import rested
from support.tiny import BLOCK, tiny_engine


class Inbox:
    """An engine thread that does nothing but what is posted to it, until that raises."""

    def __init__(self):
        self._inbox = queue.SimpleQueue()
        self.tasks = Tasks(self._inbox.put, lambda: None)
        self.bug: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self):
        try:
            while (function := self._inbox.get()) is not None:
                function()
        except BaseException as e:
            self.bug = e
            self.tasks.end(EngineFailed("failed"))

    def stop(self):
        self._inbox.put(None)
        self.thread.join()


@pytest.fixture
def inbox():
    inbox = Inbox()
    yield inbox
    inbox.stop()


async def begun(event: threading.Event) -> None:
    await asyncio.to_thread(event.wait, 5)


def test_each_piece_runs_on_the_engine_thread_and_the_result_goes_to_who_waits(inbox):
    written, seen = Future(), []

    async def work():
        seen.append(threading.current_thread())
        value = await finished(written)
        seen.append(threading.current_thread())
        return value + 1

    async def ask():
        asked = asyncio.create_task(inbox.tasks.perform(work))
        await asyncio.sleep(0.05)
        written.set_result(1)
        return await asked

    assert asyncio.run(ask()) == 2
    assert seen == [inbox.thread, inbox.thread]


def test_an_error_of_the_future_is_raised_where_it_was_awaited(inbox):
    async def work():
        refused = Future()
        refused.set_exception(OSError("disk"))
        try:
            await finished(refused)
        except OSError as e:
            raise Busy(f"no {e}") from e

    with pytest.raises(Busy, match="no disk"):
        asyncio.run(inbox.tasks.perform(work))
    assert inbox.bug is None


def test_who_goes_away_does_not_stop_what_was_begun(inbox):
    started, written, ended = threading.Event(), Future(), threading.Event()

    async def work():
        started.set()
        await finished(written)
        ended.set()

    async def ask():
        asked = asyncio.create_task(inbox.tasks.perform(work))
        await begun(started)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        written.set_result(None)
        await begun(ended)

    asyncio.run(ask())
    assert ended.is_set() and inbox.bug is None


def test_a_bug_after_a_wait_is_the_engines_and_everyone_who_waits_hears_of_it(inbox):
    started, written, let_go = [threading.Event(), threading.Event()], Future(), []

    async def broken():
        started[0].set()
        await finished(written)
        raise RuntimeError("out of paper")

    async def waits():
        started[1].set()
        try:
            await finished(Future())
        finally:
            let_go.append(True)

    async def ask():
        both = [asyncio.create_task(inbox.tasks.perform(work)) for work in (broken, waits)]
        for event in started:
            await begun(event)
        written.set_result(None)
        return await asyncio.wait_for(asyncio.gather(*both, return_exceptions=True), 5)

    assert [type(error) for error in asyncio.run(ask())] == [EngineFailed, EngineFailed]
    assert isinstance(inbox.bug, RuntimeError) and let_go == [True]


def test_who_asks_for_what_can_not_even_begin_hears_of_it(inbox):
    def begin():
        raise TypeError("one argument too many")

    with pytest.raises(EngineFailed):
        asyncio.run(asyncio.wait_for(inbox.tasks.perform(begin), 5))
    assert isinstance(inbox.bug, TypeError)


def test_once_ended_nothing_begins(inbox):
    async def work():
        raise AssertionError("begun")

    inbox.tasks.end(ShuttingDown("over"))
    with pytest.raises(ShuttingDown):
        asyncio.run(inbox.tasks.perform(work))
    assert inbox.bug is None


def test_an_operation_that_waits_for_the_disk_hears_that_the_engine_failed(tmp_path):
    with tiny_engine(tmp_path) as engine:
        rested(engine, hot=True)
        engine.core.store.flush = Future  # never ends

        def broken():
            raise RuntimeError("out of paper")

        async def truncate():
            key = AgentKey("default", "alice")
            truncation = asyncio.create_task(engine.engine.forks.truncate(key, BLOCK, None))
            await asyncio.sleep(0.2)
            assert not truncation.done()
            engine.engine._post(broken)
            with pytest.raises(EngineFailed):
                await asyncio.wait_for(truncation, 5)
            with pytest.raises(EngineFailed):
                await engine.engine.agents.show(key)

        engine.call(truncate())
        assert engine.engine.failed
