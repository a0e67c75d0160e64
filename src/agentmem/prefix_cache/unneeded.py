"""drop_unneeded: of a block in RAM, only what somebody needs of it stays.

A layer with a window sees the end of a context only, and a snapshot of recurrent state serves one
position. So an agent that rests has the stacks of layers that see everything of all its blocks, and
the others of the last few. The rest is read from disk where a context is cut; what is never written
is gone.
"""

from collections.abc import Iterable, Sequence

from ..kvcache.spec import KVCacheSpec
from ..tensors import is_state, stack_part, state_offset
from .block_pool import BlockPool, CachedBlock

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
