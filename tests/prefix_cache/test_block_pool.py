"""What leaves RAM first."""

import time

import mlx.core as mx
import numpy as np
import pytest

from agentmem.kvcache.block import SealedBlock, Tail
from agentmem.prefix_cache.block_pool import BlockPool, CachedBlock, CachedTail

TOKENS = np.zeros(32, np.uint32)


def block(
    pool: BlockPool, name: str, *, idle: float = 0.0, kib: int = 4, disk_bytes: int = 1
) -> CachedBlock:
    node = CachedBlock(
        name.encode(), b"", TOKENS, disk_bytes=disk_bytes, last_used=time.time() - idle
    )
    pool.put(node, SealedBlock({"k0.packed": mx.zeros(kib << 10, mx.uint8)}))
    return node


def tail(pool: BlockPool, *, idle: float, kib: int) -> CachedTail:
    entry = CachedTail(TOKENS, disk_bytes=1, last_used=time.time() - idle)
    pool.put(entry, Tail(32, {"k0.full": mx.zeros(kib << 10, mx.uint8)}))
    return entry


def test_the_least_recently_used_leaves_first_and_no_more_than_needed():
    pool = BlockPool()
    new, old, middle = (
        block(pool, "new", idle=1),
        block(pool, "old", idle=9),
        block(pool, "middle", idle=5),
    )
    assert pool.evict(5000, ()) == []
    assert (new.data is None, old.data is None, middle.data is None) == (False, True, True)
    assert (pool.nbytes, pool.evicted_bytes) == (4096, 8192)


def test_of_equals_the_end_of_a_path_leaves_before_its_beginning():
    pool, now = BlockPool(), time.time()
    path = [block(pool, str(i)) for i in range(3)]
    for node in path:
        node.last_used = now - 1
    pool.evict(1, ())
    assert [node.data is None for node in path] == [False, False, True]


def test_what_is_cheap_to_read_back_for_its_bytes_leaves_before_what_is_dear():
    pool = BlockPool()
    large, small = block(pool, "large", idle=5, kib=4096), tail(pool, idle=8, kib=16)
    pool.evict(1, ())
    assert (large.data is None, small.data is None) == (True, False)


def test_kept_and_unsaved_entries_stay():
    pool = BlockPool()
    kept, unsaved, idle = (
        block(pool, "kept"),
        block(pool, "unsaved", disk_bytes=0),
        block(pool, "idle"),
    )
    assert pool.evict(8192, {id(kept)}) is None
    assert None not in (kept.data, unsaved.data, idle.data)
    assert pool.evict(8192, {id(kept)}, partly=True) == []
    assert (kept.data is None, unsaved.data is None, idle.data is None) == (False, False, True)


def test_where_loss_is_allowed_unsaved_entries_leave_last_and_are_named():
    pool = BlockPool()
    unsaved, idle = block(pool, "unsaved", idle=90, disk_bytes=0), block(pool, "idle")
    assert pool.evict(1, (), lossy=True) == []
    assert (unsaved.data is None, idle.data is None) == (False, True)
    assert pool.evict(1, (), lossy=True) == [unsaved]
    assert pool.nbytes == 0


def test_an_entry_is_counted_once():
    pool = BlockPool()
    node = block(pool, "a")
    with pytest.raises(AssertionError):
        pool.put(node, SealedBlock({}))
    pool.drop(node)
    pool.drop(node)
    assert pool.nbytes == 0
