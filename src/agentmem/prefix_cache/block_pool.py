"""BlockPool: the blocks and tails that are in RAM, and which of them leaves first."""

import time
from collections.abc import Container, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..kvcache.block import Arrays, SealedBlock, Tail
from ..store.records import FileRef
from .lineage import FRESH

# what it takes to bring an entry back, a file and its bytes: 26.8 MB in 16 files were measured to
# take 4 to 12 ms
_READ_MS = 0.2
_READ_MS_PER_BYTE = 2e-7


@dataclass(eq=False, kw_only=True)
class _Stored:
    """Arrays that are in RAM, on disk, or in both, or some of their parts here and some there.

    Parts are as tensors.TensorName has them.
    """

    data: Any = None  # in RAM
    disk_bytes: int = 0  # of the file; 0: not persisted (yet)
    disk_parts: Mapping[str, int] = field(default_factory=dict)  # in the file, bytes of each
    saving: "Future[Any] | None" = None
    # may leave RAM unsaved: its agents are never written, or the store kept newer ones
    discardable: bool = False
    last_used: float = 0.0  # Unix seconds

    @property
    def there(self) -> frozenset[str]:
        """Return the parts that are in RAM or on disk."""
        in_ram: frozenset[str] = frozenset() if self.data is None else self.data.parts
        return in_ram.union(self.disk_parts) if self.disk_parts else in_ram

    def saved(self, ref: FileRef) -> None:
        """Note that it is on disk as `ref` says."""
        self.disk_bytes = ref.nbytes
        self.disk_parts = ref.parts

    def not_on_disk(self) -> None:
        """Note that it is not on disk, or no longer."""
        self.disk_bytes = 0
        self.disk_parts = {}


@dataclass(eq=False)
class CachedBlock(_Stored):
    """One sealed block: where it lies in the tree, and as many parts of it as are in RAM."""

    key: bytes
    parent: bytes
    tokens: np.ndarray  # uint32 [block_size]
    refs: int = 0  # branches and running sequences that hold it
    data: SealedBlock | None = field(default=None, kw_only=True)


@dataclass(eq=False)
class CachedTail(_Stored):
    """A branch's tail: its tokens, and the arrays if they are in RAM.

    It is replaced as a whole, never grown. Its parts are its snapshots of recurrent state; of the
    layers' stacks it has all, and it is read as a whole.
    """

    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint32))
    lineage: bytes = FRESH
    data: Tail | None = field(default=None, kw_only=True)


Entry = CachedBlock | CachedTail


def _value(entry: Entry, now: float) -> tuple[bool, float]:
    """Return what entries are sorted by: the lowest leaves RAM first.

    What is on disk comes first; then counts the least ms to bring a byte back, over the time it was
    not used.
    """
    assert entry.data is not None
    nbytes = max(entry.data.nbytes, 1)
    cost = _READ_MS + nbytes * _READ_MS_PER_BYTE
    return not (entry.disk_bytes or entry.discardable), cost / nbytes / max(
        now - entry.last_used, 1e-3
    )


class BlockPool:
    """The entries that hold arrays in RAM, and their bytes. Engine thread only."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.evicted_bytes = 0  # since the start
        self._entries: dict[int, Entry] = {}

    def put(self, entry: Entry, data: Any) -> None:
        """Give an entry its arrays: a SealedBlock for a CachedBlock, a Tail for a CachedTail."""
        assert id(entry) not in self._entries
        entry.data = data
        self._entries[id(entry)] = entry
        self.nbytes += data.nbytes

    def add(self, block: CachedBlock, arrays: Arrays) -> None:
        """Add parts to a block of which some may be here."""
        if block.data is None:
            self.put(block, SealedBlock(arrays))
        else:
            self._replace(block, block.data.with_arrays(arrays))

    def keep(self, block: CachedBlock, parts: Container[str]) -> None:
        """Let go of the block's other parts."""
        if block.data is not None and not all(part in parts for part in block.data.parts):
            self._replace(block, block.data.only(parts))

    def _replace(self, block: CachedBlock, data: SealedBlock) -> None:
        assert block.data is not None
        self.nbytes += data.nbytes - block.data.nbytes
        block.data = data

    def drop(self, entry: Entry) -> None:
        """Let go of the entry's arrays, if it has any."""
        if self._entries.pop(id(entry), None) is not None:
            assert entry.data is not None
            self.nbytes -= entry.data.nbytes
            entry.data = None

    def evict(
        self, nbytes: int, kept: Container[int], *, lossy: bool = False, partly: bool = False
    ) -> list[Entry] | None:
        """Drop entries of at least `nbytes` in all, none whose id is in `kept`.

        Returns those that were not on disk; None, and nothing done, if there are not enough.
        `partly`: as many as there are. `lossy`: also what is not on disk, last; what is discardable
        never will be, and goes like what is.
        """
        now = time.time()
        # among equals the later ones of a path go first: more branches share the earlier ones
        idle = [
            e
            for e in reversed(self._entries.values())
            if id(e) not in kept and (lossy or e.disk_bytes or e.discardable)
        ]
        if not partly and sum(e.data.nbytes for e in idle if e.data is not None) < nbytes:
            return None
        lost = []
        idle.sort(key=lambda e: _value(e, now))
        for entry in idle:
            if nbytes <= 0:
                break
            assert entry.data is not None
            nbytes -= entry.data.nbytes
            self.evicted_bytes += entry.data.nbytes
            self.drop(entry)
            if not entry.disk_bytes:
                lost.append(entry)
        return lost
