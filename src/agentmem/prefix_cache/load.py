"""What the store holds is entered among the agents here, and what it lost is forgotten."""

import math
from collections.abc import Iterable

from ..store.agent_store import AgentStore
from ..store.records import BlockRecord, BranchRecord
from ..store.upkeep.trim import Trimmed
from .agent import Agent, Branch
from .block_pool import CachedBlock, CachedTail
from .cache import PrefixCache
from .lineage import ROOT


def load_index(prefix_cache: PrefixCache, store: AgentStore) -> None:
    """Enter what the store's manifest names: every agent warm."""
    index = store.index()
    for a in index.agents:
        prefix_cache.agents[a.key] = Agent(
            key=a.key,
            created=a.created,
            last_used=a.last_used,
            pinned=a.pinned,
            ttl=a.ttl,
            requests=a.requests,
            hit_tokens=a.hit_tokens,
        )
    enter(prefix_cache, index.branches, index.blocks)


def enter(
    prefix_cache: PrefixCache, branches: Iterable[BranchRecord], blocks: Iterable[BlockRecord]
) -> None:
    """Add branches that are on disk, each to its agent; `blocks` are all that they are made of."""
    records = {r.key: r for r in blocks}
    for b in branches:
        agent = prefix_cache.agents.setdefault(b.agent, prefix_cache.agent(b.agent))
        branch = Branch(b.id, agent, last_used=b.last_used, disk_head=b.head)
        key = b.head
        while key:
            record = records[key]
            block = prefix_cache.blocks.get(key) or CachedBlock(
                key,
                record.parent or ROOT,
                record.tokens,
                disk_bytes=record.nbytes,
                disk_parts=record.parts,
            )
            prefix_cache.blocks[key] = block
            branch.blocks.append(block)
            key = record.parent
        branch.blocks.reverse()
        prefix_cache.hold(branch.blocks)
        if b.tail is not None:
            branch.tail = CachedTail(
                b.tail.tokens, disk_bytes=b.tail.nbytes, disk_parts=b.tail.parts
            )
        branch.agent.branches[branch.id] = branch


def forget(prefix_cache: PrefixCache, gone: Trimmed) -> None:
    """Forget what a full store let go of, since it was not used for longest.

    It stays only where it is in RAM.
    """
    keys = set(gone.blocks)
    tails = set(gone.tails)
    for block in [prefix_cache.blocks[key] for key in keys if key in prefix_cache.blocks]:
        block.not_on_disk()
        if block.data is None:
            prefix_cache.cut_at(block)
    for branch in list(prefix_cache.branches()):
        if branch.id in tails:
            branch.tail.not_on_disk()
            if branch.tail.data is None:
                prefix_cache.set_tail(branch, CachedTail())
        if branch.disk_head in keys or branch.id in tails:
            branch.disk_head = None if branch.disk_head in keys else branch.disk_head
            branch.save_at = branch.save_at or math.inf  # when it leaves RAM, not before
        if not len(branch) and not branch.in_use:
            prefix_cache.drop_branch(branch)
    for agent in [a for a in prefix_cache.agents.values() if not a.branches]:
        prefix_cache.drop_agent(agent)
