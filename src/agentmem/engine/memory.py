"""Moves caches between RAM and disk: restore what a request matched, save what it sealed and what rests."""

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any

import numpy as np

from ..errors import AgentMemError, CorruptSegment, NotFound, StoreFailed
from ..kvcache.block import RawArrays, SealedBlock, Snapshot, Tail, copy_host, from_raw, to_host
from ..kvcache.spec import KVCacheSpec
from ..store.agent_store import AgentStore
from ..store.records import BlockRecord, BranchRecord
from ..store.room import LeastRecentlyUsed
from ..store.trim import Trimmed
from .block_pool import FRESH, Entry, Node, OpenBlock
from .contexts import ROOT, Agent, Branch, Contexts, Match

_LINEAGE_POSITION = 4  # bytes at the end of a lineage: the token position of the cut
_RETRY = 1.0  # s after a save that was asked for, or failed
_RETRY_BROKEN = 5.0  # s, while the store can't write
_NOTE_INTERVAL = 5.0  # s between two notes of an agent's use
Arrived = Callable[[Entry, int, float], None]  # what, its bytes, when (time.perf_counter())
_SOONEST = 0.01  # s between two looks at what rests


def cut_lineage(node: Node, num_tokens: int) -> bytes:
    """Lineage of the block that goes on from the first `num_tokens` of `node`."""
    return node.key + num_tokens.to_bytes(_LINEAGE_POSITION, "little")


def foreign_lineage(prefix_len: int) -> bytes:
    """Lineage of an open block that came from outside: the block that it grows into never stands in for another."""
    return os.urandom(32) + prefix_len.to_bytes(_LINEAGE_POSITION, "little")


def tail_identity(head: bytes, tokens: np.ndarray) -> str:
    """Says which tail a file holds: a branch's file is replaced as the branch moves on."""
    return hashlib.blake2b(head + np.ascontiguousarray(tokens, "<u4").tobytes(), digest_size=16).hexdigest()


def _copy(future: "Future[Any]", entry: Entry) -> tuple[RawArrays, Mapping[str, str]] | BaseException:
    """What was read, as arrays, and a tail's metadata; or why not, to be raised on the engine thread."""
    try:
        tensors, metadata = (future.result(), {}) if isinstance(entry, Node) else future.result()
        return copy_host(tensors), metadata
    except BaseException as e:
        return e


class Memory:
    """Engine thread only; the store's futures come back through `post`, which runs a function on that thread."""

    def __init__(
        self,
        contexts: Contexts,
        store: AgentStore,
        spec: KVCacheSpec,
        *,
        tail_delay: float,
        write_amplification: float,
        post: Callable[[Callable[[], None]], None],
    ):
        self.contexts, self.store, self._spec = contexts, store, spec
        self._tail_delay, self._write_amplification, self.post = tail_delay, write_amplification, post
        store.on_trim = lambda gone: post(lambda: self.forget(gone))
        self.next_save = 0.0  # time.monotonic() when `save_idle` is due
        self.restored_bytes = 0  # since the start
        self.incoming_bytes = 0  # being read
        self._reads: dict[int, list[Arrived]] = {}  # by id of the entry: who waits for it
        self.reading_since = 0.0  # time.perf_counter(), while there are any

    def load_index(self) -> None:
        """Enter what the store's manifest names: every agent warm."""
        index = self.store.index()
        for a in index.agents:
            self.contexts.agents[a.namespace, a.name] = Agent(
                *(a.namespace, a.name, a.created, a.last_used), pinned=a.pinned, ttl=a.ttl,
                requests=a.requests, hit_tokens=a.hit_tokens,
            )  # fmt: skip
        self.enter(index.branches, index.blocks)

    def enter(self, branches: Iterable[BranchRecord], blocks: Iterable[BlockRecord]) -> None:
        """Add branches that are on disk, each to its agent; `blocks` are all that they are made of."""
        records = {r.key: r for r in blocks}
        for b in branches:
            agent = self.contexts.agent(b.namespace, b.agent)
            agent = self.contexts.agents.setdefault((b.namespace, b.agent), agent)
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

    def forget(self, gone: Trimmed) -> None:
        """A full store let go of what was not used for longest: it stays only where it is in RAM."""
        blocks, tails = set(gone.blocks), set(gone.tails)
        for node in [self.contexts.nodes[key] for key in blocks if key in self.contexts.nodes]:
            node.disk_bytes = 0
            if node.data is None:
                self.contexts.cut_at(node)
        for branch in list(self.contexts.branches()):
            if branch.id in tails:
                branch.tail.disk_bytes = 0
                if branch.tail.data is None:
                    self.contexts.set_tail(branch, OpenBlock())
            if branch.disk_head in blocks or branch.id in tails:
                branch.disk_head = None if branch.disk_head in blocks else branch.disk_head
                branch.save_at = branch.save_at or math.inf  # when it leaves RAM, not before
            if not len(branch) and not branch.in_use:
                self.contexts.drop_branch(branch)
        for agent in [a for a in self.contexts.agents.values() if not a.branches]:
            self.contexts.drop_agent(agent)

    # -- restore

    def restore(self, match: Match, done: Callable[[int, float], None], only: Entry | None = None) -> None:
        """Read what `match` lacks, then call done: the caller matches again, over what there is by then.

        `done` gets the bytes read and when the last were there (time.perf_counter()). The caller holds the match's
        nodes meanwhile. A bad block or tail is quarantined and forgotten. `only`: read no more than this.
        """
        wanted = match.missing if only is None else [only]
        left, read = list(wanted), [0]
        assert left

        def arrived(entry: Entry, nbytes: int, at: float) -> None:
            read[0] += nbytes
            left.remove(entry)
            if not left:
                done(read[0], at)

        if not self.incoming_bytes:
            self.reading_since = time.perf_counter()
        for entry in wanted:
            self._read(match, entry, arrived)

    def _read(self, match: Match, entry: Entry, arrived: Arrived) -> None:
        """Once, however many wait for it."""
        others = self._reads.setdefault(id(entry), [])
        others.append(arrived)
        if len(others) > 1:
            return
        nbytes = entry.disk_bytes
        self.incoming_bytes += nbytes

        def copied(future: "Future[Any]") -> None:
            """On the reader's thread, so that decode goes on."""
            result, at = _copy(future, entry), time.perf_counter()
            self.post(lambda: self._arrived(match, entry, nbytes, result, at))

        if isinstance(entry, Node):
            future: Future[Any] = self.store.read_block(entry.key)
        else:
            assert match.source is not None
            future = self.store.read_tail(match.source.id)
        future.add_done_callback(copied)

    def _arrived(self, match: Match, entry: Entry, nbytes: int, result: Any, at: float) -> None:
        self.incoming_bytes -= nbytes
        taken = self._take_in(match, entry, result)
        self.restored_bytes += taken
        for arrived in self._reads.pop(id(entry)):
            arrived(entry, taken, at)

    def snapshot(self, match: Match) -> tuple[Snapshot, bytes]:
        """What the matched prefix looks like as a cache, all of it in RAM; and the lineage of its open block."""
        blocks = tuple(n.data for n in match.nodes if n.data is not None)
        assert len(blocks) == len(match.nodes)
        tail, lineage = self.open_block(match)
        return Snapshot(blocks, tail), lineage

    def open_block(self, match: Match) -> tuple[Tail | None, bytes]:
        """What follows the matched whole blocks, and its lineage; what that is cut from is in RAM."""
        n = match.open_len(self._spec.block_size)
        if match.cut_node is not None:
            assert match.cut_node.data is not None
            return Tail.of_cut_block(match.cut_node.data, n, self._spec), cut_lineage(match.cut_node, n)
        if match.tail is None:
            return None, FRESH
        assert match.tail.data is not None
        lineage = match.tail.lineage
        if lineage and n < match.tail.data.prefix_len:
            lineage = lineage[:-_LINEAGE_POSITION] + n.to_bytes(_LINEAGE_POSITION, "little")
        return match.tail.data.cut(n), lineage

    def _take_in(self, match: Match, entry: Entry, result: Any) -> int:
        """Put what was read in its place, unless it is there, or the place is gone, by now; returns its bytes."""
        if entry.data is not None:
            return 0
        if isinstance(result, CorruptSegment):
            self._quarantine(match, entry)
            return 0
        if isinstance(result, BaseException):
            raise result
        raw, metadata = result
        data: SealedBlock | Tail
        if isinstance(entry, Node):
            data = SealedBlock(from_raw(raw))
        else:
            assert match.source is not None
            if match.source.tail is not entry:
                return 0
            head = match.nodes[-1].key if match.nodes else ROOT
            if metadata["identity"] != tail_identity(head, entry.tokens):
                self._quarantine(match, entry)
                return 0
            entry.lineage = bytes.fromhex(metadata["lineage"])
            data = Tail.from_arrays(from_raw(raw), len(entry.tokens), int(metadata["prefix_len"]), self._spec)
        self.contexts.pool.put(entry, data)
        entry.last_used = time.time()
        return data.nbytes

    def _quarantine(self, match: Match, entry: Entry) -> None:
        """Unless the block was sealed again, or the branch got another tail, while the read was on its way."""
        if isinstance(entry, Node):
            if self.contexts.nodes.get(entry.key) is entry:
                self.store.quarantine_block(entry.key)
                self.contexts.cut_at(entry)
        elif match.source is not None and match.source.tail is entry:
            self.store.quarantine_tail(match.source.id)
            self.contexts.set_tail(match.source, OpenBlock())

    # -- save

    def claim_branch(self, agent: Agent, match: Match, *, persist: bool) -> Branch:
        """The branch that a sequence will leave: the one it continues, else a new one that pins what it shares."""
        self._share(match.nodes, agent)
        source = match.source
        if source is not None and match.extends and not source.in_use and source.id in agent.branches:
            source.in_use = True
            return source
        branch = self.contexts.new_branch(agent)
        branch.in_use = True
        if match.nodes and persist:
            self._save_path(branch, list(match.nodes))
        return branch

    @staticmethod
    def _share(nodes: Iterable[Node], agent: Agent) -> None:
        """What an agent that is written uses is not expendable, whoever made it."""
        for node in nodes:
            node.expendable = node.expendable and agent.ephemeral

    def save_block(self, branch: Branch, nodes: list[Node]) -> None:
        """Queue the last of `nodes`, a branch's path so far; if it is stored already, only the branch moves on."""
        node, agent = nodes[-1], branch.agent
        if node.saving is not None or agent.ephemeral:
            return
        if node.disk_bytes or node.data is None:
            future = self.store.save_branch(branch.id, agent.namespace, agent.name, node.key, self._used(branch))
            future.add_done_callback(lambda f: self.post(lambda: self._path_saved(branch, nodes, f)))
            return
        tensors, parent = to_host(node.data.arrays), node.parent or None
        saving = node.saving = self.store.save_block(
            *(branch.id, agent.namespace, agent.name, node.key, parent, node.tokens, tensors, {}),
            last_used=self._used(branch),
        )
        saving.add_done_callback(lambda f: self.post(lambda: self._block_saved(branch, nodes, f)))

    def commit(self, branch: Branch, nodes: list[Node], tail: OpenBlock, data: Tail | None) -> None:
        """A sequence ends: its branch takes over its nodes (already held) and its tail."""
        before, branch.nodes = branch.nodes, nodes
        self.contexts.release(before)
        tail.expendable = branch.agent.ephemeral
        self.contexts.set_tail(branch, tail, data)
        branch.in_use = False
        branch.save_at = time.monotonic() + self._tail_delay
        self.next_save = min(self.next_save, branch.save_at)
        for old in self.contexts.put_branch(branch):
            self._delete(old.id, *old.displaced)

    def _delete(self, *branch_ids: str) -> None:
        for branch_id in branch_ids:
            self.store.delete_branch(branch_id)

    def abandon(self, branch: Branch) -> None:
        """A sequence ends with nothing to keep."""
        branch.in_use = False
        if branch.save_at is not None:
            self.next_save = min(self.next_save, branch.save_at)
        if branch.id not in branch.agent.branches:
            self.store.delete_branch(branch.id)

    def save_idle(self, *, now: bool = False) -> bool:
        """Save what rested for `tail_delay` s; `now`: all that is not on disk. Whether something is left to save."""
        clock = time.monotonic()
        self.next_save = math.inf
        for branch in list(self.contexts.branches()):
            if branch.save_at is None or (branch.in_use and not branch.suspended):
                continue
            if now or branch.save_at <= clock:
                self.save_rest(branch, forced=now)
            if branch.save_at is not None:
                self.next_save = min(self.next_save, max(branch.save_at, clock + _SOONEST))
        return self.next_save < math.inf

    def save_for_room(self, nbytes: int) -> None:
        """Save idle caches, the least recently used first, until at least `nbytes` of RAM can be given back."""
        idle = (b for b in self.contexts.branches() if b.save_at is not None and (b.suspended or not b.in_use))
        for branch in sorted(idle, key=lambda b: b.last_used):
            if nbytes <= 0:
                return
            self.save_rest(branch, forced=True)
            entries: list[Entry] = [*branch.nodes, branch.tail]
            nbytes -= sum(entry.data.nbytes for entry in entries if entry.data is not None)
            if branch.save_at is not None:
                self.next_save = min(self.next_save, branch.save_at)

    def save_rest(self, branch: Branch, *, forced: bool) -> None:
        """Queue a branch's unsaved blocks, root first, and its tail. Looked at again until all of it is on disk.

        Unless `forced`, a tail waits for its branch to leave RAM where writing it now is likely to be in vain.
        """
        blocks_saved = all(n.disk_bytes for n in branch.nodes) and branch.disk_head == branch.head
        tail_saved = branch.tail.data is None or branch.tail.disk_bytes > 0
        if branch.agent.ephemeral or (blocks_saved and tail_saved):
            branch.save_at = None
            self._delete(*branch.displaced)
            branch.displaced = []
            return
        branch.save_at = time.monotonic() + (_RETRY_BROKEN if self.store.background_error else _RETRY)
        self._save_path(branch, branch.nodes)
        if not tail_saved and branch.tail.saving is None:
            if forced or self._pays(branch):
                self.save_tail(branch)
            elif blocks_saved:
                branch.save_at = math.inf

    def _pays(self, branch: Branch) -> bool:
        """Whether the tails of a branch, each replaced by the next turn, stay a small part of what it writes.

        With blocks B, the tail t and earlier tails w, all of it written, (B + t + w) / (B + t) bytes are written for
        each that stays; once t is replaced too, (B + t + w) / B.
        """
        assert branch.tail.data is not None
        tail, stored = branch.tail.data.nbytes, sum(node.disk_bytes for node in branch.nodes)
        return branch.tail_bytes_written + tail <= (self._write_amplification - 1) * (stored + tail)

    def unsaved_tokens(self, branch: Branch) -> int:
        """What a crash would cost: blocks on disk count for a branch once its row there reaches them."""
        keys, reached = [node.key for node in branch.nodes], branch.disk_head
        while reached and reached not in keys:  # a running sequence has moved the row on
            node = self.contexts.nodes.get(reached)
            reached = node.parent if node else None
        there = keys.index(reached) + 1 if reached else 0
        entries: list[Entry] = [*branch.nodes[:there], *([branch.tail] if there == len(keys) else [])]
        return len(branch) - sum(len(entry.tokens) for entry in entries if entry.disk_bytes)

    def note(self, agent: Agent, branch: Branch | None = None, *, now: bool = False) -> "Future[None] | None":
        """Tell the store that the agent is used, every few seconds, or `now`; what comes of it, if it is told."""
        clock = time.monotonic()
        known = self.contexts.agents.get((agent.namespace, agent.name)) is agent and not agent.ephemeral
        if not known or (not now and clock - agent.noted_at < _NOTE_INTERVAL):
            return None
        agent.noted_at = clock
        return self.store.touch(agent.record(), branch.id if branch else None)

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
        branch.tail_bytes_written += tail.data.nbytes
        tail.saving = self.store.save_tail(
            *(branch.id, agent.namespace, agent.name, branch.head, tail.tokens, tensors, metadata),
            last_used=self._used(branch),
        )
        nodes = branch.nodes
        tail.saving.add_done_callback(lambda f: self.post(lambda: self._tail_saved(branch, nodes, tail, f)))

    @staticmethod
    def _used(branch: Branch) -> float:
        """Unix seconds: a full store keeps what was used last."""
        return time.time() if branch.in_use and not branch.suspended else branch.last_used

    def _block_saved(self, branch: Branch, nodes: list[Node], future: "Future[Any]") -> None:
        nodes[-1].saving = None
        if future.exception() is None:
            nodes[-1].disk_bytes = future.result().nbytes
        self._left_out(branch, nodes[-1], future)
        self._path_saved(branch, nodes, future)

    def _tail_saved(self, branch: Branch, nodes: list[Node], tail: OpenBlock, future: "Future[Any]") -> None:
        tail.saving = None
        if future.exception() is None:
            tail.disk_bytes = future.result().nbytes
        self._left_out(branch, tail, future)
        self._path_saved(branch, nodes, future)

    @staticmethod
    def _left_out(branch: Branch, entry: Entry, future: "Future[Any]") -> None:
        """A full store has no room for what was used longest ago: it stays while RAM lasts."""
        if isinstance(future.exception(), LeastRecentlyUsed):
            entries: list[Entry] = [entry, *branch.nodes, branch.tail]
            for unsaved in [e for e in entries if not e.disk_bytes]:
                unsaved.expendable = True
            if not branch.in_use or branch.suspended:
                branch.save_at = None

    def _path_saved(self, branch: Branch, nodes: list[Node], future: "Future[Any]") -> None:
        if future.exception() is None:
            branch.disk_head = nodes[-1].key if nodes else None
        elif isinstance(future.exception(), NotFound):
            # part of the path was deleted with another agent: save it again, when the branch's turn comes
            for node in nodes:
                if node.data is not None:
                    node.disk_bytes = 0

    def delete_agent(self, namespace: str, name: str, done: "Future[bool]") -> None:
        """Forget the agent; `done` gets whether there was one, once its bytes are off the disk."""
        agent = self.contexts.agents.get((namespace, name))
        if agent is not None:
            nodes = [n for b in agent.branches.values() for n in b.nodes]
            self.contexts.drop_agent(agent)
            kept = {id(n) for b in self.contexts.branches() if not b.agent.ephemeral for n in b.nodes}
            unwritten = {id(n) for b in self.contexts.branches() if b.agent.ephemeral for n in b.nodes}
            for node in nodes:  # what only a running sequence or an ephemeral agent still holds goes from disk
                if id(node) not in kept:
                    node.disk_bytes, node.expendable = 0, node.expendable or id(node) in unwritten
                    if node.data is None and id(node) in unwritten:
                        self.contexts.lose(node)

        def deleted(stored: "Future[bool]") -> None:
            error = stored.exception()
            if error is not None:
                failed = StoreFailed(f"The agent's bytes may still be on disk: {error}; delete it again")
                done.set_exception(error if isinstance(error, AgentMemError) else failed)
            else:
                done.set_result(stored.result() or agent is not None)

        self.store.delete_agent(namespace, name).add_done_callback(deleted)
