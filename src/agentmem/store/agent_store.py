"""The store of one model: agents, their branches, and the blocks and tails that those are made of, on disk.

Every method may be called from any thread and returns at once. Writes are done in the order asked for, by one writer
thread (writer.py), and a future resolves when its write is durable; reads run on a pool (reader.py).

A failed write sets `background_error`, until a later one succeeds. Errors of futures:
  StoreWriteSkipped  too many bytes wait for the disk: not written, and no error of the store
  NotFound           the parent or head isn't in the store: its own save failed, or it was deleted
  OSError, sqlite3.Error  the disk's or database's; what the future stands for is not durable
  CorruptSegment     a read of what isn't recorded, or doesn't verify: a miss, to be quarantined and prefilled again
  ShuttingDown, EngineFailed  the store is closed; its writer met a bug
"""

import fcntl
import os
import re
import sqlite3
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ShuttingDown, StoreError
from ..tensors import HostTensor
from . import jobs
from .layout import Layout
from .manifest import Manifest
from .reader import Catalog, Reader, Segment
from .reconcile import reconcile
from .records import BlockRecord, StoreIndex, TailRecord
from .segment import make_private_dir
from .writer import Writer

MAX_BACKLOG_BYTES = 256 << 20


class AgentStore:
    @classmethod
    def open(
        cls, root: Path, fingerprint: str, meta: dict[str, str], max_backlog: int = MAX_BACKLOG_BYTES
    ) -> "AgentStore":
        """Open root/fingerprint, created if need be. Blocks made with another `meta` are dropped, all of them.

        Raises StoreError: in use by another process, of a newer format, or unreadable.
        """
        assert re.fullmatch(r"[0-9A-Za-z][0-9A-Za-z._-]*", fingerprint), fingerprint
        layout = Layout(Path(root) / fingerprint)
        with ExitStack() as undo:
            try:
                make_private_dir(layout.root)
                lock = _lock(layout)
                undo.callback(os.close, lock)
                manifest = Manifest.open(layout.manifest)
                undo.callback(manifest.close)
                for directory in (layout.blocks, layout.tails, layout.quarantine):
                    make_private_dir(directory)
                if manifest.meta() != meta:
                    with manifest.transaction():
                        manifest.reset(meta)
                reconcile(layout, manifest)
                store = cls(layout, manifest, lock, max_backlog)
            except (OSError, sqlite3.Error) as e:
                raise StoreError(f"can't open the store at {layout.root}: {e}; to start empty, move it away") from e
            undo.pop_all()
        return store

    def __init__(self, layout: Layout, manifest: Manifest, lock: int, max_backlog: int):
        """Use `open`."""
        self._manifest = manifest
        self._lock = lock
        self._closed = False
        self._index = manifest.index()
        self._catalog = Catalog(manifest.block_files(), manifest.tail_files())
        self._writer = Writer(layout, manifest, self._catalog, max_backlog)
        self._reader = Reader(layout, self._catalog)

    def index(self) -> StoreIndex:
        """What the store held when it was opened."""
        return self._index

    # Writes

    def save_block(
        self,
        branch_id: str,
        namespace: str,
        agent: str,
        key: bytes,
        parent: bytes | None,
        tokens: np.ndarray,
        tensors: Mapping[str, HostTensor],
        metadata: Mapping[str, str],
    ) -> Future[BlockRecord]:
        """Store the block and make it the branch's head; a tail goes, as the block holds its tokens.

        If the key is stored already, that block stays, and is the result.
        """
        now = time.time()
        return self._writer.submit(
            jobs.SaveBlock(branch_id, namespace, agent, key, now, tokens, tensors, metadata, key, parent)
        )

    def save_tail(
        self,
        branch_id: str,
        namespace: str,
        agent: str,
        head: bytes | None,
        tokens: np.ndarray,
        tensors: Mapping[str, HostTensor],
        metadata: Mapping[str, str],
    ) -> Future[TailRecord]:
        """Make `head` the branch's head, and these its tokens after it."""
        now = time.time()
        return self._writer.submit(jobs.SaveTail(branch_id, namespace, agent, head, now, tokens, tensors, metadata))

    def save_branch(
        self, branch_id: str, namespace: str, agent: str, head: bytes | None, last_used: float
    ) -> Future[None]:
        """Make `head`, a stored block, the branch's head, as after a fork or cut; another head's tail goes.

        Blocks that no branch reaches any more stay until the next deletion, quarantine or open.
        """
        return self._writer.submit(jobs.BranchJob(branch_id, namespace, agent, head, last_used))

    def touch(self, namespace: str, agent: str, last_used: float) -> Future[None]:
        """Note the agent's last use, if it is stored."""
        return self._writer.submit(jobs.Touch(namespace, agent, last_used))

    def delete_branch(self, branch_id: str) -> Future[None]:
        """Resolves when its bytes are gone, but for blocks that another branch reaches."""
        return self._writer.submit(jobs.DeleteBranch(branch_id))

    def delete_agent(self, namespace: str, agent: str) -> Future[bool]:
        """As delete_branch, of all its branches, and its token ids too. False: there was none."""
        return self._writer.submit(jobs.DeleteAgent(namespace, agent))

    def quarantine_block(self, key: bytes) -> Future[None]:
        """Put the file aside; every branch through it ends before it, without a tail."""
        return self._writer.submit(jobs.QuarantineBlock(key))

    def quarantine_tail(self, branch_id: str) -> Future[None]:
        return self._writer.submit(jobs.QuarantineTail(branch_id))

    def flush(self) -> Future[None]:
        """Resolves when every write asked for before has ended, well or not."""
        return self._writer.submit(jobs.Flush())

    # Reads

    def read_block(self, key: bytes) -> Future[dict[str, HostTensor]]:
        return _closed() if self._closed else self._reader.read_block(key)

    def read_tail(self, branch_id: str) -> Future[Segment]:
        """Tensors and metadata."""
        return _closed() if self._closed else self._reader.read_tail(branch_id)

    @property
    def backlog_bytes(self) -> int:
        """Bytes of tensors that wait for the writer."""
        return self._writer.backlog_bytes

    @property
    def background_error(self) -> str | None:
        return self._writer.background_error

    def stats(self) -> dict[str, int]:
        """What is stored, and counts since the store was opened."""
        return {**self._catalog.stats(), **self._writer.stats()}

    def close(self) -> None:
        """Does what is queued (this blocks), then lets go of the directory. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._reader.close()
        self._writer.close()
        self._manifest.close()
        os.close(self._lock)


def _lock(layout: Layout) -> int:
    """The open lock file; closing it, or the process's end, lets go."""
    fd = os.open(layout.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        os.fchmod(fd, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
    except BlockingIOError:
        pid = os.pread(fd, 20, 0).decode() or "unknown"
        os.close(fd)
        raise StoreError(
            f"the store at {layout.root} is in use by process {pid}; stop it, or use another --home"
        ) from None
    except OSError:
        os.close(fd)
        raise
    return fd


def _closed() -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(ShuttingDown("the store is closed"))
    return future
