"""The writer: one thread that makes files and rows durable, in the order asked for.

A batch is what waits when the thread gets to it: files are written and synced, then rows change in
one transaction (group commit), then files that no row names any more are removed. Killed at any
point, what is left over is a file without a row, which the next open removes.
"""

import itertools
import sqlite3
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from ...errors import (
    AgentMemError,
    CorruptSegment,
    EngineFailed,
    NotFound,
    ShuttingDown,
    StoreFailed,
)
from ..files import segment
from ..files.layout import Layout
from ..files.reader import Catalog
from ..manifest.manifest import Manifest
from ..records import written_in_last_hour
from ..upkeep.quota import LeastRecentlyUsed, Quota, StoreFull
from ..upkeep.trim import Trimmed, trim
from .batch import Batch, Flush, Job

MAX_BATCH_JOBS = 32  # bounds how long the first of a batch waits for the last


class StoreWriteSkipped(StoreFailed):
    """More bytes wait for the disk than may: this save isn't made.

    It costs a re-prefill, unless it's saved later.
    """


class Writer:
    """The thread that does jobs, and the queue of those that wait."""

    def __init__(
        self,
        layout: Layout,
        manifest: Manifest,
        quota: Quota,
        catalog: Catalog,
        *,
        max_backlog: int,
        trimmed: Callable[[Trimmed], None],
    ):
        """Start the thread, on which the manifest is used from now on.

        `max_backlog`: bytes that may wait for the disk; `trimmed` is told, on the writer's thread,
        what had to leave.
        """
        self._layout = layout
        self._manifest = manifest
        self._quota = quota
        self._catalog = catalog
        self._trimmed = trimmed
        self._max_backlog = max_backlog
        newest = max((tail.generation for tail in manifest.tail_files().values()), default=0)
        self._generations = itertools.count(newest + 1)
        self._changed = threading.Condition()  # guards what follows; never held during I/O
        self._queue: deque[Job] = deque()
        self._current: list[Job] = []
        self._backlog = 0
        self._closing = False
        self._dead = False
        self.background_error: str | None = None
        self._unwritten = 0  # bytes of the file that could not be written, if that is the error
        self._full = False  # because there was no room
        agents, branches = manifest.counts()
        self._stats = {"agents": agents, "branches": branches}
        self._stats |= dict.fromkeys(
            ("writes", "bytes_written", "quarantined", "skipped", "trimmed_bytes"), 0
        )
        self._stats |= {"disk_bytes": quota.used, "bytes_written_last_hour": 0}
        self._garbage: set[Path] = set()  # paths that no row names; only the thread uses it
        self._thread = threading.Thread(target=self._run, name="agentmem-writer", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Future[Any]:
        """Queue a job; never block.

        The future fails at once if the store is closed, its writer died, or the backlog is full.
        """
        future = job.future
        # whoever waits may go away; the job is done all the same
        future.set_running_or_notify_cancel()
        with self._changed:
            refusal = self._refusal(job)
            if refusal is None:
                self._queue.append(job)
                self._backlog += job.nbytes
                self._changed.notify()
        if refusal is not None:
            future.set_exception(refusal)
        return future

    def _refusal(self, job: Job) -> AgentMemError | None:
        if self._dead:
            return EngineFailed(f"the store's writer died: {self.background_error}")
        if self._closing:
            return ShuttingDown("the store is closed")
        if job.nbytes and self._backlog and self._backlog + job.nbytes > self._max_backlog:
            self._stats["skipped"] += 1
            return StoreWriteSkipped(
                f"{self._backlog} bytes already wait for the disk, {self._max_backlog} may"
            )
        return None

    def stats(self) -> dict[str, int]:
        """Return counts since the start, and what waits."""
        with self._changed:
            return {**self._stats, "backlog_bytes": self._backlog}

    def close(self) -> None:
        """Do what is queued, then end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._step():
                pass
        finally:
            # not OSError or sqlite3.Error, which _process handles: a bug. threading.excepthook
            # reports it
            if (bug := sys.exc_info()[1]) is not None:
                self._die(bug)

    def _die(self, bug: BaseException) -> None:
        with self._changed:
            self._dead = True
            self.background_error = f"{type(bug).__name__}: {bug}"
            jobs = [*self._current, *self._queue]
            self._queue.clear()
            self._backlog = 0
        for job in jobs:
            if not job.future.done():
                job.future.set_exception(
                    EngineFailed(f"the store's writer died: {self.background_error}")
                )

    def _step(self) -> bool:
        """Do one batch; return False when the store is closed and nothing waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            jobs = self._current = self._take()
        if not jobs:
            return False
        if work := [job for job in jobs if not isinstance(job, Flush)]:
            self._process(work)
        with self._changed:
            self._backlog -= sum(job.nbytes for job in jobs)
            self._current = []
        for job in jobs:
            if job.error is None:
                job.future.set_result(job.result)
            else:
                job.future.set_exception(job.error)
        return True

    def _take(self) -> list[Job]:
        jobs: list[Job] = []
        while (
            self._queue
            and len(jobs) < MAX_BATCH_JOBS
            and not (jobs and (jobs[0].alone or self._queue[0].alone))
        ):
            jobs.append(self._queue.popleft())
        return jobs

    def _process(self, jobs: list[Job]) -> None:
        """Set each job's result or error, and the latch."""
        batch = Batch(self._layout, self._manifest, self._quota, self._generations)
        failures: list[Exception] = []
        self._quota.count_manifest()
        for job in jobs:
            try:
                if nbytes := job.file_bytes(batch):
                    self._make_room(nbytes, jobs, job)
                job.stage(batch)
            except (OSError, sqlite3.Error, StoreFull, LeastRecentlyUsed, NotFound) as e:
                job.error = e
        try:
            self._commit(batch, [job for job in jobs if job.error is None])
        except (OSError, sqlite3.Error) as e:
            failures.append(e)
            for job in jobs:
                job.error = job.error or e
        try:
            self._settle(batch, sync=jobs[0].alone)
        except (OSError, sqlite3.Error) as e:
            failures.append(e)
            # its promise is that the bytes are gone; a save's rows are durable already
            if jobs[0].alone:
                jobs[0].error = jobs[0].error or e
        self._quota.recount(*batch.dirs)
        with self._changed:
            self._stats["disk_bytes"] = self._quota.used
        failures += [
            job.error for job in jobs if isinstance(job.error, (OSError, sqlite3.Error, StoreFull))
        ]
        if failures:
            self.background_error = f"{type(failures[0]).__name__}: {failures[0]}"
            self._unwritten = max((job.nbytes for job in jobs if job.error), default=0)
            self._full = any(isinstance(error, StoreFull) for error in failures)
        elif any(job.error is None for job in jobs) and self._can_write(batch):
            self.background_error = None

    def _can_write(self, batch: Batch) -> bool:
        """Return whether files can be written again, which rows alone don't show."""
        return bool(
            batch.writes
            or not self._unwritten
            or (self._full and not self._quota.short_by(self._unwritten))
        )

    def _make_room(self, nbytes: int, jobs: list[Job], job: Job) -> None:
        """Let go of what was not used for longest, if a file of `nbytes` would not fit.

        Raises LeastRecentlyUsed, StoreFull: it still doesn't.
        """
        self._count_manifest(nbytes)
        short = self._quota.short_by(nbytes)
        used_at = job.branch_head.last_used if job.branch_head else time.time()
        while short > 0:
            before = self._quota.used
            gone = self._let_go(short + self._quota.slack, jobs, used_at)
            if not gone.blocks and not gone.tails:
                if gone.newer:
                    raise LeastRecentlyUsed("the store is full of newer caches")
                raise self._quota.full()
            # less than asked for, where a file has a second name
            short -= before - self._quota.used

    def _count_manifest(self, nbytes: int = 0) -> None:
        """Empty the manifest's log where `nbytes` more would not fit.

        Every change of rows makes it longer, up to a megabyte: it goes before caches do.
        """
        self._quota.count_manifest()
        if self._quota.short_by(nbytes):
            self._manifest.truncate_wal()
            self._quota.count_manifest()

    def _let_go(self, nbytes: int, jobs: list[Job], used_before: float) -> Trimmed:
        branches = {job.branch_head.branch_id for job in jobs if job.branch_head}
        blocks = set[bytes]().union(*(job.builds_on for job in jobs))
        with self._manifest.transaction():
            gone = trim(
                self._manifest, nbytes, branches=branches, blocks=blocks, before=used_before
            )
        before = {branch_id: self._catalog.tail(branch_id) for branch_id in gone.tails}
        if gone.blocks or gone.tails:  # told before a read can miss them
            self._trimmed(gone)
        self._catalog.update(dict.fromkeys(gone.blocks), dict.fromkeys(gone.tails))
        self._garbage |= {self._layout.block(key) for key in gone.blocks}
        self._garbage |= {
            self._layout.tail(id, ref.generation) for id, ref in before.items() if ref
        }
        self._collect_garbage(set())
        self._quota.count_manifest()
        with self._changed:
            self._stats["trimmed_bytes"] += gone.nbytes
        return gone

    def _commit(self, batch: Batch, jobs: list[Job]) -> None:
        for path in batch.dirs:
            segment.sync_dir(path)
        with self._manifest.transaction():
            for job in jobs:
                try:
                    with self._manifest.all_or_nothing():
                        job.result = job.record(batch)
                except (NotFound, CorruptSegment) as e:
                    job.error = e
            hour = int(time.time() // 3600)
            if batch.bytes_written:
                self._manifest.count_writes(batch.bytes_written, hour)
        if jobs and jobs[0].alone:
            jobs[0].committed(batch)
        agents, branches = self._manifest.counts()
        with self._changed:
            self._stats["agents"], self._stats["branches"] = agents, branches
            for name in ("writes", "bytes_written", "quarantined"):
                self._stats[name] += getattr(batch, name)
            self._stats["bytes_written_last_hour"] = written_in_last_hour(
                self._manifest.writes(), time.time()
            )

    def _settle(self, batch: Batch, sync: bool) -> None:
        """Bring the catalog and the directories to what the manifest says now.

        That is done whether or not it committed.
        """
        blocks = {key: self._manifest.block_file(key) for key in batch.blocks}
        tails = {branch_id: self._manifest.tail_file(branch_id) for branch_id in batch.branches}
        written = {self._layout.tail(*name) for name in batch.tail_files}
        for branch_id in batch.branches:
            if old := self._catalog.tail(branch_id):
                written.add(self._layout.tail(branch_id, old.generation))
        named = {
            self._layout.tail(branch_id, ref.generation) for branch_id, ref in tails.items() if ref
        }
        named |= {self._layout.block(key) for key, ref in blocks.items() if ref}
        self._garbage |= written | {self._layout.block(key) for key in blocks}
        self._garbage -= named
        self._catalog.update(blocks, tails)
        self._collect_garbage(batch.dirs)
        for path in batch.dirs if sync else ():
            segment.sync_dir(path)
        self._count_manifest()

    def _collect_garbage(self, dirs: set[Path]) -> None:
        """Remove the files that no row names; `dirs` gets where."""
        for path in list(self._garbage):
            freed = segment.remove_file(path)
            if freed is not None:
                self._quota.shrank(freed)
                dirs.add(path.parent)
            self._garbage.remove(path)
