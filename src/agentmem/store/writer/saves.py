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
    def branch_head(self) -> BranchHead:
        return self.branch

    @property
    def builds_on(self) -> set[bytes]:
        return {self.branch.head} if self.branch.head else set()

    def record(self, batch: Batch) -> Any:
        self.put_branch(batch)

    def require(self, batch: Batch, block: bytes | None) -> None:
        """Raise NotFound unless `block` is stored, or about to be.

        It is asked before a file is written that builds on the block.
        """
        if block not in batch.new_blocks:
            batch.manifest.require_block(block)

    def put_branch(self, batch: Batch) -> None:
        """Change the branch's row. Raises NotFound, CorruptSegment."""
        batch.manifest.put_branch(self.branch, batch.new_keys)
        batch.branches.add(self.branch.branch_id)


@dataclass(eq=False)
class SaveBlock(BranchJob):
    """Write a block's file, unless its key is stored, and make it its branch's head."""

    block: BlockToSave

    @property
    def nbytes(self) -> int:
        return _tensor_bytes(self.block.tensors)

    @property
    def builds_on(self) -> set[bytes]:
        return {key for key in (self.block.key, self.block.parent) if key}

    def file_bytes(self, batch: Batch) -> int:
        return 0 if self._is_stored(batch) else _most_file_bytes(self.block.tensors)

    def _is_stored(self, batch: Batch) -> bool:
        """Return whether the key has a block: the first computation of a key stays."""
        key = self.block.key
        return key in batch.new_blocks or batch.manifest.has_block(key)

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
        if not batch.manifest.has_block(key):
            batch.manifest.add_block(batch.new_blocks[key], batch.new_keys.get(key))
        self.put_branch(batch)
        file = batch.manifest.block_file(key)
        assert file is not None
        return replace(file, key=None, parts=batch.manifest.block_parts(key))


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
        self.put_branch(batch)
        file = self.file
        tail = TailRecord(self.tail.tokens, file.nbytes, file.checksum, file.parts)
        batch.manifest.set_tail(self.tail.branch_id, tail, self.generation, file.key)
        return file


def _tensor_bytes(tensors: Mapping[str, HostTensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _most_file_bytes(tensors: Mapping[str, HostTensor]) -> int:
    return _tensor_bytes(tensors) + _FILE_HEADER + _TENSOR_HEADER * len(tensors)


@dataclass(eq=False)
class ForkBranch(BranchJob):
    """Make a branch that holds what another one does.

    It gets the head of `source`, and its tail under a second name of the file.
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
        """Return the bytes of the tail.

        They are 0 where the source has none on disk, or goes on from another block there.
        """
        self.put_branch(batch)
        if self.generation is None:
            return 0
        batch.manifest.copy_tail(self.source, self.branch.branch_id, self.generation)
        tail = batch.manifest.tail_file(self.branch.branch_id)
        return tail.nbytes if tail else 0
