"""More clients than the queue takes, for seconds; benchmarks/overload.py takes minutes."""

import asyncio

from overload import MAX_QUEUE, QUEUE_TIME, SERVER_FLAGS, press

from support.server_process import ServerProcess


def test_whoever_is_let_in_is_answered_soon_and_the_rest_is_told_to_wait(model, tmp_path):
    with ServerProcess(tmp_path / "home", *SERVER_FLAGS, model=model) as server:
        pid = server.process.pid
        clients = 3 * MAX_QUEUE
        outcome = asyncio.run(press(server.url, pid, clients=clients, seconds=6, seed=1))
        assert server.stop() == 0
    # that memory is flat shows in a minute only, and the time of this process' clients is its own
    slow = ("memory", "p99")
    assert [why for why in outcome.failures() if not why.startswith(slow)] == []
    assert outcome.p99() < 10 * QUEUE_TIME
    assert outcome.statuses["200"] > 10
