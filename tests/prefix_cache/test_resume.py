"""Positions from which a sequence can go on, and what stays in RAM for that. No model."""

from collections.abc import Mapping
from types import MappingProxyType

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.agent_key import AgentKey
from agentmem.kvcache.block import SealedBlock, Tail
from agentmem.kvcache.spec import (
    ChunkedAttention,
    FullAttention,
    KVCacheSpec,
    Recurrent,
    SlidingWindow,
)
from agentmem.prefix_cache.agent import Branch
from agentmem.prefix_cache.block_pool import CachedBlock, CachedTail
from agentmem.prefix_cache.cache import PrefixCache
from agentmem.prefix_cache.lineage import FRESH, ROOT
from agentmem.prefix_cache.resume import UNSAVED_BLOCKS, missing, resumable
from agentmem.store.records import FileRef

SIZE = 4
GLOBAL = FullAttention(1, 32, 32)
SLIDING = SlidingWindow(1, 32, 32, window=6)
CHUNKED = ChunkedAttention(1, 32, 32, window=8)
STATE = Recurrent(state=(((1, 2, 3), "float32"),))
SPECS = {
    "global": (GLOBAL,),
    "gemma": (GLOBAL, SLIDING),
    "sliding": (SLIDING,),
    "llama4": (GLOBAL, CHUNKED),
    "hybrid": (GLOBAL, STATE),
    "mamba": (STATE,),
    "all": (GLOBAL, SLIDING, STATE),
}


def spec_of(name: str) -> KVCacheSpec:
    return KVCacheSpec(SPECS[name], mx.float32, block_size=SIZE, state_interval=2 * SIZE)


def block(spec: KVCacheSpec, parts: frozenset[str]) -> SealedBlock:
    """A sealed block's arrays, or what stands for them: 64 bytes for a stack, 24 for a state."""
    stacks = {
        f"k{s}.full": mx.zeros((1, 1, SIZE, 4)) for s in range(len(spec.stacks)) if str(s) in parts
    }
    states = {f"s0.0{part}": mx.zeros((1, 2, 3)) for part in parts if part.startswith("@")}
    return SealedBlock(stacks | states)


def node(
    spec: KVCacheSpec, in_ram: frozenset[str] | None, on_disk: frozenset[str] = frozenset()
) -> CachedBlock:
    made = CachedBlock(
        b"k", ROOT, np.zeros(SIZE, np.uint32), data=None if in_ram is None else block(spec, in_ram)
    )
    if on_disk:
        made.saved(FileRef(100, b"", parts=dict.fromkeys(on_disk, 10)))
    return made


def all_parts(spec: KVCacheSpec) -> list[str]:
    offsets = range(1, SIZE + 1) if spec.resumes_at_snapshots else ()
    return [str(s) for s in range(len(spec.stacks))] + [f"@{n}" for n in offsets]


@st.composite
def paths(draw: st.DrawFn) -> tuple[KVCacheSpec, list[CachedBlock], CachedTail | None, int]:
    spec = spec_of(draw(st.sampled_from([name for name in SPECS if name != "global"])))
    some = st.sets(st.sampled_from(all_parts(spec))).map(frozenset)
    nodes = [node(spec, draw(st.none() | some), draw(some)) for _ in range(draw(st.integers(0, 6)))]
    tail, left = None, draw(st.integers(0, SIZE - 1))
    if left:
        tail = CachedTail(np.zeros(left, np.uint32), disk_bytes=1)
        tail.disk_parts = {
            part: 1 for part in draw(some) if part.startswith("@") and int(part[1:]) <= left
        }
    return spec, nodes, tail, draw(st.integers(0, len(nodes) * SIZE + left))


@given(paths())
@settings(max_examples=400, deadline=None)
def test_the_reached_position_is_the_last_from_which_all_that_is_needed_is_there(path):
    spec, nodes, tail, n = path

    def there(i: int) -> set[str]:
        if i < len(nodes):
            return set(nodes[i].disk_parts) | (set(nodes[i].data.parts) if nodes[i].data else set())
        return {str(s) for s in range(len(spec.stacks))} | set(tail.disk_parts)

    def can_resume(p: int) -> bool:
        return all(spec.needed(i, p) <= there(i) for i in range(-(-p // SIZE)))

    assert resumable(spec, nodes, tail, n) == max(p for p in range(n + 1) if can_resume(p))


def test_a_model_that_sees_everything_goes_on_from_anywhere():
    spec = spec_of("global")
    nodes = [node(spec, None, frozenset("0")) for _ in range(3)]
    assert [resumable(spec, nodes, None, n) for n in (0, 5, 12)] == [0, 5, 12]


def test_only_the_parts_that_are_needed_and_not_in_ram_are_missing():
    spec = spec_of("gemma")
    nodes = [node(spec, frozenset("0"), frozenset("01")) for _ in range(4)]
    assert [(m.entry, m.parts, m.nbytes) for m in missing(spec, nodes, None, 16)] == [
        (nodes[2], frozenset("1"), 10),
        (nodes[3], frozenset("1"), 10),
    ]
    tail = CachedTail(np.zeros(2, np.uint32), disk_bytes=50)
    assert [m.nbytes for m in missing(spec, nodes, tail, 18)] == [10, 50]


# -- among the agents


class Tree:
    """PrefixCache, filled by hand."""

    def __init__(self, name: str):
        self.spec = spec_of(name)
        self.prefix_cache = PrefixCache(
            fingerprint=b"f", spec=self.spec, sharing="namespace", max_branches=3
        )

    def put(
        self,
        agent: str,
        tokens: list[int],
        states: Mapping[int, set[str]] = MappingProxyType({}),
        **stored: bool,
    ) -> Branch:
        """A finished sequence with all stacks, and `states` by block; of the tail under its block's
        index.
        """
        prefix_cache, stacks = self.prefix_cache, {str(s) for s in range(len(self.spec.stacks))}
        branch = prefix_cache.new_branch(prefix_cache.agent(AgentKey("ns", agent)))
        branch.agent.ephemeral = stored.get("ephemeral", False)
        for i in range(len(tokens) // SIZE):
            parts = frozenset(stacks | states.get(i, set()))
            parent = branch.blocks[-1].key if branch.blocks else ROOT
            made = prefix_cache.seal(
                scope=prefix_cache.scope(AgentKey("ns", agent)),
                parent=parent,
                tokens=tokens[i * SIZE : (i + 1) * SIZE],
                lineage=FRESH,
                data=block(self.spec, parts),
                ephemeral=branch.agent.ephemeral,
            )
            prefix_cache.hold([made])
            if stored.get("saved", False):
                made.saved(FileRef(100, b"", parts=dict.fromkeys(parts, 10)))
            branch.blocks.append(made)
        prefix_cache.put_branch(branch)
        if left := len(tokens) % SIZE:
            at = len(branch.blocks)
            data = block(self.spec, frozenset(states.get(at, set()))).arrays
            tail = CachedTail(np.array(tokens[-left:], np.uint32))
            prefix_cache.set_tail(branch, tail, Tail(left, {}, states=data))
        prefix_cache.drop_unneeded(branch.blocks)
        return branch

    def match_length(self, agent: str, tokens: list[int]) -> int:
        return self.prefix_cache.match(AgentKey("ns", agent), tokens).length


TOKENS = list(range(10, 50))


def test_a_resting_agent_has_windows_in_ram_only_where_its_end_looks():
    tree = Tree("gemma")
    branch = tree.put("alice", TOKENS, saved=True)
    assert ["1" in n.data.parts for n in branch.blocks] == [False] * 8 + [True] * 2
    assert all("0" in n.data.parts for n in branch.blocks)
    assert tree.prefix_cache.pool.nbytes == 12 * 64 == tree.prefix_cache.infos("ns")[0].ram_bytes
    assert tree.prefix_cache.infos("ns")[0].tier == "hot"


def test_what_two_branches_need_of_a_shared_block_stays_until_neither_does():
    tree = Tree("gemma")
    tree.put("bob", TOKENS, saved=True)
    short = tree.prefix_cache.new_branch(tree.prefix_cache.agent(AgentKey("ns", "alice")))
    short.blocks = tree.prefix_cache.agents["ns", "bob"].newest.blocks[:4]
    tree.prefix_cache.hold(short.blocks)
    tree.prefix_cache.put_branch(short)
    for shared in short.blocks:
        tree.prefix_cache.pool.add(shared, block(tree.spec, frozenset("1")).arrays)
    tree.prefix_cache.drop_unneeded(short.blocks)
    assert ["1" in n.data.parts for n in short.blocks] == [False, False, True, True]
    tree.prefix_cache.drop_agent(tree.prefix_cache.agents["ns", "alice"])
    assert ["1" in n.data.parts for n in short.blocks] == [False] * 4


def test_a_match_that_something_waits_for_keeps_what_it_read():
    tree = Tree("gemma")
    branch = tree.put("alice", TOKENS, saved=True)
    match = tree.prefix_cache.match(AgentKey("ns", "alice"), [*TOKENS[:16], 1])
    assert [m.entry for m in match.missing] == branch.blocks[2:4]
    tree.prefix_cache.hold_match(match)
    for m in match.missing:
        tree.prefix_cache.pool.add(m.entry, block(tree.spec, m.parts).arrays)
    tree.prefix_cache.drop_unneeded(branch.blocks)
    assert not match.missing
    tree.prefix_cache.release_match(match)
    assert [m.entry for m in match.missing] == branch.blocks[2:4]


def test_an_unsaved_path_keeps_no_more_windows_than_a_bound():
    tree = Tree("gemma")
    branch = tree.put("alice", [*TOKENS, *TOKENS])
    kept = ["1" in n.data.parts for n in branch.blocks]
    assert kept == [False] * (20 - 2 - UNSAVED_BLOCKS) + [True] * (2 + UNSAVED_BLOCKS)


def test_what_is_never_written_is_cut_back_to_where_it_can_go_on():
    tree = Tree("gemma")
    tree.put("alice", TOKENS, ephemeral=True)
    assert tree.match_length("alice", [*TOKENS, 1]) == 40
    assert (
        tree.match_length("alice", [*TOKENS[:34], 1]) == 0
    )  # its window looks into blocks that let go of theirs
    llama4 = Tree("llama4")
    llama4.put("alice", TOKENS, ephemeral=True)
    assert (
        llama4.match_length("alice", [*TOKENS[:30], 1]) == 24
    )  # where a chunk begins, nothing before is seen


def test_a_block_whose_windows_are_gone_from_ram_is_not_adopted():
    tree = Tree("gemma")
    first = tree.put("alice", TOKENS, saved=True)
    second = tree.put("bob", TOKENS[:8])
    assert second.blocks[0] is not first.blocks[0]
    fresh = Tree("gemma")
    first, second = fresh.put("alice", TOKENS[:8]), fresh.put("bob", TOKENS[:8])
    assert second.blocks == first.blocks


@pytest.mark.parametrize("name", ["hybrid", "mamba", "all"])
def test_recurrent_agents_go_on_from_the_last_snapshot_before_the_difference(name):
    tree = Tree(name)
    states = {1: {"@4"}, 3: {"@2", "@4"}, 5: {"@4"}, 7: {"@4"}, 9: {"@3"}}
    tree.put("alice", TOKENS[:39], states, saved=True)
    for same, reached in (
        (39, 39),
        (38, 32),
        (31, 24),
        (24, 24),
        (23, 16),
        (15, 14),
        (13, 8),
        (7, 0),
    ):
        assert tree.match_length("alice", [*TOKENS[:same], 1]) == reached
    match = tree.prefix_cache.match(AgentKey("ns", "alice"), [*TOKENS[:15], 1])
    assert (len(match.blocks), match.cut_block is not None, match.open_len) == (3, True, 2)
    assert all(m.parts <= m.entry.disk_parts.keys() for m in match.missing)
    assert not tree.prefix_cache.match(AgentKey("ns", "alice"), [*TOKENS[:39], 1]).missing


@pytest.mark.parametrize("name", ["hybrid", "mamba"])
def test_snapshots_leave_ram_but_for_the_one_at_the_end(name):
    tree = Tree(name)
    states = {i: {"@4"} for i in range(10)}
    branch = tree.put("alice", TOKENS, states, saved=True)
    assert [i for i, n in enumerate(branch.blocks) if n.data.parts & {"@4"}] == [9]
    unsaved = tree.put("bob", TOKENS[::-1], states)
    assert [i for i, n in enumerate(unsaved.blocks) if n.data.parts & {"@4"}] == [8, 9]


def test_another_agent_starts_from_a_snapshot_in_shared_blocks():
    tree = Tree("hybrid")
    tree.put("alice", TOKENS, {1: {"@4"}, 4: {"@1"}, 9: {"@4"}}, saved=True)
    assert tree.match_length("bob", [*TOKENS[:30], 1]) == 17
    assert tree.match_length("bob", [*TOKENS[:16], 1]) == 8
