"""Jobs that give branches what they hold: blocks, tails, another head, another branch's files."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...tensors import HostTensor, is_state
from ..records import BlockRecord, FileRef, TailRecord
from .batch import Batch, Job, require_unicode

_FILE_HEADER = 4096  # bytes, at most, beside its tensors
_TENSOR_HEADER = 512  # and for each of those, in a part of its own, sealed


@dataclass(eq=False)
class BranchJob(Job):
    branch_id: str
    namespace: str
    agent: str
    head: bytes | None
    last_used: float

    def __post_init__(self) -> None:
        assert re.fullmatch("[0-9a-f]{32}", self.branch_id), (
            self.branch_id
        )  # it becomes a file name
        require_unicode(self.namespace, self.agent)

    def record(self, batch: Batch) -> Any:
        self.put_branch(batch)

    def require(self, batch: Batch, block: bytes | None) -> None:
        """Before a file is written that builds on `block`: NotFound unless it is stored, or about
        to be.
        """
        if block not in batch.new_blocks:
            batch.manifest.require_block(block)

    def put_branch(self, batch: Batch) -> int:
        """The agent's id."""
        batch.manifest.require_block(self.head)
        agent_id = batch.manifest.put_branch(
            self.branch_id, self.namespace, self.agent, self.head, self.last_used
        )
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

    def file_bytes(self, batch: Batch) -> int:
        return self.nbytes + _FILE_HEADER + _TENSOR_HEADER * len(self.tensors)


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
        file = batch.write(
            batch.layout.block(self.key), self.tensors, self.metadata, b"block:" + self.key
        )
        if file.key:
            batch.new_keys[self.key] = file.key
        batch.new_blocks[self.key] = BlockRecord(
            self.key,
            self.parent,
            self.tokens,
            file.nbytes,
            file.checksum,
            self.last_used,
            file.parts,
        )

    def record(self, batch: Batch) -> FileRef:
        file = batch.manifest.block_file(self.key)
        if file is None:
            block = batch.new_blocks[self.key]
            batch.manifest.require_block(block.parent)
            batch.manifest.add_block(block, batch.new_keys.get(self.key))
            file = FileRef(block.nbytes, block.checksum)
        self.put_branch(batch)
        return replace(file, parts=batch.manifest.block_parts(self.key))


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
        file = batch.write(path, self.tensors, self.metadata, b"tail")
        self.file = replace(
            file, parts={part: n for part, n in file.parts.items() if is_state(part)}
        )

    def record(self, batch: Batch) -> FileRef:
        agent_id, key = self.put_branch(batch), self.file.key
        wrapped = batch.keys.wrap(key, agent_id) if batch.keys and key else None
        tail = TailRecord(self.tokens, self.file.nbytes, self.file.checksum, self.file.parts)
        batch.manifest.set_tail(self.branch_id, tail, self.generation, key, wrapped)
        return self.file


@dataclass(eq=False)
class ForkBranch(BranchJob):
    """A branch that holds what another one does: its head, and its tail under a second name of the
    file.
    """

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
