"""What tests of a whole engine wait for, hold back and watch."""

import threading
import time
from concurrent.futures import Future
from typing import Any

from support.tiny import (
    EngineThread,
)


def settle(engine) -> None:
    """Wait until blocks and tails are on disk."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        branches = list(engine.engine._core.prefix_cache.branches())
        if all(b.tail.disk_bytes or not len(b.tail.tokens) for b in branches) and all(
            n.disk_bytes for b in branches for n in b.blocks
        ):
            return
        time.sleep(0.02)
    raise AssertionError("not everything was persisted")


class Sampler:
    """Looks, again and again between two steps, at what the budget counts and at what is really
    there.
    """

    def __init__(self, engine: EngineThread):
        self._engine, self.most, self.uncounted = engine, 0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(0.002):
            used, real = self._engine.on_engine(self._look)
            self.most, self.uncounted = max(self.most, used), max(self.uncounted, real - used)

    def _look(self) -> tuple[int, int]:
        core = self._engine.core
        entries = [
            *core.prefix_cache.blocks.values(),
            *(b.tail for b in core.prefix_cache.branches()),
        ]
        working = [
            a for seq in core.scheduler.active if seq.cache is not None for a in seq.cache.arrays()
        ]
        real = sum(e.data.nbytes for e in entries if e.data is not None) + sum(
            a.nbytes for a in working
        )
        return core.budget.used_bytes, real

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def hold_back(engine: EngineThread, method: str, calls: set[int], gate: threading.Event) -> None:
    """Let the nth calls of a store's read method answer only once `gate` is set."""
    store = engine.engine._core.store
    original, count = getattr(store, method), [0]

    def wrapped(*args: Any) -> Future[Any]:
        real = original(*args)
        count[0] += 1
        if count[0] not in calls:
            return real
        late: Future[Any] = Future()

        def pass_on() -> None:
            gate.wait(20)
            error = real.exception()
            late.set_exception(error) if error else late.set_result(real.result())

        threading.Thread(target=pass_on, daemon=True).start()
        return late

    setattr(store, method, wrapped)
