"""Moves caches between RAM and disk: restore what a request matched, save what it sealed, evict what is idle."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

import numpy as np

from ..errors import CorruptSegment
from ..kvcache.block import SealedBlock, Snapshot, Tail, from_host, to_host
from ..kvcache.spec import KVCacheSpec
from ..store.agent_store import AgentStore
from .contexts import FRESH, ROOT, Agent, Branch, Contexts, Match, Node

_LINEAGE_POSITION = 4  # bytes at the end of a lineage: the token position of the cut


def cut_lineage(node: Node, num_tokens: int) -> bytes:
    """Lineage of the block that goes on from the first `num_tokens` of `node`."""
    return node.key + num_tokens.to_bytes(_LINEAGE_POSITION, "little")


class Memory:
    """Engine thread only; the store's futures come back through `post`, which runs a function on that thread."""

    def __init__(
        self,
        contexts: Contexts,
        store: AgentStore,
        spec: KVCacheSpec,
        *,
        kv_budget: int,
        tail_delay: float,
        post: Callable[[Callable[[], None]], None],
    ):
        self.contexts, self.store, self._spec = contexts, store, spec
        self._kv_budget, self._tail_delay, self._post = kv_budget, tail_delay, post
        self.restored_bytes = 0
        self.evicted_bytes = 0

    def load_index(self) -> None:
        """Enter what the store's manifest names: every agent warm."""
        index = self.store.index()
        records = {r.key: r for r in index.blocks}
        for a in index.agents:
            self.contexts.agents[a.namespace, a.name] = Agent(a.namespace, a.name, a.created, a.last_used)
        for b in index.branches:
            branch = Branch(b.id, self.contexts.agents[b.namespace, b.agent], last_used=b.last_used)
            key = b.head
            while key:
                record = records[key]
                node = self.contexts.nodes.get(key) or Node(
                    key, record.parent or ROOT, record.tokens, disk_bytes=record.nbytes
                )
                self.contexts.nodes[key] = node
                branch.nodes.append(node)
                key = record.parent
            branch.nodes.reverse()
            self.contexts.hold(branch.nodes)
            if b.tail is not None:
                branch.tail_tokens, branch.tail_disk_bytes = b.tail.tokens, b.tail.nbytes
            branch.agent.branches[branch.id] = branch

    # -- restore

    def missing(self, match: Match) -> bool:
        return any(n.data is None for n in self._wanted(match)) or self._tail_missing(match)

    def restore(self, match: Match, done: Callable[[int, bool], None]) -> None:
        """Read what `match` needs from disk, then call done(bytes read, whether all of it was good).

        A bad block or tail is quarantined and forgotten: the caller matches again.
        """
        nodes = [n for n in self._wanted(match) if n.data is None]
        reads: list[tuple[Node | Branch, Future[Any]]] = [(n, self.store.read_block(n.key)) for n in nodes]
        if self._tail_missing(match):
            assert match.source is not None
            reads.append((match.source, self.store.read_tail(match.source.id)))
        left = [len(reads)]

        def one_done(_: "Future[Any]") -> None:
            self._post(count_down)

        def count_down() -> None:
            left[0] -= 1
            if left[0] == 0:
                done(*self._take_in(reads))

        for _, future in reads:
            future.add_done_callback(one_done)

    def snapshot(self, match: Match) -> tuple[Snapshot, bytes]:
        """What the matched prefix looks like as a cache, all of it in RAM; and the lineage of its open block."""
        blocks = tuple(n.data for n in match.nodes if n.data is not None)
        assert len(blocks) == len(match.nodes)
        n = match.tail_len(self._spec.block_size)
        if n == 0:
            return Snapshot(blocks), FRESH
        if match.cut_node is not None:
            assert match.cut_node.data is not None
            tail = Tail.of_cut_block(match.cut_node.data, n, self._spec)
            return Snapshot(blocks, tail), cut_lineage(match.cut_node, n)
        assert match.source is not None and match.source.tail is not None
        lineage = match.source.lineage
        if lineage and n < match.source.tail.prefix_len:
            lineage = lineage[:-_LINEAGE_POSITION] + n.to_bytes(_LINEAGE_POSITION, "little")
        return Snapshot(blocks, match.source.tail.cut(n)), lineage

    def _wanted(self, match: Match) -> tuple[Node, ...]:
        return match.nodes + ((match.cut_node,) if match.cut_node else ())

    def _tail_missing(self, match: Match) -> bool:
        in_tail = match.tail_len(self._spec.block_size) > 0 and match.cut_node is None
        return in_tail and match.source is not None and match.source.tail is None

    def _take_in(self, reads: "list[tuple[Node | Branch, Future[Any]]]") -> tuple[int, bool]:
        nbytes, good = 0, True
        for target, future in reads:
            try:
                result = future.result()
            except CorruptSegment:
                good = False
                self._quarantine(target)
                continue
            if isinstance(target, Node):
                target.data = target.data or SealedBlock(from_host(result))
                nbytes += target.data.nbytes
            else:
                tensors, metadata = result
                target.lineage = bytes.fromhex(metadata["lineage"])
                arrays = from_host(tensors)
                target.tail = Tail.from_arrays(arrays, len(target.tail_tokens), int(metadata["prefix_len"]), self._spec)
                nbytes += target.tail.nbytes
        self.restored_bytes += nbytes
        return nbytes, good

    def _quarantine(self, target: Node | Branch) -> None:
        if isinstance(target, Node):
            self.store.quarantine_block(target.key)
            self.contexts.cut_at(target)
        else:
            self.store.quarantine_tail(target.id)
            self.contexts.drop_tail(target)

    # -- save

    def claim_branch(self, agent: Agent, match: Match) -> Branch:
        """The branch that a sequence will leave: the one it continues, else a new one that pins what it shares."""
        source = match.source
        if source is not None and match.extends and not source.in_use and source.id in agent.branches:
            source.in_use = True
            return source
        branch = self.contexts.new_branch(agent)
        branch.in_use = True
        if match.nodes:
            self.store.save_branch(branch.id, agent.namespace, agent.name, match.nodes[-1].key, time.time())
        return branch

    def save_block(self, branch: Branch, node: Node) -> None:
        """Queue one sealed block, unless it is on disk or on its way: then only the branch moves on."""
        agent = branch.agent
        if node.disk_bytes or (node.saving is not None and not _failed(node.saving)):
            self.store.save_branch(branch.id, agent.namespace, agent.name, node.key, time.time())
            return
        assert node.data is not None
        node.saving = self.store.save_block(
            branch.id,
            agent.namespace,
            agent.name,
            node.key,
            node.parent or None,
            node.tokens,
            to_host(node.data.arrays),
            {},
        )
        node.saving.add_done_callback(lambda f: self._post(lambda: self._block_saved(node, f)))

    def commit(
        self, branch: Branch, nodes: list[Node], tail: Tail | None, tail_tokens: list[int], lineage: bytes
    ) -> None:
        """A sequence ends: its branch takes over its nodes (already held) and its tail."""
        before, branch.nodes = branch.nodes, nodes
        self.contexts.release(before)
        branch.tail, branch.lineage = tail, lineage
        branch.tail_tokens = np.array(tail_tokens, dtype=np.uint32)
        branch.tail_disk_bytes, branch.tail_saving, branch.in_use = 0, None, False
        for node in nodes:
            if not node.disk_bytes and (node.saving is None or _failed(node.saving)):
                self.save_block(branch, node)
        for old in self.contexts.put_branch(branch):
            self.store.delete_branch(old.id)

    def abandon(self, branch: Branch) -> None:
        """A sequence ends with nothing to keep."""
        branch.in_use = False
        if branch.id not in branch.agent.branches:
            self.store.delete_branch(branch.id)

    def save_tail(self, branch: Branch) -> None:
        assert branch.tail is not None
        agent, tail = branch.agent, branch.tail
        head = branch.nodes[-1].key if branch.nodes else None
        metadata = {"lineage": branch.lineage.hex(), "prefix_len": str(tail.prefix_len)}
        tensors = to_host(tail.to_arrays())
        saving = self.store.save_tail(
            branch.id, agent.namespace, agent.name, head, branch.tail_tokens, tensors, metadata
        )
        branch.tail_saving = saving
        saving.add_done_callback(lambda f: self._post(lambda: self._tail_saved(branch, saving)))

    def save_tails(self, *, idle_for: float | None = None) -> float | None:
        """Save tails that rested for `idle_for` s (default: tail_delay). Returns the s until the next one is due."""
        now, delay = time.time(), self._tail_delay if idle_for is None else idle_for
        next_due = None
        for branch in self.contexts.branches():
            if not branch.tail_dirty or branch.in_use:
                continue
            wait = branch.last_used + delay - now
            if wait <= 0:
                self.save_tail(branch)
            else:
                next_due = wait if next_due is None else min(next_due, wait)
        return next_due

    def _block_saved(self, node: Node, future: "Future[Any]") -> None:
        if not _failed(future):
            node.disk_bytes, node.saving = future.result().nbytes, None

    def _tail_saved(self, branch: Branch, future: "Future[Any]") -> None:
        if branch.tail_saving is future:  # else the tail has changed meanwhile
            branch.tail_saving = None
            if not _failed(future):
                branch.tail_disk_bytes = future.result().nbytes
            else:
                branch.last_used = time.time()  # try again after another delay

    # -- RAM

    def ram_bytes(self) -> int:
        """Bytes of blocks and tails in RAM, each counted once."""
        nodes = sum(n.data.nbytes for n in self.contexts.nodes.values() if n.data is not None)
        return nodes + sum(b.tail.nbytes for b in self.contexts.branches() if b.tail is not None)

    def evict(self, in_use: Iterable[Node]) -> None:
        """Drop the least recently used blocks and tails from RAM until the budget holds; only what is on disk goes."""
        over = self.ram_bytes() - self._kv_budget
        if over <= 0:
            return
        busy = {id(n) for n in in_use}
        idle: list[tuple[float, Node | Branch, int]] = [
            (n.last_used, n, n.data.nbytes)
            for n in self.contexts.nodes.values()
            if n.data is not None and n.disk_bytes and id(n) not in busy
        ]
        idle += [
            (b.last_used, b, b.tail.nbytes) for b in self.contexts.branches() if b.tail is not None and not b.in_use
        ]
        for _, target, nbytes in sorted(idle, key=lambda item: item[0]):
            if over <= 0:
                return
            if isinstance(target, Node):
                target.data = None
            elif target.tail_disk_bytes:
                target.tail = None
            else:
                if target.tail_dirty:
                    self.save_tail(target)  # it goes once it is on disk
                continue
            over -= nbytes
            self.evicted_bytes += nbytes

    def delete_agent(self, namespace: str, name: str, done: "Future[bool]") -> None:
        """Forget the agent; `done` gets whether there was one, once its bytes are off the disk."""
        agent = self.contexts.agents.get((namespace, name))
        if agent is not None:
            self.contexts.drop_agent(agent)

        def deleted(stored: "Future[bool]") -> None:
            error = stored.exception()
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(stored.result() or agent is not None)

        self.store.delete_agent(namespace, name).add_done_callback(deleted)


def _failed(future: "Future[Any]") -> bool:
    return future.done() and (future.cancelled() or future.exception() is not None)
