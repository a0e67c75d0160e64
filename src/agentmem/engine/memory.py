"""Moves caches between RAM and disk: restore what a request matched, save what it sealed, evict what is idle."""

import hashlib
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

import numpy as np

from ..errors import CorruptSegment, NotFound
from ..kvcache.block import SealedBlock, Snapshot, Tail, from_host, to_host
from ..kvcache.spec import KVCacheSpec
from ..store.agent_store import AgentStore
from .contexts import FRESH, ROOT, Agent, Branch, Contexts, Match, Node, OpenBlock

_LINEAGE_POSITION = 4  # bytes at the end of a lineage: the token position of the cut
_RETRY = 1.0  # s after a save that failed


def cut_lineage(node: Node, num_tokens: int) -> bytes:
    """Lineage of the block that goes on from the first `num_tokens` of `node`."""
    return node.key + num_tokens.to_bytes(_LINEAGE_POSITION, "little")


def tail_identity(head: bytes, tokens: np.ndarray) -> str:
    """Says which tail a file holds: a branch's file is replaced as the branch moves on."""
    return hashlib.blake2b(head + np.ascontiguousarray(tokens, "<u4").tobytes(), digest_size=16).hexdigest()


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
        self.restored_bytes = self.evicted_bytes = 0  # since the start

    def load_index(self) -> None:
        """Enter what the store's manifest names: every agent warm."""
        index = self.store.index()
        records = {r.key: r for r in index.blocks}
        for a in index.agents:
            self.contexts.agents[a.namespace, a.name] = Agent(a.namespace, a.name, a.created, a.last_used)
        for b in index.branches:
            agent = self.contexts.agents[b.namespace, b.agent]
            branch = Branch(b.id, agent, last_used=b.last_used, disk_head=b.head)
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
                branch.tail = OpenBlock(b.tail.tokens, disk_bytes=b.tail.nbytes)
            branch.agent.branches[branch.id] = branch

    # -- restore

    def missing(self, match: Match) -> bool:
        """Whether part of the match has to be read from disk."""
        return any(n.data is None for n in match.all_nodes) or (match.tail is not None and match.tail.data is None)

    def restore(self, match: Match, done: Callable[[int], None]) -> None:
        """Read what `match` lacks, then call done(bytes read): the caller matches again, over what there is by then.

        A bad block or tail is quarantined and forgotten.
        """
        reads: list[tuple[Node | OpenBlock, Future[Any]]] = [
            (n, self.store.read_block(n.key)) for n in match.all_nodes if n.data is None
        ]
        if match.tail is not None and match.tail.data is None:
            assert match.source is not None
            reads.append((match.tail, self.store.read_tail(match.source.id)))
        left = [len(reads)]

        def count_down() -> None:
            left[0] -= 1
            if left[0] == 0:
                nbytes = sum(self._take_in(match, target, future) for target, future in reads)
                self.restored_bytes += nbytes
                done(nbytes)

        for _, future in reads:
            future.add_done_callback(lambda _: self._post(count_down))

    def snapshot(self, match: Match) -> tuple[Snapshot, bytes]:
        """What the matched prefix looks like as a cache, all of it in RAM; and the lineage of its open block."""
        blocks = tuple(n.data for n in match.nodes if n.data is not None)
        assert len(blocks) == len(match.nodes)
        n = match.open_len(self._spec.block_size)
        if match.cut_node is not None:
            assert match.cut_node.data is not None
            tail = Tail.of_cut_block(match.cut_node.data, n, self._spec)
            return Snapshot(blocks, tail), cut_lineage(match.cut_node, n)
        if match.tail is None:
            return Snapshot(blocks), FRESH
        assert match.tail.data is not None
        lineage = match.tail.lineage
        if lineage and n < match.tail.data.prefix_len:
            lineage = lineage[:-_LINEAGE_POSITION] + n.to_bytes(_LINEAGE_POSITION, "little")
        return Snapshot(blocks, match.tail.data.cut(n)), lineage

    def _take_in(self, match: Match, target: Node | OpenBlock, future: "Future[Any]") -> int:
        """Put what was read in its place, unless another request did so meanwhile; returns its bytes."""
        if target.data is not None:
            return 0
        try:
            result = future.result()
        except CorruptSegment:
            self._quarantine(match, target)
            return 0
        if isinstance(target, Node):
            target.data = SealedBlock(from_host(result))
            return target.data.nbytes
        tensors, metadata = result
        head = match.nodes[-1].key if match.nodes else ROOT
        if metadata["identity"] != tail_identity(head, target.tokens):
            self._quarantine(match, target)
            return 0
        target.lineage = bytes.fromhex(metadata["lineage"])
        arrays = from_host(tensors)
        target.data = Tail.from_arrays(arrays, len(target.tokens), int(metadata["prefix_len"]), self._spec)
        return target.data.nbytes

    def _quarantine(self, match: Match, target: Node | OpenBlock) -> None:
        """Unless the block was sealed again, or the branch got another tail, while the read was on its way."""
        if isinstance(target, Node):
            if self.contexts.nodes.get(target.key) is target:
                self.store.quarantine_block(target.key)
                self.contexts.cut_at(target)
        elif match.source is not None and match.source.tail is target:
            self.store.quarantine_tail(match.source.id)
            match.source.tail = OpenBlock()

    # -- save

    def claim_branch(self, agent: Agent, match: Match, *, persist: bool) -> Branch:
        """The branch that a sequence will leave: the one it continues, else a new one that pins what it shares."""
        source = match.source
        if source is not None and match.extends and not source.in_use and source.id in agent.branches:
            source.in_use = True
            return source
        branch = self.contexts.new_branch(agent)
        branch.in_use = True
        if match.nodes and persist:
            self._save_path(branch, list(match.nodes))
        return branch

    def save_block(self, branch: Branch, nodes: list[Node]) -> None:
        """Queue the last of `nodes`, a branch's path so far; if it is stored already, only the branch moves on."""
        node, agent = nodes[-1], branch.agent
        if node.saving is not None:
            return
        if node.disk_bytes or node.data is None:
            future = self.store.save_branch(branch.id, agent.namespace, agent.name, node.key, time.time())
            future.add_done_callback(lambda f: self._post(lambda: self._path_saved(branch, nodes, f)))
            return
        tensors, parent = to_host(node.data.arrays), node.parent or None
        saving = node.saving = self.store.save_block(
            branch.id, agent.namespace, agent.name, node.key, parent, node.tokens, tensors, {}
        )
        saving.add_done_callback(lambda f: self._post(lambda: self._block_saved(branch, nodes, f)))

    def commit(self, branch: Branch, nodes: list[Node], tail: OpenBlock) -> None:
        """A sequence ends: its branch takes over its nodes (already held) and its tail."""
        before, branch.nodes = branch.nodes, nodes
        self.contexts.release(before)
        branch.tail, branch.in_use = tail, False
        branch.save_at = time.monotonic() + self._tail_delay
        for old in self.contexts.put_branch(branch):
            self.store.delete_branch(old.id)

    def abandon(self, branch: Branch) -> None:
        """A sequence ends with nothing to keep."""
        branch.in_use = False
        if branch.id not in branch.agent.branches:
            self.store.delete_branch(branch.id)

    def save_idle(self, *, now: bool = False) -> float | None:
        """Save what rested for `tail_delay` s; `now`: all that is not on disk. Returns the s until the next is due."""
        clock = time.monotonic()
        waits = []
        for branch in list(self.contexts.branches()):
            if branch.save_at is None or branch.in_use:
                continue
            if now or branch.save_at <= clock:
                self._save_rest(branch)
            if branch.save_at is not None:
                waits.append(max(0.0, branch.save_at - clock))
        return min(waits, default=None)

    def _save_rest(self, branch: Branch) -> None:
        """Queue a branch's unsaved blocks, root first, and its tail. Looked at again until all of it is on disk."""
        blocks_saved = all(n.disk_bytes for n in branch.nodes) and branch.disk_head == branch.head
        if blocks_saved and (branch.tail.data is None or branch.tail.disk_bytes):
            branch.save_at = None
            return
        branch.save_at = time.monotonic() + _RETRY
        self._save_path(branch, branch.nodes)
        if branch.tail.data is not None and not branch.tail.disk_bytes and branch.tail.saving is None:
            self.save_tail(branch)

    def _save_path(self, branch: Branch, nodes: list[Node]) -> None:
        for i, node in enumerate(nodes, start=1):
            if not node.disk_bytes or i == len(nodes):
                self.save_block(branch, nodes[:i])

    def save_tail(self, branch: Branch) -> None:
        tail, agent = branch.tail, branch.agent
        assert tail.data is not None
        metadata = {
            "lineage": tail.lineage.hex(),
            "prefix_len": str(tail.data.prefix_len),
            "identity": tail_identity(branch.head or ROOT, tail.tokens),
        }
        tensors = to_host(tail.data.to_arrays())
        tail.saving = self.store.save_tail(
            branch.id, agent.namespace, agent.name, branch.head, tail.tokens, tensors, metadata
        )
        nodes = branch.nodes
        tail.saving.add_done_callback(lambda f: self._post(lambda: self._tail_saved(branch, nodes, tail, f)))

    def _block_saved(self, branch: Branch, nodes: list[Node], future: "Future[Any]") -> None:
        nodes[-1].saving = None
        if future.exception() is None:
            nodes[-1].disk_bytes = future.result().nbytes
        self._path_saved(branch, nodes, future)

    def _tail_saved(self, branch: Branch, nodes: list[Node], tail: OpenBlock, future: "Future[Any]") -> None:
        tail.saving = None
        if future.exception() is None:
            tail.disk_bytes = future.result().nbytes
        self._path_saved(branch, nodes, future)

    def _path_saved(self, branch: Branch, nodes: list[Node], future: "Future[Any]") -> None:
        if future.exception() is None:
            branch.disk_head = nodes[-1].key if nodes else None
        elif isinstance(future.exception(), NotFound):
            # part of the path was deleted with another agent: save it again, when the branch's turn comes
            for node in nodes:
                if node.data is not None:
                    node.disk_bytes = 0

    # -- RAM

    def ram_bytes(self) -> int:
        """Bytes of blocks and tails in RAM, each counted once."""
        nodes = sum(n.data.nbytes for n in self.contexts.nodes.values() if n.data is not None)
        return nodes + sum(b.tail.data.nbytes for b in self.contexts.branches() if b.tail.data is not None)

    def evict(self, in_use: Iterable[Node | OpenBlock]) -> int:
        """Drop the least recently used blocks and tails from RAM until the budget holds; only what is on disk goes.

        Returns the bytes that stay.
        """
        left = self.ram_bytes()
        if left <= self._kv_budget:
            return left
        busy = {id(target) for target in in_use}
        idle: list[tuple[float, Node | OpenBlock]] = [(n.last_used, n) for n in self.contexts.nodes.values()]
        for branch in self.contexts.branches():
            if branch.tail.data is not None and not branch.tail.disk_bytes and not branch.in_use:
                self._save_rest(branch)  # it can go once it is on disk
            idle.append((branch.last_used, branch.tail))
        for _, target in sorted(idle, key=lambda item: item[0]):
            if left <= self._kv_budget:
                break
            if target.data is not None and target.disk_bytes and id(target) not in busy:
                left -= target.data.nbytes
                self.evicted_bytes += target.data.nbytes
                target.data = None
        return left

    def delete_agent(self, namespace: str, name: str, done: "Future[bool]") -> None:
        """Forget the agent; `done` gets whether there was one, once its bytes are off the disk."""
        agent = self.contexts.agents.get((namespace, name))
        if agent is not None:
            nodes = [n for b in agent.branches.values() for n in b.nodes]
            self.contexts.drop_agent(agent)
            kept = {id(n) for b in self.contexts.branches() for n in b.nodes}
            for node in nodes:  # what only a running sequence still holds goes from disk
                if id(node) not in kept:
                    node.disk_bytes = 0

        def deleted(stored: "Future[bool]") -> None:
            error = stored.exception()
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(stored.result() or agent is not None)

        self.store.delete_agent(namespace, name).add_done_callback(deleted)
