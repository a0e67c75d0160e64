"""What the writer can be asked to do. A job writes its file, then changes rows in the batch's transaction."""

import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InvalidRequest
from ..tensors import HostTensor
from . import crypto, segment
from .keys import FileKeys
from .layout import Layout
from .manifest import Manifest
from .reconcile import empty_quarantine, trim_quarantine
from .records import AgentRecord, BlockRecord, FileRef, TailRecord
from .room import Room

_FILE_HEADER = 4096  # bytes, at most, beside its tensors


@dataclass
class Batch:
    """Jobs that share one transaction, and what they touch."""

    layout: Layout
    manifest: Manifest
    keys: FileKeys | None  # of encrypted files
    room: Room
    generations: Iterator[int]
    new_blocks: dict[bytes, BlockRecord] = field(default_factory=dict)  # files that no row names yet
    new_keys: dict[bytes, bytes] = field(default_factory=dict)  # of those, if they are encrypted
    blocks: set[bytes] = field(default_factory=set)  # whose row or file may have changed
    branches: set[str] = field(default_factory=set)  # whose tail may have changed
    tail_files: set[tuple[str, int]] = field(default_factory=set)  # written: branch, generation
    dirs: set[Path] = field(default_factory=set)
    writes: int = 0
    bytes_written: int = 0
    quarantined: int = 0

    def write(
        self, path: Path, tensors: Mapping[str, HostTensor], metadata: Mapping[str, str], context: bytes
    ) -> FileRef:
        """The file is durable once its directory (in `dirs`) is synced."""
        data: bytes | bytearray = segment.encode(tensors, metadata)
        key = crypto.new_key() if self.keys else None
        if key:
            data = crypto.seal(key, data, context)
        segment.make_private_dir(path.parent)
        self.dirs.add(path.parent)
        self.room.grew(segment.write_file(path, data))
        self.room.recount(path.parent)
        self.writes += 1
        self.bytes_written += len(data)
        return FileRef(len(data), segment.checksum(data), key=key)

    def delete_unreachable(self) -> None:
        self.blocks.update(self.manifest.delete_unreachable())

    def move_to_quarantine(self, path: Path) -> None:
        self.quarantined += 1
        self.dirs.add(self.layout.quarantine)
        aside = self.layout.quarantine / path.name
        self.room.shrank(segment.remove_file(aside) or 0)  # an earlier one of the same key
        try:
            path.replace(aside)
        except FileNotFoundError:  # lost, not corrupt: there is nothing to keep
            return


def _require_unicode(namespace: str, agent: str) -> None:
    """SQLite would refuse it, on the writer's thread."""
    try:
        (namespace + agent).encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"agent id {agent!r} isn't valid Unicode", param="agent_id") from None


@dataclass(eq=False)
class Job:
    # True: has a batch of its own, because a job after it must not rely on files that it deletes
    alone = False
    future: Future[Any] = field(default_factory=Future, init=False)
    result: Any = field(default=None, init=False)
    error: Exception | None = field(default=None, init=False)

    @property
    def nbytes(self) -> int:
        """Of the tensors held until it is done."""
        return 0

    def file_bytes(self, batch: Batch) -> int:
        """At most, of the file that it writes."""
        return self.nbytes + _FILE_HEADER if self.nbytes else 0

    def stage(self, batch: Batch) -> None:
        """Write files. Raises OSError or NotFound, which fail this job only."""

    def record(self, batch: Batch) -> Any:
        """Change rows; the result is the future's. Raises NotFound or CorruptSegment, which fails this job only."""

    def committed(self, batch: Batch) -> None:
        """Further work on files, of a job that is alone."""


@dataclass(eq=False)
class Flush(Job):
    """Nothing: done when everything before it is."""


@dataclass(eq=False)
class BranchJob(Job):
    branch_id: str
    namespace: str
    agent: str
    head: bytes | None
    last_used: float

    def __post_init__(self) -> None:
        assert re.fullmatch("[0-9a-f]{32}", self.branch_id), self.branch_id  # it becomes a file name
        _require_unicode(self.namespace, self.agent)

    def record(self, batch: Batch) -> Any:
        self.put_branch(batch)

    def require(self, batch: Batch, block: bytes | None) -> None:
        """Before a file is written that builds on `block`: NotFound unless it is stored, or about to be."""
        if block not in batch.new_blocks:
            batch.manifest.require_block(block)

    def put_branch(self, batch: Batch) -> int:
        """The agent's id."""
        batch.manifest.require_block(self.head)
        agent_id = batch.manifest.put_branch(self.branch_id, self.namespace, self.agent, self.head, self.last_used)
        if batch.keys:
            batch.keys.cover(agent_id, self.head, batch.new_keys)
        batch.branches.add(self.branch_id)
        return agent_id


@dataclass(eq=False)
class SaveJob(BranchJob):
    tokens: np.ndarray
    tensors: Mapping[str, HostTensor]
    metadata: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(eq=False)
class SaveBlock(SaveJob):
    key: bytes  # also the branch's new head
    parent: bytes | None

    def file_bytes(self, batch: Batch) -> int:
        return 0 if self._is_stored(batch) else super().file_bytes(batch)

    def _is_stored(self, batch: Batch) -> bool:
        """The first computation of a key stays."""
        return self.key in batch.new_blocks or batch.manifest.block_file(self.key) is not None

    def stage(self, batch: Batch) -> None:
        if self._is_stored(batch):
            return
        self.require(batch, self.parent)
        batch.blocks.add(self.key)
        file = batch.write(batch.layout.block(self.key), self.tensors, self.metadata, b"block:" + self.key)
        if file.key:
            batch.new_keys[self.key] = file.key
        batch.new_blocks[self.key] = BlockRecord(
            self.key, self.parent, self.tokens, file.nbytes, file.checksum, self.last_used
        )

    def record(self, batch: Batch) -> FileRef:
        file = batch.manifest.block_file(self.key)
        if file is None:
            block = batch.new_blocks[self.key]
            batch.manifest.require_block(block.parent)
            batch.manifest.add_block(block, batch.new_keys.get(self.key))
            file = FileRef(block.nbytes, block.checksum)
        self.put_branch(batch)
        return file


@dataclass(eq=False)
class SaveTail(SaveJob):
    generation: int = field(init=False)
    file: FileRef = field(init=False)

    def stage(self, batch: Batch) -> None:
        self.require(batch, self.head)
        self.generation = next(batch.generations)
        batch.branches.add(self.branch_id)
        batch.tail_files.add((self.branch_id, self.generation))
        path = batch.layout.tail(self.branch_id, self.generation)
        self.file = batch.write(path, self.tensors, self.metadata, b"tail")

    def record(self, batch: Batch) -> FileRef:
        agent_id, key = self.put_branch(batch), self.file.key
        wrapped = batch.keys.wrap(key, agent_id) if batch.keys and key else None
        tail = TailRecord(self.tokens, self.file.nbytes, self.file.checksum)
        batch.manifest.set_tail(self.branch_id, tail, self.generation, key, wrapped)
        return self.file


@dataclass(eq=False)
class ForkBranch(BranchJob):
    """A branch that holds what another one does: its head, and its tail under a second name of the file."""

    alone = True  # what was saved of the source before must be recorded
    source: str
    generation: int | None = field(default=None, init=False)

    def stage(self, batch: Batch) -> None:
        tail = batch.manifest.tail_file(self.source)
        if tail is None or batch.manifest.heads().get(self.source) != self.head:
            return
        self.generation = next(batch.generations)
        path = batch.layout.tail(self.branch_id, self.generation)
        batch.tail_files.add((self.branch_id, self.generation))
        batch.dirs.add(path.parent)
        try:
            path.hardlink_to(batch.layout.tail(self.source, tail.generation))
        except FileNotFoundError:  # lost: the branch is forked without it
            self.generation = None

    def record(self, batch: Batch) -> int:
        """Bytes of the tail; 0: the source has none on disk, or goes on from another block there."""
        agent_id = self.put_branch(batch)
        if self.generation is None:
            return 0
        wrapped = None
        if batch.keys and (file_key := batch.keys.tail_key(self.source)):
            wrapped = batch.keys.wrap(file_key, agent_id)
        batch.manifest.copy_tail(self.source, self.branch_id, self.generation, wrapped)
        tail = batch.manifest.tail_file(self.branch_id)
        return tail.nbytes if tail else 0


@dataclass(eq=False)
class Touch(Job):
    """Note what was used, and what was changed of an agent. An agent that holds nothing yet is entered."""

    agent: AgentRecord
    branch_id: str | None = None

    def __post_init__(self) -> None:
        _require_unicode(self.agent.namespace, self.agent.name)

    def record(self, batch: Batch) -> None:
        batch.manifest.put_agent(self.agent)
        if self.branch_id is not None:
            batch.manifest.touch_branch(self.branch_id, self.agent.last_used)


@dataclass(eq=False)
class MoveAgent(Job):
    """Put an agent under another name, all of it at once."""

    alone = True
    source: tuple[str, str]  # namespace, name
    target: tuple[str, str]

    def __post_init__(self) -> None:
        _require_unicode(*self.source)
        _require_unicode(*self.target)

    def record(self, batch: Batch) -> None:
        batch.manifest.move_agent(self.source, self.target, batch.keys)


@dataclass(eq=False)
class DeleteBranch(Job):
    alone = True
    branch_id: str

    def record(self, batch: Batch) -> None:
        batch.manifest.delete_branch(self.branch_id)
        batch.branches.add(self.branch_id)
        batch.delete_unreachable()


@dataclass(eq=False)
class DeleteAgent(Job):
    alone = True
    namespace: str
    agent: str

    def __post_init__(self) -> None:
        _require_unicode(self.namespace, self.agent)

    def record(self, batch: Batch) -> bool:
        branches = batch.manifest.delete_agent(self.namespace, self.agent)
        batch.branches.update(branches or ())
        batch.delete_unreachable()
        return branches is not None

    def committed(self, batch: Batch) -> None:
        batch.manifest.truncate_wal()
        batch.room.shrank(empty_quarantine(batch.layout))  # whose they were is not known any more
        batch.dirs.add(batch.layout.quarantine)


@dataclass(eq=False)
class CollectGarbage(Job):
    alone = True

    def record(self, batch: Batch) -> None:
        batch.delete_unreachable()

    def committed(self, batch: Batch) -> None:
        batch.room.shrank(empty_quarantine(batch.layout))
        batch.manifest.truncate_wal()
        batch.room.count_manifest()


@dataclass(eq=False)
class QuarantineBlock(Job):
    alone = True
    key: bytes

    def record(self, batch: Batch) -> None:
        if batch.manifest.block_file(self.key) is None:
            return
        parent = batch.manifest.parent(self.key)
        branches = batch.manifest.branches_through(self.key)
        for branch_id in branches:
            batch.manifest.cut_branch(branch_id, parent)
        batch.branches.update(branches)
        batch.blocks.add(self.key)
        batch.delete_unreachable()

    def committed(self, batch: Batch) -> None:
        if self.key in batch.blocks:
            batch.move_to_quarantine(batch.layout.block(self.key))
            batch.room.shrank(trim_quarantine(batch.layout))


@dataclass(eq=False)
class QuarantineTail(Job):
    alone = True
    branch_id: str
    path: Path | None = field(default=None, init=False)

    def record(self, batch: Batch) -> None:
        if tail := batch.manifest.tail_file(self.branch_id):
            self.path = batch.layout.tail(self.branch_id, tail.generation)
        batch.manifest.clear_tail(self.branch_id)
        batch.branches.add(self.branch_id)

    def committed(self, batch: Batch) -> None:
        if self.path:
            batch.move_to_quarantine(self.path)
            batch.room.shrank(trim_quarantine(batch.layout))
