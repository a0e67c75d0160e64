"""Branches in a tree: what is matched, shared and dropped. Token ids only, no model."""

import mlx.core as mx
import numpy as np
import pytest

from agentmem.agent_key import AgentKey
from agentmem.kvcache.spec import FullAttention, KVCacheSpec
from agentmem.prefix_cache.agent import Branch
from agentmem.prefix_cache.block_pool import CachedTail
from agentmem.prefix_cache.cache import PrefixCache
from agentmem.prefix_cache.lineage import FRESH, ROOT, block_key
from agentmem.prefix_cache.match import Match

SIZE = 4
SPEC = KVCacheSpec((FullAttention(1, 64, 64),), mx.float32, block_size=SIZE)


class Fill:
    """A block's arrays, for bookkeeping that never looks inside."""

    nbytes = 10
    parts = frozenset({"0"})


def prefix_cache(sharing: str = "namespace", max_branches: int = 3) -> PrefixCache:
    return PrefixCache(fingerprint=b"f", spec=SPEC, sharing=sharing, max_branches=max_branches)


def put(
    c: PrefixCache, agent: str, tokens: list[int], namespace: str = "ns", lineage: bytes = FRESH
) -> Branch:
    """A finished sequence of `tokens`, from an empty cache."""
    branch = c.new_branch(c.agent(AgentKey(namespace, agent)))
    for start in range(0, len(tokens) - SIZE + 1, SIZE):
        parent = branch.blocks[-1].key if branch.blocks else ROOT
        node = c.seal(
            scope=c.scope(AgentKey(namespace, agent)),
            parent=parent,
            tokens=tokens[start : start + SIZE],
            lineage=lineage,
            data=Fill(),
        )
        c.hold([node])
        branch.blocks.append(node)
    branch.tail = CachedTail(np.array(tokens[len(branch.blocks) * SIZE :], np.uint32))
    c.put_branch(branch)
    return branch


def match(c: PrefixCache, agent: str, tokens: list[int], namespace: str = "ns") -> Match:
    return c.match(AgentKey(namespace, agent), tokens)


def test_a_continued_conversation_matches_all_of_its_branch():
    c = prefix_cache()
    branch = put(c, "alice", [1, 2, 3, 4, 5, 6])
    found = match(c, "alice", [1, 2, 3, 4, 5, 6, 7, 8])
    assert (found.length, found.source, found.extends) == (6, branch, True)
    assert found.open_len == 2


def test_the_last_token_is_never_taken_from_the_cache():
    c = prefix_cache()
    put(c, "alice", [1, 2, 3, 4, 5, 6])
    assert match(c, "alice", [1, 2, 3, 4, 5, 6]).length == 5
    assert match(c, "alice", [1]).length == 0


def test_a_difference_inside_a_block_cuts_that_block():
    c = prefix_cache()
    branch = put(c, "alice", [1, 2, 3, 4, 5, 6, 7, 8, 9])
    found = match(c, "alice", [1, 2, 3, 4, 5, 6, 99, 100])
    assert (found.length, found.cut_block, len(found.blocks), found.extends) == (
        6,
        branch.blocks[1],
        1,
        False,
    )


def test_a_difference_at_a_block_boundary_cuts_nothing():
    c = prefix_cache()
    put(c, "alice", [1, 2, 3, 4, 5, 6, 7, 8])
    found = match(c, "alice", [1, 2, 3, 4, 50, 60])
    assert (found.length, found.cut_block, len(found.blocks)) == (4, None, 1)


def test_the_longest_of_several_branches_is_taken():
    c = prefix_cache()
    put(c, "alice", [1, 2, 3, 4, 5])
    longer = put(c, "alice", [1, 2, 3, 9, 9, 9])
    assert match(c, "alice", [1, 2, 3, 9, 9, 8, 7]).source is longer


def test_another_agent_shares_whole_blocks_but_no_tail():
    c = prefix_cache()
    put(c, "alice", [1, 2, 3, 4, 5, 6])
    found = match(c, "bob", [1, 2, 3, 4, 5, 6, 7])
    assert (found.length, found.source) == (4, None)


@pytest.mark.parametrize(
    ("sharing", "agent", "namespace"), [("agent", "bob", "ns"), ("namespace", "alice", "other")]
)
def test_nothing_is_shared_beyond_the_scope(sharing, agent, namespace):
    c = prefix_cache(sharing)
    put(c, "alice", [1, 2, 3, 4, 5, 6])
    assert match(c, agent, [1, 2, 3, 4, 5, 6, 7], namespace).length == 0


def test_a_block_that_refilled_after_a_cut_never_stands_in_for_a_fresh_one():
    c = prefix_cache()
    fresh = put(c, "alice", [1, 2, 3, 4])
    cut = put(c, "bob", [1, 2, 3, 4], lineage=b"cut")
    assert fresh.blocks[0] is not cut.blocks[0]
    assert match(c, "carol", [1, 2, 3, 4, 5]).blocks == (fresh.blocks[0],)


def test_two_computations_of_one_block_become_one_node():
    c = prefix_cache()
    a, b = put(c, "alice", [1, 2, 3, 4]), put(c, "bob", [1, 2, 3, 4])
    assert a.blocks == b.blocks
    assert a.blocks[0].refs == 2


def test_a_block_known_only_on_disk_is_not_mixed_with_a_second_computation():
    c = prefix_cache()
    a = put(c, "alice", [1, 2, 3, 4])
    a.blocks[0].data, a.blocks[0].disk_bytes = None, 10
    assert put(c, "bob", [1, 2, 3, 4]).blocks != a.blocks


def test_a_branch_displaces_its_own_prefixes():
    c = prefix_cache()
    put(c, "alice", [1, 2, 3])
    put(c, "alice", [1, 2, 3, 4, 5])
    longest = put(c, "alice", [1, 2, 3, 4, 5, 6])
    assert list(c.agents["ns", "alice"].branches.values()) == [longest]


def test_the_oldest_branch_goes_when_there_are_too_many():
    c = prefix_cache(max_branches=2)
    oldest = put(c, "alice", [1, 1])
    for i in range(2, 5):
        put(c, "alice", [i, i])
    kept = c.agents["ns", "alice"].branches
    assert len(kept) == 2
    assert oldest.id not in kept


def test_a_branch_in_use_is_not_displaced():
    c = prefix_cache(max_branches=1)
    running = put(c, "alice", [1, 2])
    running.in_use = True
    put(c, "alice", [1, 2, 3])
    put(c, "alice", [7])
    assert running.id in c.agents["ns", "alice"].branches


def test_nodes_are_forgotten_with_their_last_holder():
    c = prefix_cache()
    put(c, "alice", [1, 2, 3, 4, 5, 6, 7, 8])
    put(c, "bob", [1, 2, 3, 4, 9, 9, 9, 9])
    c.drop_agent(c.agents["ns", "alice"])
    assert len(c.blocks) == 2
    c.drop_agent(c.agents["ns", "bob"])
    assert not c.blocks and not c.agents


def test_a_bad_block_cuts_every_branch_that_holds_it():
    c = prefix_cache()
    a, b = put(c, "alice", [1, 2, 3, 4, 5, 6, 7, 8, 9]), put(c, "bob", [1, 2, 3, 4, 5, 6, 7, 8, 10])
    c.cut_at(a.blocks[1])
    assert [len(x) for x in (a, b)] == [4, 4]
    assert match(c, "alice", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]).length == 4


def test_every_part_of_a_block_key_matters():
    tokens = np.arange(SIZE, dtype=np.uint32)
    base = block_key(b"s", b"p", tokens, b"l")
    others = [
        block_key(b"S", b"p", tokens, b"l"),
        block_key(b"s", b"P", tokens, b"l"),
        block_key(b"s", b"p", tokens + 1, b"l"),
        block_key(b"s", b"p", tokens, b"L"),
        block_key(b"sp", b"", tokens, b"l"),
    ]
    assert len({base, *others}) == 6
