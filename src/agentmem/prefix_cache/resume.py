"""Positions from which a sequence can go on, and what must be in RAM for that.

Worked example, blocks of 256, one layer that sees all and one that slides over 300 tokens: part "0"
is needed of every block, part "1" only of blocks that the next token sees into. A sequence of 2,048
tokens goes on with "0" of all eight blocks and "1" of the last two; where "1" of block 5 is gone,
it can't go on from 1,700, but from 2,048 it can.

Of a block in RAM only what somebody needs stays. So an agent that rests has the stacks of layers
that see everything of all its blocks, and the others of the last few. The rest is read from disk
where a context is cut; what is never written is gone.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..kvcache.spec import KVCacheSpec
from ..tensors import is_state, stack_part, state_offset
from .block_pool import BlockPool, CachedBlock, CachedTail, Entry

_NONE: frozenset[str] = frozenset()


def needs(spec: KVCacheSpec, count: int, position: int) -> list[frozenset[str]]:
    """Return what `spec.needed` says of each of the first `count` blocks.

    Blocks far from the end all need the same.
    """
    found: list[frozenset[str]] = []
    while len(found) < count and (not found or found[-1] != spec.lasting_parts):
        found.append(spec.needed(count - len(found) - 1, position))
    return [spec.lasting_parts] * (count - len(found)) + found[::-1]


@dataclass(frozen=True)
class Missing:
    """Parts of a block that are not in RAM.

    A tail is read as a whole: no parts of it are named.
    """

    entry: Entry
    parts: frozenset[str]

    @property
    def nbytes(self) -> int:
        """Return their bytes on disk."""
        if isinstance(self.entry, CachedBlock):
            return sum(self.entry.disk_parts.get(part, 0) for part in self.parts)
        return self.entry.disk_bytes


def resumable(
    spec: KVCacheSpec, blocks: Sequence[CachedBlock], tail: CachedTail | None, n: int
) -> int:
    """Return the largest position, at most `n`, from which a sequence can go on.

    It goes on over `blocks` and then `tail`, whose tokens are at least `n`. What that takes may be
    in RAM or on disk.
    """
    if spec.needs_all_parts:
        return n
    at_snapshots = spec.resumes_at_snapshots
    candidates = _snapshots(spec, blocks, tail, n) if at_snapshots else _ends(spec, n)
    return next((p for p in candidates if _can_resume(spec, blocks, p)), 0)


def _ends(spec: KVCacheSpec, n: int) -> Iterator[int]:
    """Yield `n`, and block boundaries before it.

    Within a block a lower position needs all that a higher one does.
    """
    if n > 0:
        yield n
        yield from range((n - 1) // spec.block_size * spec.block_size, 0, -spec.block_size)


def _snapshots(
    spec: KVCacheSpec, blocks: Sequence[CachedBlock], tail: CachedTail | None, n: int
) -> Iterator[int]:
    """Yield positions at which there is a snapshot of recurrent state, the last one first."""
    path: list[Entry] = [*blocks, *([tail] if tail is not None else [])]
    for index in range(min(len(path), -(-n // spec.block_size)) - 1, -1, -1):
        offsets = map(state_offset, filter(is_state, path[index].there))
        positions = (index * spec.block_size + offset for offset in offsets)
        yield from sorted((p for p in positions if p <= n), reverse=True)


def last_snapshot(spec: KVCacheSpec, blocks: Sequence[CachedBlock]) -> int:
    """Return the position of the last snapshot of recurrent state in `blocks`; 0: none."""
    return next(_snapshots(spec, blocks, None, len(blocks) * spec.block_size), 0)


def _can_resume(spec: KVCacheSpec, blocks: Sequence[CachedBlock], position: int) -> bool:
    """Tell whether the blocks have what going on from `position` takes.

    In a tail, `position` is one that it has a snapshot of, if it needs one.
    """
    wanted = needs(spec, min(len(blocks), -(-position // spec.block_size)), position)
    # the last ones need most, so a failure is found soon
    return all(wanted[i] <= blocks[i].there for i in range(len(wanted) - 1, -1, -1))


def missing(
    spec: KVCacheSpec, blocks: Sequence[CachedBlock], tail: CachedTail | None, position: int
) -> list[Missing]:
    """Return what is not in RAM for a sequence that goes on from `position`.

    The position is in `tail`, or at the end of `blocks`.
    """
    lacking = [
        Missing(block, parts)
        for block, wanted in zip(blocks, needs(spec, len(blocks), position), strict=True)
        if (parts := wanted - (_NONE if block.data is None else block.data.parts))
    ]
    if tail is not None and tail.data is None:
        lacking.append(Missing(tail, _NONE))
    return lacking


# a path from the root, and the position from which it is to be continued
Holder = tuple[Sequence[CachedBlock], int]
UNSAVED_BLOCKS = 8  # beyond a window, that keep its layers' parts while they wait for the disk
UNSAVED_SNAPSHOTS = 2


def unsaved_blocks(spec: KVCacheSpec) -> list[int | None]:
    """Return by stack how many blocks, from its end, of an unsaved path keep its part.

    None: all of them.
    """
    return [None if n is None else n + UNSAVED_BLOCKS for n in spec.window_blocks]


def drop_unneeded(
    spec: KVCacheSpec, pool: BlockPool, path: Sequence[CachedBlock], holders: Iterable[Holder]
) -> None:
    """Let go of the parts that no holder needs of the path's blocks.

    What is not on disk yet keeps those of its last blocks as well: the disk may be slower than a
    prefill, but the bytes of a save that waits are not to grow with the context.
    """
    if spec.needs_all_parts:
        return
    needed = _needed(spec, path, holders)
    snapshots = 0
    for i in range(len(path) - 1, -1, -1):
        block = path[i]
        if block.data is None:
            continue
        if not (block.disk_bytes or block.discardable):
            needed[i] |= _recent(spec, len(path) - i)
            states = sorted(filter(is_state, block.data.parts), key=state_offset, reverse=True)
            states = states[: UNSAVED_SNAPSHOTS - snapshots]
            snapshots += len(states)
            needed[i].update(states)
        pool.keep(block, needed[i])


def _recent(spec: KVCacheSpec, from_end: int) -> set[str]:
    """Return the stacks that stay in the block that is the `from_end`-th last, unsaved."""
    return {
        stack_part(s)
        for s, most in enumerate(unsaved_blocks(spec))
        if most is None or from_end <= most
    }


def _needed(
    spec: KVCacheSpec, path: Sequence[CachedBlock], holders: Iterable[Holder]
) -> list[set[str]]:
    """Return the parts that holders need of each block of the path."""
    needed = [set(spec.lasting_parts) for _ in path]
    for blocks, position in holders:
        for i in range(_shared(path, blocks) - 1, -1, -1):
            parts = spec.needed(i, position)
            needed[i] |= parts
            if parts <= spec.lasting_parts:  # what comes before needs no more
                break
    return needed


def _shared(a: Sequence[CachedBlock], b: Sequence[CachedBlock]) -> int:
    """Return how many blocks at the beginning are the same."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] is not b[i]), n)
