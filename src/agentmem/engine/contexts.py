"""Agents, their branches, and the tree of blocks that the branches share: what is cached, and for whom.

A branch is a path of nodes (sealed blocks) plus a tail (an open block). Nodes are keyed by content, so that branches,
and agents of one namespace, hold one node together where their prefixes are the same. Engine thread only, except
`infos`.
"""

import hashlib
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal
from weakref import WeakValueDictionary

import numpy as np

from ..kvcache.block import SealedBlock, Tail
from ..store.records import AgentRecord
from .block_pool import FRESH, BlockPool, Entry, Node, OpenBlock
from .request import AgentInfo

ROOT = b""


def block_key(scope: bytes, parent: bytes, tokens: np.ndarray, lineage: bytes) -> bytes:
    """Content address of a block: 32 bytes over who may share it, what came before, its tokens, and how it came about.

    `scope` holds namespace (or agent) and the fingerprint of model, quantization and calibration. `lineage` is FRESH,
    or names the block and position at which this one was cut before it filled up again: its first tokens are codes
    where a fresh block of the same tokens saw full precision, so that the two must not stand in for each other.
    """
    digest = hashlib.blake2b(digest_size=32)
    for part in (scope, parent, lineage, np.ascontiguousarray(tokens, dtype="<u4").tobytes()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


@dataclass(eq=False)
class Branch:
    id: str
    agent: "Agent"
    nodes: list[Node] = field(default_factory=list)
    tail: OpenBlock = field(default_factory=OpenBlock)
    last_used: float = 0.0  # Unix seconds
    in_use: bool = False  # a sequence continues it
    suspended: bool = False  # that sequence waits for RAM: what is here may be saved and evicted
    disk_head: bytes | None = None  # last block of the branch's row in the store
    save_at: float | None = None  # time.monotonic() when what is not on disk is to be saved; None: all is
    tail_bytes_written: int = 0  # of all its tails, one after the other
    displaced: list[str] = field(default_factory=list)  # branches that leave the disk once all of this one is there

    def tokens(self) -> np.ndarray:
        return np.concatenate([*(n.tokens for n in self.nodes), self.tail.tokens])

    def whole(self) -> "Match":
        tail = self.tail if len(self.tail.tokens) else None
        return Match(tuple(self.nodes), len(self), self, tail=tail, extends=True)

    def __len__(self) -> int:
        return sum(len(n.tokens) for n in self.nodes) + len(self.tail.tokens)

    @property
    def head(self) -> bytes | None:
        return self.nodes[-1].key if self.nodes else None

    @property
    def is_hot(self) -> bool:
        return all(n.data is not None for n in self.nodes) and (self.tail.data is not None or not len(self.tail.tokens))


@dataclass(eq=False)
class Agent:
    namespace: str
    name: str
    created: float
    last_used: float
    branches: dict[str, Branch] = field(default_factory=dict)
    pinned: bool = False  # its caches stay in RAM and on disk
    ttl: float | None = None  # seconds that it is kept after its last use
    ephemeral: bool = False  # never written to disk
    requests: int = 0
    hit_tokens: int = 0  # of its prompts, that were cached
    noted_at: float = 0.0  # time.monotonic() when the store was last told of its use

    @property
    def newest(self) -> Branch | None:
        return max(list(self.branches.values()), key=lambda b: b.last_used, default=None)

    def record(self) -> AgentRecord:
        return AgentRecord(
            *(self.namespace, self.name, self.created, self.last_used),
            *(self.pinned, self.ttl, self.requests, self.hit_tokens),
        )

    def entries(self) -> Iterator[Entry]:
        for branch in self.branches.values():
            yield from branch.nodes
            yield branch.tail


@dataclass(frozen=True)
class Match:
    """The longest reusable prefix: whole nodes, then part of one more node or of a tail."""

    nodes: tuple[Node, ...] = ()
    length: int = 0
    source: Branch | None = None  # None: shared nodes only
    cut_node: Node | None = None  # a sealed block of which the first tokens are kept, as codes
    tail: OpenBlock | None = None  # of which the first tokens are kept
    extends: bool = False  # all of `source` is matched: the request continues it

    def open_len(self, block_size: int) -> int:
        """Matched tokens after the whole nodes."""
        return self.length - len(self.nodes) * block_size

    @property
    def all_nodes(self) -> tuple[Node, ...]:
        return self.nodes + ((self.cut_node,) if self.cut_node else ())

    def entries(self) -> Iterator[Entry]:
        yield from self.all_nodes
        if self.tail is not None:
            yield self.tail

    @property
    def missing(self) -> list[Entry]:
        """What has to be read from disk."""
        return [entry for entry in self.entries() if entry.data is None]


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def _preference(match: Match) -> tuple[int, bool, bool, str]:
    """Longest first; then, by what a restart does not change, what is whole before what must be cut."""
    assert match.source is not None
    return match.length, match.cut_node is None, match.extends, match.source.id


class Contexts:
    """The registry. It knows what is in RAM and on disk, not how it gets there: engine/memory.py moves it."""

    def __init__(
        self, *, fingerprint: bytes, block_size: int, sharing: Literal["namespace", "agent"], max_branches: int
    ):
        self._fingerprint, self.block_size = fingerprint, block_size
        self._sharing, self._max_branches = sharing, max_branches
        self.agents: dict[tuple[str, str], Agent] = {}
        self._newcomers: WeakValueDictionary[tuple[str, str], Agent] = WeakValueDictionary()  # still without a branch
        self.nodes: dict[bytes, Node] = {}
        self.pool = BlockPool()

    def scope(self, namespace: str, agent: str) -> bytes:
        owner = [namespace] if self._sharing == "namespace" else [namespace, agent]
        return self._fingerprint + repr(owner).encode()

    def agent(self, namespace: str, name: str) -> Agent:
        """The agent of that name; a new one is entered with its first branch."""
        now, key = time.time(), (namespace, name)
        agent = self.agents.get(key) or self._newcomers.get(key) or Agent(namespace, name, now, now)
        if key not in self.agents:
            self._newcomers[key] = agent
        return agent

    def branches(self) -> Iterable[Branch]:
        return (b for a in self.agents.values() for b in a.branches.values())

    def match(self, namespace: str, agent: str, tokens: Sequence[int]) -> Match:
        """The longest prefix of `tokens`, short of the last one, over the agent's branches, then over shared nodes."""
        wanted = np.array(tokens[:-1], dtype=np.uint32)
        known = self.agents.get((namespace, agent))
        found = [self._match_branch(branch, wanted) for branch in known.branches.values()] if known else []
        best = max(found, key=_preference, default=Match())
        shared = self._match_shared(self.scope(namespace, agent), wanted)
        return shared if shared.length > best.length else best

    def prefix(self, branch: Branch, num_tokens: int) -> Match:
        """The branch's first tokens."""
        return self._match_branch(branch, branch.tokens()[:num_tokens])

    def match_whole(self, branch: Branch, tokens: Sequence[int]) -> Match | None:
        """`branch`, if it still holds all of `tokens` but the last."""
        wanted = np.array(tokens[:-1], dtype=np.uint32)
        if branch.agent.branches.get(branch.id) is not branch:
            return None
        match = self._match_branch(branch, wanted)
        return match if match.length == len(wanted) and match.extends else None

    def _match_branch(self, branch: Branch, wanted: np.ndarray) -> Match:
        n = _common_prefix(branch.tokens(), wanted)
        whole = min(n // self.block_size, len(branch.nodes))
        inside = n > whole * self.block_size
        sealed = whole < len(branch.nodes)
        return Match(
            nodes=tuple(branch.nodes[:whole]),
            length=n,
            source=branch,
            cut_node=branch.nodes[whole] if inside and sealed else None,
            tail=branch.tail if inside and not sealed else None,
            extends=n == len(branch),
        )

    def _match_shared(self, scope: bytes, wanted: np.ndarray) -> Match:
        nodes: list[Node] = []
        parent = ROOT
        for start in range(0, len(wanted) - self.block_size + 1, self.block_size):
            node = self.nodes.get(block_key(scope, parent, wanted[start : start + self.block_size], FRESH))
            if node is None:
                break
            nodes.append(node)
            parent = node.key
        return Match(tuple(nodes), len(nodes) * self.block_size)

    def new_branch(self, agent: Agent) -> Branch:
        return Branch(uuid.uuid4().hex, agent)

    def seal(
        self,
        scope: bytes,
        parent: bytes,
        tokens: Sequence[int],
        lineage: bytes,
        data: SealedBlock,
        *,
        ephemeral: bool = False,
    ) -> Node:
        """The node of a block that just filled up: the existing one of that key, or a new one. Not held yet.

        An existing node whose bytes are only on disk can't be compared or adopted without a read, so the block gets a
        key of its own: a little space for never mixing two computations of one block.
        """
        array = np.array(tokens, dtype=np.uint32)
        key = block_key(scope, parent, array, lineage)
        found = self.nodes.get(key)
        if found is not None and found.data is None:
            key, found = block_key(scope, parent, array, lineage + uuid.uuid4().bytes), None
        if found is None:
            found = self.nodes[key] = Node(key, parent, array, expendable=ephemeral)
            self.pool.put(found, data)
        found.expendable = found.expendable and ephemeral
        return found

    @staticmethod
    def hold(nodes: Iterable[Node]) -> None:
        now = time.time()
        for node in nodes:
            node.refs += 1
            node.last_used = now

    @staticmethod
    def touch(match: Match) -> None:
        """Note that what matched is used now."""
        for entry in match.entries():
            entry.last_used = time.time()

    def set_tail(self, branch: Branch, tail: OpenBlock, data: Tail | None = None) -> None:
        """Replace the branch's tail; `data`: the new one's arrays."""
        self.pool.drop(branch.tail)
        branch.tail = tail
        tail.last_used = time.time()
        if data is not None:
            self.pool.put(tail, data)

    def release(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            node.refs -= 1
            if node.refs == 0:
                self.pool.drop(node)
                if self.nodes.get(node.key) is node:
                    del self.nodes[node.key]

    def put_branch(self, branch: Branch) -> list[Branch]:
        """Enter a branch that a sequence leaves, and drop what it displaces: its own prefixes, and the oldest.

        Returns the oldest; the prefixes are in `branch.displaced`. The branch must already hold its nodes.
        """
        agent = branch.agent
        agent = branch.agent = self.agents.setdefault((agent.namespace, agent.name), agent)
        branch.last_used = agent.last_used = time.time()
        agent.branches[branch.id] = branch
        mine = branch.tokens()
        gone = [
            b
            for b in agent.branches.values()
            if b is not branch and not b.in_use and len(b) <= len(mine) and _common_prefix(b.tokens(), mine) == len(b)
        ]
        others = sorted(
            (b for b in agent.branches.values() if b not in gone and not b.in_use), key=lambda b: b.last_used
        )
        oldest = others[: max(0, len(others) - self._max_branches)]
        for old in gone:
            branch.displaced += [old.id, *old.displaced]
        for old in gone + oldest:
            self.drop_branch(old)
        return oldest

    def covering(self, branch: Branch, tokens: np.ndarray) -> Branch | None:
        """Another branch of the agent that already holds all of `tokens`, such as after a prompt was sent again."""
        known = self.agents.get((branch.agent.namespace, branch.agent.name))
        others = (b for b in known.branches.values() if b is not branch) if known else ()
        return next((b for b in others if _common_prefix(b.tokens(), tokens) == len(tokens)), None)

    def drop_branch(self, branch: Branch) -> None:
        branch.agent.branches.pop(branch.id, None)
        self.set_tail(branch, OpenBlock())  # a read of the old one that is on its way finds no place
        self.release(branch.nodes)

    def drop_agent(self, agent: Agent) -> None:
        self.agents.pop((agent.namespace, agent.name), None)
        for branch in list(agent.branches.values()):
            self.drop_branch(branch)

    def cut_at(self, bad: Node) -> None:
        """A block turned out unreadable: every branch that holds it keeps what comes before."""
        for branch in self.branches():
            if bad in branch.nodes:
                index = branch.nodes.index(bad)
                self.release(branch.nodes[index:])
                branch.nodes = branch.nodes[:index]
                self.set_tail(branch, OpenBlock())
        if self.nodes.get(bad.key) is bad:
            del self.nodes[bad.key]

    def lose(self, entry: Entry) -> None:
        """Its arrays are gone, and were never on disk."""
        if isinstance(entry, Node):
            self.cut_at(entry)
        for branch in self.branches():
            if branch.tail is entry:
                branch.tail = OpenBlock()

    def infos(self, namespace: str) -> list[AgentInfo]:
        return [agent_info(a) for (owner, _), a in list(self.agents.items()) if owner == namespace]


def agent_info(agent: Agent) -> AgentInfo:
    branches = list(agent.branches.values())
    nodes = {n.key: n for b in branches for n in list(b.nodes)}.values()
    held = [data for data in (*(n.data for n in nodes), *(b.tail.data for b in branches)) if data is not None]
    return AgentInfo(
        agent_id=agent.name,
        tier="hot" if agent.newest and agent.newest.is_hot else "warm",
        tokens=max((len(b) for b in branches), default=0),
        branches=len(branches),
        ram_bytes=sum(data.nbytes for data in held),
        disk_bytes=sum(n.disk_bytes for n in nodes) + sum(b.tail.disk_bytes for b in branches),
        created=agent.created,
        last_used=agent.last_used,
        pinned=agent.pinned,
        ttl=agent.ttl,
        ephemeral=agent.ephemeral,
        requests=agent.requests,
        hit_tokens=agent.hit_tokens,
    )
