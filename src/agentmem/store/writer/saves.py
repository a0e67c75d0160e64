"""Jobs that give branches what they hold: blocks, tails, another head, another branch's files."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ...tensors import HostTensor, is_state
from ..records import BlockRecord, BlockToSave, BranchHead, FileRef, TailRecord, TailToSave
from .batch import Batch, Job, require_unicode

_FILE_HEADER = 4096  # bytes, at most, beside its tensors
_TENSOR_HEADER = 512  # and for each of those, in a part of its own, sealed


@dataclass(eq=False)
class BranchJob(Job):
    """Give a branch another head."""

    branch: BranchHead

    def __post_init__(self) -> None:
        branch_id = self.branch.branch_id  # which becomes a file name
        assert re.fullmatch("[0-9a-f]{32}", branch_id), branch_id
        require_unicode(self.branch.agent)

    @property
    def builds_on(self) -> set[bytes | None]:
        """Blocks that must stay in the store until the job is done; None stands for no block."""
        return {self.branch.head}

    def record(self, batch: Batch) -> Any:
        self.put_branch(batch)

    def require(self, batch: Batch, block: bytes | None) -> None:
        """Before a file is written that builds on `block`: NotFound unless it is stored, or about
        to be.
        """
        if block not in batch.new_blocks:
            batch.manifest.require_block(block)

    def put_branch(self, batch: Batch) -> int:
        """Change the branch's row; return the row id of its agent."""
        batch.manifest.require_block(self.branch.head)
        agent_id = batch.manifest.put_branch(self.branch)
        if batch.keys:
            batch.keys.cover(agent_id, self.branch.head, batch.new_keys)
        batch.branches.add(self.branch.branch_id)
        return agent_id


@dataclass(eq=False)
class SaveBlock(BranchJob):
    """Write a block's file, unless its key is stored, and make it its branch's head."""

    block: BlockToSave

    @property
    def nbytes(self) -> int:
        return _tensor_bytes(self.block.tensors)

    @property
    def builds_on(self) -> set[bytes | None]:
        return {self.block.key, self.block.parent}

    def file_bytes(self, batch: Batch) -> int:
        return 0 if self._is_stored(batch) else _most_file_bytes(self.block.tensors)

    def _is_stored(self, batch: Batch) -> bool:
        """Return whether the key has a block: the first computation of a key stays."""
        key = self.block.key
        return key in batch.new_blocks or batch.manifest.block_file(key) is not None

    def stage(self, batch: Batch) -> None:
        if self._is_stored(batch):
            return
        block, key = self.block, self.block.key
        self.require(batch, block.parent)
        batch.blocks.add(key)
        path = batch.layout.block(key)
        file = batch.write(path, block.tensors, block.metadata, b"block:" + key)
        if file.key:
            batch.new_keys[key] = file.key
        batch.new_blocks[key] = BlockRecord(
            key=key,
            parent=block.parent,
            tokens=block.tokens,
            nbytes=file.nbytes,
            checksum=file.checksum,
            created=block.last_used,
            parts=file.parts,
        )

    def record(self, batch: Batch) -> FileRef:
        key = self.block.key
        file = batch.manifest.block_file(key)
        if file is None:
            block = batch.new_blocks[key]
            batch.manifest.require_block(block.parent)
            batch.manifest.add_block(block, batch.new_keys.get(key))
            file = FileRef(block.nbytes, block.checksum)
        self.put_branch(batch)
        return replace(file, parts=batch.manifest.block_parts(key))


@dataclass(eq=False)
class SaveTail(BranchJob):
    """Write a tail's file under a new generation, and make it its branch's."""

    tail: TailToSave
    generation: int = field(init=False)
    file: FileRef = field(init=False)

    @property
    def nbytes(self) -> int:
        return _tensor_bytes(self.tail.tensors)

    def file_bytes(self, batch: Batch) -> int:
        return _most_file_bytes(self.tail.tensors)

    def stage(self, batch: Batch) -> None:
        tail, branch_id = self.tail, self.tail.branch_id
        self.require(batch, tail.head)
        self.generation = next(batch.generations)
        batch.branches.add(branch_id)
        batch.tail_files.add((branch_id, self.generation))
        path = batch.layout.tail(branch_id, self.generation)
        file = batch.write(path, tail.tensors, tail.metadata, b"tail")
        snapshots = {part: n for part, n in file.parts.items() if is_state(part)}
        self.file = replace(file, parts=snapshots)

    def record(self, batch: Batch) -> FileRef:
        agent_id, key = self.put_branch(batch), self.file.key
        wrapped = batch.keys.wrap(key, agent_id) if batch.keys and key else None
        tail = TailRecord(self.tail.tokens, self.file.nbytes, self.file.checksum, self.file.parts)
        batch.manifest.set_tail(self.tail.branch_id, tail, self.generation, key, wrapped)
        return self.file


def _tensor_bytes(tensors: Mapping[str, HostTensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _most_file_bytes(tensors: Mapping[str, HostTensor]) -> int:
    return _tensor_bytes(tensors) + _FILE_HEADER + _TENSOR_HEADER * len(tensors)


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
        if tail is None or batch.manifest.heads().get(self.source) != self.branch.head:
            return
        self.generation = next(batch.generations)
        path = batch.layout.tail(self.branch.branch_id, self.generation)
        batch.tail_files.add((self.branch.branch_id, self.generation))
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
        batch.manifest.copy_tail(self.source, self.branch.branch_id, self.generation, wrapped)
        tail = batch.manifest.tail_file(self.branch.branch_id)
        return tail.nbytes if tail else 0
