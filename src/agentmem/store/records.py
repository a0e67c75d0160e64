"""What the store knows of agents, branches, blocks and their files."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..agent_key import AgentKey
from ..tensors import HostTensor

# namespace of agents that are being imported: what is left of one goes at the next open
IMPORTS = "\x01import"


@dataclass(frozen=True)
class BranchHead:
    """The end of a branch of an agent: its last sealed block."""

    branch_id: str  # 32 hex digits
    agent: AgentKey
    head: bytes | None  # key of a block that is stored; None: the branch has no block
    last_used: float = field(default_factory=time.time)  # Unix seconds


@dataclass(frozen=True)
class BlockToSave:
    """A sealed block, which becomes the head of a branch."""

    branch_id: str  # 32 hex digits
    agent: AgentKey
    key: bytes
    parent: bytes | None  # key of the block before it; None: it is the first
    tokens: np.ndarray  # uint32
    tensors: Mapping[str, HostTensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    last_used: float = field(default_factory=time.time)  # of the branch, Unix seconds

    @property
    def branch(self) -> BranchHead:
        """Return the branch as it is once the block is stored."""
        return BranchHead(self.branch_id, self.agent, self.key, self.last_used)


@dataclass(frozen=True)
class TailToSave:
    """A branch's tokens after its head."""

    branch_id: str  # 32 hex digits
    agent: AgentKey
    head: bytes | None  # as in BranchHead
    tokens: np.ndarray  # uint32
    tensors: Mapping[str, HostTensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    last_used: float = field(default_factory=time.time)  # of the branch, Unix seconds

    @property
    def branch(self) -> BranchHead:
        """Return the branch as it is once the tail is stored."""
        return BranchHead(self.branch_id, self.agent, self.head, self.last_used)


@dataclass(frozen=True)
class BlockRecord:
    """A sealed block that is stored."""

    key: bytes
    parent: bytes | None  # None: the first block of a context
    tokens: np.ndarray  # uint32
    nbytes: int  # of the file
    checksum: bytes
    created: float  # Unix seconds
    # bytes of each in the file (TensorName.part)
    parts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TailRecord:
    """A branch's unfinished block that is stored."""

    tokens: np.ndarray  # uint32
    nbytes: int
    checksum: bytes
    # bytes of its snapshots ("@137"); stacks it always has, all of them
    parts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class BranchRecord:
    """A branch that is stored.

    Its tokens are those of the blocks from the root to `head`, then the tail's.
    """

    id: str  # 32 hex digits
    agent: AgentKey
    head: bytes | None  # key of the last sealed block
    tail: TailRecord | None
    last_used: float


@dataclass(frozen=True)
class AgentRecord:
    """An agent that is known to the store, whether or not it has branches."""

    key: AgentKey
    created: float  # Unix seconds
    last_used: float
    pinned: bool = False  # never leaves a full store, nor RAM
    ttl: float | None = None  # seconds that it is kept after its last use
    requests: int = 0  # since it was created
    hit_tokens: int = 0  # of its prompts, that were cached


@dataclass(frozen=True)
class Holding:
    """What a branch holds on disk."""

    branch_id: str
    head: bytes | None
    tail_bytes: int  # 0: no tail
    last_used: float
    pinned: bool


@dataclass(frozen=True)
class TurnRecord:
    """What was said in one request."""

    id: str
    agent: AgentKey
    parent: str | None  # the turn that it follows
    content: bytes  # JSON
    created: float  # Unix seconds


@dataclass(frozen=True)
class StoreIndex:
    """All that a store holds, without its tensors."""

    agents: list[AgentRecord]
    branches: list[BranchRecord]
    blocks: list[BlockRecord]  # each after its parent


@dataclass(frozen=True, slots=True)
class FileRef:
    """What a reader needs to find and verify a file."""

    nbytes: int
    checksum: bytes
    generation: int = 0  # of a tail
    key: bytes | None = field(default=None, repr=False)  # of an encrypted file
    # as in the block's or tail's record; of a file that was just saved only
    parts: Mapping[str, int] = field(default_factory=dict)


# second names of files, by block and branch
Linked = dict[bytes | str, tuple[Path, FileRef]]


def written_in_last_hour(by_hour: Mapping[int, int], now: float) -> int:
    """Return the bytes that were written in the hour before `now`, given them by hour since 1970.

    They are this hour's, and of the one before the share that is less than an hour ago.
    """
    hour, into = int(now // 3600), now % 3600 / 3600
    return int(by_hour.get(hour, 0) + by_hour.get(hour - 1, 0) * (1 - into))
