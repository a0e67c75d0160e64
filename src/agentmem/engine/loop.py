"""The engine thread's loop: it takes what was posted, admits what waits, and steps."""

import logging
import queue
import time
from collections.abc import Callable

import mlx.core as mx

from ..errors import AgentMemError, Busy, MemoryPressure, ShuttingDown
from ..prefix_cache.cache import PrefixCache
from ..prefix_cache.write_back import WriteBack
from ..store.agent_store import AgentStore
from .admission import LOOK_INTERVAL, Admission
from .agents.lifecycle import Lifecycle
from .budget import RamBudget
from .scheduler import Scheduler
from .sequence import Sequence, Status
from .stepper import Stepper
from .tasks import Tasks, failed_error
from .trace import Trace

log = logging.getLogger(__name__)
Inbox = queue.SimpleQueue[Callable[[], None]]  # of what other threads ask the engine thread to do
_WATCH_INTERVAL = 0.25  # s between two looks at the process' memory


class EngineLoop:
    """The loop of the engine thread; every method runs there."""

    def __init__(
        self,
        *,
        inbox: Inbox,
        tasks: Tasks,
        stepper: Stepper,
        admission: Admission,
        agents: Lifecycle,
        scheduler: Scheduler,
        budget: RamBudget,
        prefix_cache: PrefixCache,
        write_back: WriteBack,
        store: AgentStore,
        trace: Trace,
    ):
        self._inbox = inbox
        self._tasks = tasks
        self._stepper = stepper
        self._admission = admission
        self._agents = agents
        self._scheduler = scheduler
        self._budget = budget
        self._prefix_cache = prefix_cache
        self._write_back = write_back
        self._store = store
        self._trace = trace
        self.memory_error: str | None = None  # what new requests are told while memory is short
        self._drain_deadline: float | None = None  # time.monotonic()
        self._watch_due = 0.0  # time.monotonic()
        self._failed = False

    def run(self) -> None:
        """Work until drained. A bug is raised; `run_failed` follows."""
        while True:
            self._take_commands()
            self._watch_memory()
            self._end_cancelled()
            self._refuse_overdue()
            self._admission.admit()
            self._stepper.end_prewarmed()
            self._admission.grow()
            self._stepper.step()
            self._budget.note()
            if self._drain_deadline is not None and self._drained():
                self._shut_down()
                return

    def run_failed(self) -> None:
        """Answer every request with EngineFailed, until drained. The store keeps what it has."""
        self._failed = True
        for seq in (*self._scheduler.active, *self._scheduler.waiting):
            seq.fail(failed_error())
        self._tasks.end(failed_error())
        try:
            while self._drain_deadline is None:
                self._inbox.get()()
        finally:
            self._close()

    # -- commands

    def submit(self, seq: Sequence) -> None:
        """Put a sequence into the queue, or fail it at once."""
        try:
            if self._failed:
                raise failed_error()
            if self._drain_deadline is not None:
                raise ShuttingDown("the server is shutting down")
            if self.memory_error:
                raise MemoryPressure(self.memory_error)
            self._agents.check_ephemeral(seq.request)
            self._scheduler.add(seq)
            self._admission.entered(seq)
        except AgentMemError as e:
            seq.fail(e)

    def drain(self, grace: float) -> None:
        """Fail what waits, and let what runs end within `grace` seconds."""
        if self._drain_deadline is None:
            self._drain_deadline = time.monotonic() + grace
            for seq in [s for s in self._scheduler.waiting if not s.preempted]:
                self._scheduler.remove(seq)
                seq.fail(ShuttingDown("the server is shutting down"))

    def _take_commands(self) -> None:
        """Run what is in the inbox; with nothing else to do, wait for it for a while."""
        timeout = self._idle_time()
        try:
            if timeout > 0:
                self._inbox.get(timeout=timeout)()
        except queue.Empty:
            return
        self._run_posted()

    def _run_posted(self) -> None:
        """Run what is in the inbox until it is empty."""
        try:
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            return

    def _idle_time(self) -> float:
        """Return the seconds that the thread may sleep."""
        if self._scheduler.can_run or self._admission.can_admit:
            return 0.0
        if self._drain_deadline is not None:
            return 0.02
        if self._admission.short or self.memory_error:
            return LOOK_INTERVAL
        soon = min(
            self._write_back.next_save - time.monotonic(),
            self._agents.next_expiry() - time.time(),
        )
        return min(60.0, max(0.0, soon))

    def _watch_memory(self) -> None:
        """Save what rests, keep the process below `--memory-limit`, let go of what has expired."""
        now = time.monotonic()
        if now >= self._write_back.next_save:
            self._write_back.save_idle()
        if now >= self._watch_due:
            self._watch_due = now + _WATCH_INTERVAL
            self.memory_error = self._budget.relieve_process()
            self._agents.delete_expired()

    def _end_cancelled(self) -> None:
        """Take out the sequences whose clients have gone away."""
        for seq in [*self._scheduler.active, *self._scheduler.waiting]:
            # a restore ends by itself, soon
            if not seq.wanted and seq.status is not Status.RESTORING:
                self._admission.leave(seq)

    def _refuse_overdue(self) -> None:
        """Answer those whose turn did not come in time."""
        for seq in self._scheduler.overdue():
            self._admission.leave(seq)
            seq.fail(Busy("the queue was too long: this request's turn did not come in time"))

    # -- stop

    def _drained(self) -> bool:
        """Tell whether nothing runs; cut what still does after the grace time."""
        assert self._drain_deadline is not None
        scheduler = self._scheduler
        if time.monotonic() < self._drain_deadline:
            return not scheduler.active and not scheduler.waiting
        for seq in (*scheduler.active, *scheduler.waiting):
            if seq.status is not Status.RESTORING:
                self._admission.leave(seq)
                seq.fail(
                    ShuttingDown(
                        "the server is shutting down: the answer was cut after the grace time"
                    )
                )
        return not scheduler.active and not scheduler.waiting

    def _shut_down(self) -> None:
        """Save until all is on disk, or nothing more gets there."""
        before = -1
        for agent in self._prefix_cache.agents.values():
            self._write_back.note(agent, now=True)
        while self._write_back.save_idle(now=True):
            self._store.flush().result()
            self._run_posted()
            written = self._store.stats()["writes"]
            if written == before:
                log.error(
                    "not everything could be saved: %s",
                    self._store.background_error or "see above",
                )
                break
            before = written
        self._close()
        mx.clear_cache()

    def _close(self) -> None:
        """Close the store, and tell everyone who still waits."""
        self._store.close()
        self._run_posted()  # what was still being read for someone
        self._tasks.end(ShuttingDown("the server is shutting down"))
        self._trace.close()
