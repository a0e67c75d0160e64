"""Agents and their branches: what is cached, and for whom."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ..agent_key import AgentKey
from ..kvcache.spec import KVCacheSpec
from ..store.records import AgentRecord
from .block_pool import CachedBlock, CachedTail, Entry
from .info import AgentInfo, Explanation, Tier
from .resume import missing


@dataclass(eq=False)
class Branch:
    """One path of blocks from the root, and the tail that follows them."""

    id: str
    agent: "Agent"
    blocks: list[CachedBlock] = field(default_factory=list)
    tail: CachedTail = field(default_factory=CachedTail)
    last_used: float = 0.0  # Unix seconds
    in_use: bool = False  # a sequence continues it
    preempted: bool = False  # that sequence waits for RAM: what is here may be saved and evicted
    disk_head: bytes | None = None  # last block of the branch's row in the store
    # time.monotonic() when what is not on disk is to be saved; None: all is
    save_at: float | None = None
    tail_bytes_written: int = 0  # of all its tails, one after the other
    # branches that leave the disk once all of this one is there
    displaced: list[str] = field(default_factory=list)

    def tokens(self) -> np.ndarray:
        """Return its token ids [n], uint32."""
        return np.concatenate([*(n.tokens for n in self.blocks), self.tail.tokens])

    def __len__(self) -> int:
        per_block = len(self.blocks[0].tokens) if self.blocks else 0
        return len(self.blocks) * per_block + len(self.tail.tokens)

    @property
    def head(self) -> bytes | None:
        """Return the key of its last block."""
        return self.blocks[-1].key if self.blocks else None

    def tier(self, spec: KVCacheSpec) -> Tier:
        """Return "hot" where nothing that its end needs must be read, else "warm"."""
        blocks = list(self.blocks)
        tail = self.tail
        end = sum(len(n.tokens) for n in blocks) + len(tail.tokens)
        return "warm" if missing(spec, blocks, tail if len(tail.tokens) else None, end) else "hot"


@dataclass(eq=False)
class Agent:
    """A named holder of context, and the branches that it goes on from."""

    key: AgentKey
    created: float
    last_used: float
    branches: dict[str, Branch] = field(default_factory=dict)
    pinned: bool = False  # its caches stay in RAM and on disk
    ttl: float | None = None  # seconds that it is kept after its last use
    ephemeral: bool = False  # never written to disk
    requests: int = 0
    hit_tokens: int = 0  # of its prompts, that were cached
    explained: Explanation | None = None  # of its last request
    noted_at: float = 0.0  # time.monotonic() when the store was last told of its use

    @property
    def newest(self) -> Branch | None:
        """Return the branch that was used last."""
        return max(list(self.branches.values()), key=lambda b: b.last_used, default=None)

    def record(self) -> AgentRecord:
        """Return what the store keeps of it, but for its branches."""
        return AgentRecord(
            key=self.key,
            created=self.created,
            last_used=self.last_used,
            pinned=self.pinned,
            ttl=self.ttl,
            requests=self.requests,
            hit_tokens=self.hit_tokens,
        )

    def entries(self) -> Iterator[Entry]:
        """Yield the blocks and tails of all its branches."""
        for branch in self.branches.values():
            yield from branch.blocks
            yield branch.tail


def agent_info(agent: Agent, spec: KVCacheSpec) -> AgentInfo:
    """Return the row that tells of an agent. On any thread."""
    branches = list(agent.branches.values())
    blocks = {n.key: n for b in branches for n in list(b.blocks)}.values()
    held = [
        data
        for data in (*(n.data for n in blocks), *(b.tail.data for b in branches))
        if data is not None
    ]
    return AgentInfo(
        agent_id=agent.key.agent_id,
        tier=agent.newest.tier(spec) if agent.newest else "warm",
        tokens=max((len(b) for b in branches), default=0),
        branches=len(branches),
        ram_bytes=sum(data.nbytes for data in held),
        disk_bytes=sum(n.disk_bytes for n in blocks) + sum(b.tail.disk_bytes for b in branches),
        created=agent.created,
        last_used=agent.last_used,
        pinned=agent.pinned,
        ttl=agent.ttl,
        ephemeral=agent.ephemeral,
        requests=agent.requests,
        hit_tokens=agent.hit_tokens,
    )
