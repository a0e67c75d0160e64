"""The store of one model: agents, their branches, and the blocks and tails of those, on disk.

Every method may be called from any thread and returns at once. Writes are done in the order asked
for, by one writer thread (writer.py), and a future resolves when its write is durable; reads run on
a pool (reader.py).

A failed write sets `background_error`, until a later one succeeds. Errors of futures:
  LeastRecentlyUsed  the store is full of what was used more recently: not written, and the store
                     is well
  StoreFull          the store is full of what may not leave, or the disk is
  StoreWriteSkipped  too many bytes wait for the disk: not written, and the store is well
  NotFound           the parent or head isn't in the store: its own save failed, or it was deleted
  OSError, sqlite3.Error  the disk's or database's; what the future stands for is not durable
  CorruptSegment     a read of what isn't recorded, or doesn't verify: a miss, to be quarantined and
                     prefilled again
  ShuttingDown, EngineFailed  the store is closed; its writer met a bug
"""

import uuid
from collections.abc import Callable, Collection
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from ..agent_key import AgentKey
from ..errors import ShuttingDown
from ..locks import release
from ..tensors import HostTensor
from .files.crypto import Vault
from .files.reader import READERS, Catalog, Reader, read_segment
from .files.segment import Segment
from .records import AgentRecord, BlockToSave, BranchHead, FileRef, Linked, StoreIndex, TailToSave
from .upkeep.locks import announce
from .upkeep.open import StoreFiles, opened
from .upkeep.quota import Limits
from .upkeep.trim import Trimmed
from .writer import jobs, links, saves
from .writer.batch import Flush
from .writer.turns import TurnTable
from .writer.writer import Writer

MAX_BACKLOG_BYTES = 256 << 20


class AgentStore:
    @classmethod
    def open(
        cls,
        root: Path,
        fingerprint: str,
        meta: dict[str, str],
        *,
        max_backlog: int = MAX_BACKLOG_BYTES,
        limits: Limits | None = None,
        unlock: Callable[[bool], Vault] | None = None,
        readers: int = READERS,
    ) -> "AgentStore":
        """Open root/fingerprint, created if need be.

        All blocks that were made with another `meta` are dropped. `max_backlog`: bytes that may
        wait for the disk; `unlock`: encrypt; it gives the master key's vault, and is told whether a
        new master key may be made; `readers`: threads. Raises StoreError: in use by another
        process, of a newer format, encrypted otherwise, or unreadable.
        """
        with opened(root, fingerprint, meta, limits=limits or Limits(), unlock=unlock) as files:
            return cls(files, max_backlog, readers)

    def __init__(self, files: StoreFiles, max_backlog: int, readers: int):
        """Take over the files that were opened. `open` is how to get a store."""
        self._layout = files.layout
        self._manifest = files.manifest
        self._lock = files.lock
        self._quota = files.quota
        # goes into blocks' keys: their names on disk confirm no guess
        self.address_secret = files.address_secret
        self._closed = False
        self.on_trim: Callable[[Trimmed], None] = lambda _: None  # called on the writer's thread
        manifest = files.manifest
        contents = manifest.contents()
        self._index = contents.index
        self._catalog = Catalog(contents.block_files, contents.tail_files)
        self._damaged_rows = manifest.damaged_rows
        turn_bytes = manifest.turns.total_bytes()
        self._writer = Writer(
            files.layout,
            manifest,
            files.quota,
            self._catalog,
            max_backlog=max_backlog,
            trimmed=lambda gone: self.on_trim(gone),
        )
        self._reader = Reader(files.layout, self._catalog, readers)
        self.turns = TurnTable(self._writer.submit, turn_bytes)

    def index(self) -> StoreIndex:
        """Return what the store held when it was opened."""
        return self._index

    # Writes

    def save_block(self, block: BlockToSave) -> Future[FileRef]:
        """Store the block and make it its branch's head.

        A tail goes, as the block holds its tokens. If the key is stored already, that block stays,
        and is the result.
        """
        return self._writer.submit(saves.SaveBlock(block.branch, block))

    def save_tail(self, tail: TailToSave) -> Future[FileRef]:
        """Give the branch this head, and this tail after it."""
        return self._writer.submit(saves.SaveTail(tail.branch, tail))

    def save_branch(self, branch: BranchHead) -> Future[None]:
        """Give the branch this head, as after a fork or cut; another head's tail goes.

        Blocks that no branch reaches any more stay until the next deletion, quarantine or open.
        """
        return self._writer.submit(saves.BranchJob(branch))

    def fork_branch(self, source: str, branch: BranchHead) -> Future[int]:
        """Add a branch with the head of `source`, and its tail if that still follows this head.

        Writes no file: the tail's gets a second name. Gives the bytes of the tail, or 0.
        """
        return self._writer.submit(saves.ForkBranch(branch, source))

    def touch(self, agent: AgentRecord, branch_id: str | None = None) -> Future[None]:
        """Note an agent's and a branch's last use, and what else is known of the agent."""
        return self._writer.submit(jobs.Touch(agent, branch_id))

    def move_agent(self, source: AgentKey, target: AgentKey) -> Future[None]:
        """Give all branches of an agent to another one, at once."""
        return self._writer.submit(jobs.MoveAgent(source, target))

    def link_files(self, blocks: list[bytes], branches: list[str]) -> Future[Linked]:
        """Give files of blocks and tails second names, for `read_linked`; `unlink` ends it.

        Raises NotFound if one is gone.
        """
        return self._writer.submit(
            links.LinkFiles(self._layout.exports / uuid.uuid4().hex, blocks, branches)
        )

    def unlink(self, linked: Linked) -> Future[None]:
        """Remove the second names. What is left of them after a crash, the next open removes."""
        return self._writer.submit(links.Unlink({path.parent for path, _ in linked.values()}))

    def delete_branch(self, branch_id: str) -> Future[None]:
        """Delete a branch.

        The future resolves when its bytes are gone, but for blocks that another branch reaches.
        """
        return self._writer.submit(jobs.DeleteBranch(branch_id))

    def delete_agent(self, agent: AgentKey) -> Future[bool]:
        """Delete an agent with all its branches, as `delete_branch`, and its turns.

        Gives False where there was none.
        """
        return self._writer.submit(jobs.DeleteAgent(agent))

    def quarantine_block(self, key: bytes) -> Future[None]:
        """Put a block's file aside; every branch through it ends before it, without a tail."""
        return self._writer.submit(jobs.QuarantineBlock(key))

    def quarantine_tail(self, branch_id: str) -> Future[None]:
        """Put a tail's file aside; its branch ends with its head."""
        return self._writer.submit(jobs.QuarantineTail(branch_id))

    def collect_garbage(self) -> Future[None]:
        """Delete what no branch reaches and what is in quarantine."""
        return self._writer.submit(jobs.CollectGarbage())

    @property
    def capacity(self) -> int:
        """Return the most bytes that it may ever hold."""
        return self._quota.most

    def flush(self) -> Future[None]:
        """Resolve when every write asked for before has ended, well or not."""
        return self._writer.submit(Flush())

    # Reads

    def read_block(
        self, key: bytes, parts: Collection[str] | None = None
    ) -> Future[dict[str, HostTensor]]:
        """Read the tensors of these parts of a block (TensorName.part; None: of all).

        Parts that it has not are left out, and no other part is read.
        """
        return _closed() if self._closed else self._reader.read_block(key, parts)

    def read_tail(self, branch_id: str) -> Future[Segment]:
        """Read the tensors and the metadata of a branch's tail."""
        return _closed() if self._closed else self._reader.read_tail(branch_id)

    @staticmethod
    def read_linked(linked: Linked, name: bytes | str) -> Segment:
        """Read a block by its key, or a tail by its branch, on the caller's thread.

        Raises CorruptSegment.
        """
        path, ref = linked[name]
        return read_segment(path, ref, b"block:" + name if isinstance(name, bytes) else b"tail")

    @property
    def background_error(self) -> str | None:
        """Return what the last write failed with; None: it did not fail."""
        return self._writer.background_error

    def stats(self) -> dict[str, int]:
        """Return what is stored, and counts since the store was opened."""
        return {**self._catalog.stats(), **self._writer.stats(), "damaged_rows": self._damaged_rows}

    def announce(self, url: str) -> None:
        """Say in the lock file where the server that has the store open can be reached."""
        announce(self._lock, url)

    def close(self) -> None:
        """Do what is queued, which blocks, then let go of the directory. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._reader.close()
        self._writer.close()
        self._manifest.close()
        release(self._lock)


def _closed() -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(ShuttingDown("the store is closed"))
    return future
