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
from . import segment
from .layout import Layout
from .manifest import Manifest
from .records import BlockRecord, TailRecord


@dataclass
class Batch:
    """Jobs that share one transaction, and what they touch."""

    layout: Layout
    manifest: Manifest
    generations: Iterator[int]
    new_blocks: dict[bytes, BlockRecord] = field(default_factory=dict)  # files that no row names yet
    blocks: set[bytes] = field(default_factory=set)  # whose row or file may have changed
    branches: set[str] = field(default_factory=set)  # whose tail may have changed
    tail_files: set[tuple[str, int]] = field(default_factory=set)  # written: branch, generation
    dirs: set[Path] = field(default_factory=set)
    writes: int = 0
    bytes_written: int = 0
    quarantined: int = 0

    def write(self, path: Path, tensors: Mapping[str, HostTensor], metadata: Mapping[str, str]) -> tuple[int, bytes]:
        """Size and checksum of the file, which is durable once its directory (in `dirs`) is synced."""
        data = segment.encode(tensors, metadata)
        segment.make_private_dir(path.parent)
        self.dirs.add(path.parent)
        segment.write_file(path, data)
        self.writes += 1
        self.bytes_written += len(data)
        return len(data), segment.checksum(data)

    def delete_unreachable(self) -> None:
        self.blocks.update(self.manifest.delete_unreachable())

    def move_to_quarantine(self, path: Path) -> None:
        self.quarantined += 1
        try:
            path.replace(self.layout.quarantine / path.name)
        except FileNotFoundError:  # lost, not corrupt: there is nothing to keep
            return


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

    def stage(self, batch: Batch) -> None:
        """Write files. Raises OSError, which fails this job only."""

    def record(self, batch: Batch) -> Any:
        """Change rows; the result is the future's. Raises NotFound, before any change, which fails this job only."""

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
        try:
            (self.namespace + self.agent).encode()
        except UnicodeEncodeError:
            raise InvalidRequest(f"agent id {self.agent!r} isn't valid Unicode", param="agent_id") from None

    def record(self, batch: Batch) -> Any:
        batch.manifest.require_block(self.head)
        batch.manifest.put_branch(self.branch_id, self.namespace, self.agent, self.head, self.last_used)
        batch.branches.add(self.branch_id)


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

    def stage(self, batch: Batch) -> None:
        if self.key in batch.new_blocks or batch.manifest.block_file(self.key):
            return  # the first computation of a key stays
        batch.blocks.add(self.key)
        nbytes, checksum = batch.write(batch.layout.block(self.key), self.tensors, self.metadata)
        batch.new_blocks[self.key] = BlockRecord(self.key, self.parent, self.tokens, nbytes, checksum, self.last_used)

    def record(self, batch: Batch) -> BlockRecord:
        block = batch.manifest.block(self.key)
        if block is None:
            block = batch.new_blocks[self.key]
            batch.manifest.require_block(block.parent)
            batch.manifest.add_block(block)
        super().record(batch)
        return block


@dataclass(eq=False)
class SaveTail(SaveJob):
    generation: int = field(init=False)
    tail: TailRecord = field(init=False)

    def stage(self, batch: Batch) -> None:
        self.generation = next(batch.generations)
        batch.branches.add(self.branch_id)
        batch.tail_files.add((self.branch_id, self.generation))
        path = batch.layout.tail(self.branch_id, self.generation)
        self.tail = TailRecord(self.tokens, *batch.write(path, self.tensors, self.metadata))

    def record(self, batch: Batch) -> TailRecord:
        super().record(batch)
        batch.manifest.set_tail(self.branch_id, self.tail, self.generation)
        return self.tail


@dataclass(eq=False)
class Touch(Job):
    namespace: str
    agent: str
    last_used: float

    def record(self, batch: Batch) -> None:
        batch.manifest.touch(self.namespace, self.agent, self.last_used)


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

    def record(self, batch: Batch) -> bool:
        branches = batch.manifest.delete_agent(self.namespace, self.agent)
        batch.branches.update(branches or ())
        batch.delete_unreachable()
        return branches is not None

    def committed(self, batch: Batch) -> None:
        batch.manifest.truncate_wal()
        for path in batch.layout.quarantine.iterdir():  # whose they were is not known any more
            segment.remove_file(path)
        batch.dirs.add(batch.layout.quarantine)


@dataclass(eq=False)
class QuarantineBlock(Job):
    alone = True
    key: bytes

    def record(self, batch: Batch) -> None:
        block = batch.manifest.block(self.key)
        if block is None:
            return
        branches = batch.manifest.branches_through(self.key)
        for branch_id in branches:
            batch.manifest.cut_branch(branch_id, block.parent)
        batch.branches.update(branches)
        batch.blocks.add(self.key)
        batch.delete_unreachable()

    def committed(self, batch: Batch) -> None:
        if self.key in batch.blocks:
            batch.move_to_quarantine(batch.layout.block(self.key))


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
