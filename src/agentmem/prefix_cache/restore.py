"""Restorer: brings what a request matched from disk into RAM."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from ..errors import CorruptSegment
from ..kvcache.block import RawArrays, SealedBlock, Snapshot, Tail, copy_host, from_raw
from ..store.agent_store import AgentStore
from ..tensors import part_of
from .block_pool import CachedBlock, CachedTail, Entry
from .cache import PrefixCache
from .lineage import FRESH, ROOT, cut_again, cut_lineage, tail_identity
from .match import Match
from .resume import Missing, needs

Arrived = Callable[[int, float], None]  # bytes, when (time.perf_counter())
_NOTHING = SealedBlock({})


@dataclass(frozen=True)
class Restored:
    """What a read brought into RAM."""

    nbytes: int
    at: float  # time.perf_counter() when the last of it was there


@dataclass(eq=False)
class _Read:
    """A read that is on its way."""

    match: Match
    entry: Entry
    parts: frozenset[str]  # of a block
    nbytes: int
    waiting: list[Arrived]


def _copy(
    future: "Future[Any]", entry: Entry
) -> tuple[RawArrays, Mapping[str, str]] | BaseException:
    """Return what was read as arrays, and a tail's metadata.

    What went wrong is returned, to be raised on the engine thread.
    """
    try:
        tensors, metadata = (
            (future.result(), {}) if isinstance(entry, CachedBlock) else future.result()
        )
        return copy_host(tensors), metadata
    except BaseException as e:
        return e


class Restorer:
    """Reads parts of blocks, and tails. Engine thread only.

    The store's futures come back through `post`, which runs a function on that thread.
    """

    def __init__(
        self,
        prefix_cache: PrefixCache,
        store: AgentStore,
        post: Callable[[Callable[[], None]], None],
    ):
        self._prefix_cache = prefix_cache
        self._store = store
        self._spec = prefix_cache.spec
        self._post = post
        self.restored_bytes = 0  # since the start
        self.incoming_bytes = 0  # being read
        self.reading_since = 0.0  # time.perf_counter(), while there are any
        self._reads: dict[int, list[_Read]] = {}  # by id of the entry

    def restore(self, match: Match, only: Entry | None = None) -> Future[Restored]:
        """Read what `match` lacks; the future ends, on the engine thread, once that is in RAM.

        The caller holds the match meanwhile, and then matches again, over what there is by then. A
        bad block or tail is quarantined and forgotten. `only`: read no more than of this.
        """
        restored: Future[Restored] = Future()
        total = 0
        left = 0

        def arrived(nbytes: int, at: float) -> None:
            nonlocal total, left
            total += nbytes
            left -= 1
            if not left:
                restored.set_result(Restored(total, at))

        if not self.incoming_bytes:
            self.reading_since = time.perf_counter()
        wanted = [what for what in match.missing if only is None or what.entry is only]
        reads = [read for what in wanted for read in self._reads_of(match, what)]
        left = len(reads)
        for read in reads:
            read.waiting.append(arrived)
        if not reads:  # it has left RAM and was never on disk
            restored.set_result(Restored(0, time.perf_counter()))
        return restored

    def _reads_of(self, match: Match, what: Missing) -> list[_Read]:
        """Return the reads that bring `what`; each part is read once, however many wait for it."""
        entry = what.entry
        parts = what.parts
        on_their_way = self._reads.get(id(entry), [])
        if isinstance(entry, CachedTail):
            return on_their_way or [self._read(match, entry, parts)]
        shared = [read for read in on_their_way if read.parts & parts]
        left = parts.intersection(entry.disk_parts).difference(*(read.parts for read in shared))
        return shared + ([self._read(match, entry, left)] if left else [])

    def _read(self, match: Match, entry: Entry, parts: frozenset[str]) -> _Read:
        """Begin to read parts of an entry."""
        read = _Read(match, entry, parts, Missing(entry, parts).nbytes, [])
        self._reads.setdefault(id(entry), []).append(read)
        self.incoming_bytes += read.nbytes

        def copied(future: "Future[Any]") -> None:
            """Copy on the reader's thread, so that decode goes on."""
            result = _copy(future, entry)
            at = time.perf_counter()
            self._post(lambda: self._arrived(read, result, at))

        if isinstance(entry, CachedBlock):
            future: Future[Any] = self._store.read_block(entry.key, parts)
        else:
            assert match.source is not None
            future = self._store.read_tail(match.source.id)
        future.add_done_callback(copied)
        return read

    def _arrived(self, read: _Read, result: Any, at: float) -> None:
        """Take in what was read, and tell those who wait for it."""
        self.incoming_bytes -= read.nbytes
        taken = self._take_in(read, result)
        self.restored_bytes += taken
        reads = self._reads[id(read.entry)]
        reads.remove(read)
        if not reads:
            del self._reads[id(read.entry)]
        for arrived in read.waiting:
            arrived(taken, at)

    def _take_in(self, read: _Read, result: Any) -> int:
        """Put what was read in its place; return its bytes.

        Nothing is done where it is there by now, or its place is gone.
        """
        entry = read.entry
        if isinstance(result, CorruptSegment):
            if isinstance(entry, CachedBlock) and entry.data is not None and not entry.disk_bytes:
                return 0  # let go of meanwhile, but for what is in RAM: that is no damage
            there = (
                read.parts <= entry.data.parts
                if isinstance(entry, CachedBlock) and entry.data
                else entry.data is not None
            )
            if not there:
                self._quarantine(read.match, entry)
            return 0
        if isinstance(result, BaseException):
            raise result
        raw, metadata = result
        if isinstance(entry, CachedBlock):
            return self._take_in_parts(read, entry, raw)
        return self._take_in_tail(read.match, entry, raw, metadata)

    def _take_in_parts(self, read: _Read, block: CachedBlock, raw: RawArrays) -> int:
        """Add parts to a block; return their bytes."""
        have = block.data or _NOTHING
        if not read.parts <= have.parts | {part_of(name) for name in raw}:
            self._quarantine(read.match, block)
            return 0
        arrays = from_raw(
            {name: array for name, array in raw.items() if part_of(name) not in have.parts}
        )
        self._prefix_cache.pool.add(block, arrays)
        block.last_used = time.time()
        return SealedBlock(arrays).nbytes

    def _take_in_tail(
        self, match: Match, tail: CachedTail, raw: RawArrays, metadata: Mapping[str, str]
    ) -> int:
        """Give a tail its arrays; return their bytes."""
        assert match.source is not None
        if tail.data is not None or match.source.tail is not tail:
            return 0
        head = match.blocks[-1].key if match.blocks else ROOT
        if metadata["identity"] != tail_identity(head, tail.tokens):
            self._quarantine(match, tail)
            return 0
        tail.lineage = bytes.fromhex(metadata["lineage"])
        data = Tail.from_arrays(
            from_raw(raw), len(tail.tokens), int(metadata["prefix_len"]), self._spec
        )
        self._prefix_cache.pool.put(tail, data)
        tail.last_used = time.time()
        return data.nbytes

    def _quarantine(self, match: Match, entry: Entry) -> None:
        """Put a damaged file aside, and forget what was in it.

        A block that was sealed again while it was read stays, and so does the branch's tail if it
        is another one by now.
        """
        if isinstance(entry, CachedBlock):
            if self._prefix_cache.blocks.get(entry.key) is entry:
                self._store.quarantine_block(entry.key)
                self._prefix_cache.cut_at(entry)
        elif match.source is not None and match.source.tail is entry:
            self._store.quarantine_tail(match.source.id)
            self._prefix_cache.set_tail(match.source, CachedTail())

    def snapshot(self, match: Match) -> tuple[Snapshot, bytes]:
        """Return a matched prefix, all of it in RAM, as a cache begins with it.

        The second value is the lineage of its open block.
        """
        assert not match.missing
        tail, lineage = self.open_block(match)
        wanted = needs(self._spec, len(match.blocks), match.length)
        blocks = (
            (block.data or _NOTHING).only(parts)
            for block, parts in zip(match.blocks, wanted, strict=True)
        )
        return Snapshot(tuple(blocks), tail), lineage

    def open_block(self, match: Match) -> tuple[Tail | None, bytes]:
        """Return what follows the matched whole blocks, and its lineage.

        What that is cut from is in RAM.
        """
        n = match.open_len
        if match.cut_block is not None:
            assert match.cut_block.data is not None
            tail = Tail.of_cut_block(match.cut_block.data, n, self._spec)
            return tail, cut_lineage(match.cut_block.key, n)
        if match.tail is None:
            return None, FRESH
        assert match.tail.data is not None
        lineage = match.tail.lineage
        if lineage and n < match.tail.data.prefix_len:
            lineage = cut_again(lineage, n)
        return match.tail.data.cut(n), lineage
