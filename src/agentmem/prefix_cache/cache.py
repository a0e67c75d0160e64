"""PrefixCache: agents, their branches, and the tree of blocks that the branches share.

A branch is a path of sealed blocks plus a tail (an open block). Blocks are keyed by content, so
that branches, and agents of one namespace, hold one block together where their prefixes are the
same. Engine thread only, except where a method says otherwise.
"""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal
from weakref import WeakValueDictionary

import numpy as np

from ..agent_key import AgentKey
from ..errors import AgentNotFound
from ..kvcache.block import SealedBlock, Tail
from ..kvcache.spec import KVCacheSpec
from ..tensors import common_prefix, is_state, part_of
from .agent import Agent, Branch, agent_info
from .block_pool import BlockPool, CachedBlock, CachedTail, Entry
from .info import AgentInfo
from .lineage import FRESH, ROOT, block_key
from .match import Match, matched, preference
from .resume import Holder, drop_unneeded


class PrefixCache:
    """The registry of agents and of the radix tree of blocks.

    It knows what is in RAM and on disk; restore.py and write_back.py move it.
    """

    def __init__(
        self,
        *,
        fingerprint: bytes,
        spec: KVCacheSpec,
        sharing: Literal["namespace", "agent"],
        max_branches: int,
        running: Callable[[], Iterable[Holder]] = tuple,
    ):
        """Begin empty; `running`: what the sequences of the moment hold."""
        self._fingerprint = fingerprint
        self.spec = spec
        self._running = running
        self._stacks = frozenset(map(str, range(len(spec.stacks))))
        self._sharing = sharing
        self._max_branches = max_branches
        self.agents: dict[AgentKey, Agent] = {}
        # still without a branch
        self._newcomers: WeakValueDictionary[AgentKey, Agent] = WeakValueDictionary()
        self.blocks: dict[bytes, CachedBlock] = {}
        self._held: list[Match] = []  # that something waits for, other than a sequence
        self.pool = BlockPool()

    def scope(self, key: AgentKey) -> bytes:
        """Return what block keys of an agent begin from: who may share them, of which model."""
        owner = [key.namespace] if self._sharing == "namespace" else [*key]
        return self._fingerprint + repr(owner).encode()

    def agent(self, key: AgentKey) -> Agent:
        """Return the agent of that key; a new one is entered with its first branch."""
        now = time.time()
        agent = self.agents.get(key) or self._newcomers.get(key) or Agent(key, now, now)
        if key not in self.agents:
            self._newcomers[key] = agent
        return agent

    def enter(self, agent: Agent) -> Agent:
        """Note that an agent was used; return the one of its key, if that is another one by now."""
        agent = self.agents.setdefault(agent.key, agent)
        agent.last_used = time.time()
        return agent

    def known(self, key: AgentKey) -> Agent:
        """Return the agent of that key. Raises AgentNotFound."""
        agent = self.agents.get(key)
        if agent is None:
            raise AgentNotFound(key.agent_id)
        return agent

    def branches(self) -> Iterable[Branch]:
        """Return the branches of all agents."""
        return (b for a in self.agents.values() for b in a.branches.values())

    def match(self, key: AgentKey, tokens: Sequence[int]) -> Match:
        """Return the longest prefix of `tokens`, short of the last one, that is cached.

        It is looked for among the agent's branches, then among the blocks that it shares.
        """
        wanted = np.array(tokens[:-1], dtype=np.uint32)
        if self.spec.opaque is not None:
            return Match(self.spec)
        known = self.agents.get(key)
        found = (
            [self._match_branch(branch, wanted) for branch in known.branches.values()]
            if known
            else []
        )
        best = max(found, key=preference, default=Match(self.spec))
        shared = self._match_shared(self.scope(key), wanted)
        return shared if shared.length > best.length else best

    def prefix(self, branch: Branch, num_tokens: int) -> Match:
        """Return the branch's first tokens, or fewer, if a sequence can't go on from there."""
        return self._match_branch(branch, branch.tokens()[:num_tokens])

    def match_whole(self, branch: Branch, tokens: Sequence[int]) -> Match | None:
        """Return all of `tokens` but the last as a match of `branch`, if it still holds them."""
        wanted = np.array(tokens[:-1], dtype=np.uint32)
        if branch.agent.branches.get(branch.id) is not branch:
            return None
        match = self._match_branch(branch, wanted)
        return match if match.length == len(wanted) and match.extends else None

    def _match_branch(self, branch: Branch, wanted: np.ndarray) -> Match:
        return matched(
            self.spec, branch.blocks, branch.tail, common_prefix(branch.tokens(), wanted), branch
        )

    def _match_shared(self, scope: bytes, wanted: np.ndarray) -> Match:
        blocks: list[CachedBlock] = []
        parent = ROOT
        size = self.spec.block_size
        for start in range(0, len(wanted) - size + 1, size):
            block = self.blocks.get(block_key(scope, parent, wanted[start : start + size], FRESH))
            if block is None:
                break
            blocks.append(block)
            parent = block.key
        return matched(self.spec, blocks, None, len(blocks) * size, None)

    def new_branch(self, agent: Agent) -> Branch:
        """Return an empty branch, which its agent does not have yet."""
        return Branch(uuid.uuid4().hex, agent)

    def seal(
        self,
        *,
        scope: bytes,
        parent: bytes,
        tokens: Sequence[int],
        lineage: bytes,
        data: SealedBlock,
        ephemeral: bool = False,
    ) -> CachedBlock:
        """Return the entry of a block that just filled up, which nobody holds yet.

        It is the existing one of that key, or a new one. An existing block of which a stack is not
        in RAM can't be adopted without a read, so the new one gets a key of its own: a little space
        for never mixing two computations of one block.
        """
        array = np.array(tokens, dtype=np.uint32)
        key = block_key(scope, parent, array, lineage)
        found = self.blocks.get(key)
        if found is not None and (found.data is None or not self._stacks <= found.data.parts):
            key = block_key(scope, parent, array, lineage + uuid.uuid4().bytes)
            found = None
        if found is None:
            found = self.blocks[key] = CachedBlock(key, parent, array, discardable=ephemeral)
            self.pool.put(found, data)
        found.discardable = found.discardable and ephemeral
        return found

    def add_states(self, block: CachedBlock, sealed: SealedBlock) -> None:
        """Keep what `sealed`, a running sequence's own, has more of recurrent state."""
        had = block.data.arrays if block.data is not None else {}
        more = {
            name: a
            for name, a in sealed.arrays.items()
            if is_state(part_of(name)) and name not in had
        }
        if more:
            self.pool.add(block, more)

    @staticmethod
    def hold(blocks: Iterable[CachedBlock]) -> None:
        """Keep blocks until `release`."""
        now = time.time()
        for block in blocks:
            block.refs += 1
            block.last_used = now

    def hold_match(self, match: Match) -> None:
        """Keep a match's blocks, and what of them comes into RAM for it, until `release_match`."""
        self.hold(match.all_blocks)
        self._held.append(match)

    def held_entries(self) -> Iterator[Entry]:
        """Yield what matches hold that something waits for."""
        for match in self._held:
            yield from match.entries()

    def release_match(self, match: Match) -> None:
        """Let go of what `hold_match` kept."""
        self._held = [held for held in self._held if held is not match]
        self.drop_unneeded(match.all_blocks)
        self.release(match.all_blocks)

    def drop_unneeded(self, path: Sequence[CachedBlock]) -> None:
        """Let go of what nobody needs in RAM of the blocks of a path from the root."""
        drop_unneeded(self.spec, self.pool, path, self._holders())

    def _holders(self) -> Iterator[Holder]:
        """Yield the paths that somebody holds, and the position from which each goes on."""
        for branch in self.branches():
            yield branch.blocks, len(branch)
        for match in self._held:
            yield match.all_blocks, match.length
        yield from self._running()

    @staticmethod
    def touch(match: Match) -> None:
        """Note that what matched is used now."""
        for entry in match.entries():
            entry.last_used = time.time()

    def set_tail(self, branch: Branch, tail: CachedTail, data: Tail | None = None) -> None:
        """Replace the branch's tail; `data`: the new one's arrays."""
        self.pool.drop(branch.tail)
        branch.tail = tail
        tail.last_used = time.time()
        if data is not None:
            self.pool.put(tail, data)

    def release(self, blocks: Iterable[CachedBlock]) -> None:
        """Let go of blocks; one that nobody holds leaves RAM and the tree."""
        for block in blocks:
            block.refs -= 1
            if block.refs == 0:
                self.pool.drop(block)
                if self.blocks.get(block.key) is block:
                    del self.blocks[block.key]

    def put_branch(self, branch: Branch) -> list[Branch]:
        """Enter a branch that a sequence leaves, and drop what it displaces.

        Those are its own prefixes, which are then in `branch.displaced`, and the oldest, which are
        returned. The branch must already hold its blocks.
        """
        agent = branch.agent = self.enter(branch.agent)
        branch.last_used = agent.last_used
        agent.branches[branch.id] = branch
        mine = branch.tokens()
        gone = [
            b
            for b in agent.branches.values()
            if b is not branch
            and not b.in_use
            and len(b) <= len(mine)
            and common_prefix(b.tokens(), mine) == len(b)
        ]
        # it leaves after all side branches
        main = max(agent.branches.values(), key=lambda b: (len(b), b.last_used))
        idle = (b for b in agent.branches.values() if b not in gone and not b.in_use)
        others = sorted(idle, key=lambda b: (b is main, b.last_used))
        oldest = others[: max(0, len(others) - self._max_branches)]
        for old in gone:
            branch.displaced += [old.id, *old.displaced]
        for old in gone + oldest:
            self.drop_branch(old)
        return oldest

    def covering(self, branch: Branch, tokens: np.ndarray) -> Branch | None:
        """Return another branch of the agent that can be gone on from after `tokens`.

        There is one when a prompt was sent again.
        """
        known = self.agents.get(branch.agent.key)
        others = (b for b in known.branches.values() if b is not branch) if known else ()
        return next(
            (b for b in others if self._match_branch(b, tokens).length == len(tokens)), None
        )

    def drop_branch(self, branch: Branch) -> None:
        """Forget a branch, and let go of what it holds."""
        branch.agent.branches.pop(branch.id, None)
        # a read of the old one that is on its way finds no place
        self.set_tail(branch, CachedTail())
        self.drop_unneeded(branch.blocks)
        self.release(branch.blocks)

    def is_ephemeral(self, key: AgentKey) -> bool:
        """Tell whether there is such an agent, and it is never written to disk. On any thread."""
        agent = self.agents.get(key)
        return agent is not None and agent.ephemeral

    def drop_agent(self, agent: Agent) -> None:
        """Forget an agent and its branches."""
        self.agents.pop(agent.key, None)
        for branch in list(agent.branches.values()):
            self.drop_branch(branch)

    def cut_at(self, bad: CachedBlock) -> None:
        """End every branch that holds `bad`, which turned out unreadable, at what comes before."""
        for branch in self.branches():
            if bad in branch.blocks:
                index = branch.blocks.index(bad)
                self.release(branch.blocks[index:])
                branch.blocks = branch.blocks[:index]
                self.set_tail(branch, CachedTail())
        if self.blocks.get(bad.key) is bad:
            del self.blocks[bad.key]

    def lose(self, entry: Entry) -> None:
        """Forget an entry whose arrays are gone, and were never on disk."""
        if isinstance(entry, CachedBlock):
            self.cut_at(entry)
        for branch in self.branches():
            if branch.tail is entry:
                branch.tail = CachedTail()

    def branch_tokens(self, key: AgentKey) -> list[np.ndarray]:
        """Return the token ids of an agent's branches. On any thread.

        A branch that moves on meanwhile may give ids of before and after, which no one relies on.
        """
        agent = self.agents.get(key)
        return [branch.tokens() for branch in list(agent.branches.values())] if agent else []

    def infos(self, namespace: str) -> list[AgentInfo]:
        """Return a row for each agent of a namespace. On any thread."""
        return [
            agent_info(a, self.spec)
            for key, a in list(self.agents.items())
            if key.namespace == namespace
        ]
