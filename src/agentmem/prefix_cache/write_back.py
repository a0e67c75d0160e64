"""WriteBack: brings what sequences seal, and what rests, to disk."""

import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from ..agent_key import AgentKey
from ..errors import NotFound
from ..kvcache.block import Tail, to_host
from ..store.agent_store import AgentStore
from ..store.records import BlockToSave, BranchHead, TailToSave
from ..store.upkeep.quota import LeastRecentlyUsed
from .agent import Agent, Branch, agent_info
from .block_pool import CachedBlock, CachedTail, Entry
from .cache import PrefixCache
from .info import AgentDetail, BranchInfo
from .lineage import tail_metadata
from .match import Match

_RETRY = 1.0  # s after a save that was asked for, or failed
_RETRY_BROKEN = 5.0  # s, while the store can't write
_NOTE_INTERVAL = 5.0  # s between two notes of an agent's use
_SOONEST = 0.01  # s between two looks at what rests


class WriteBack:
    """Queues what is to be written, and notes what was. Engine thread only.

    The store's futures come back through `post`, which runs a function on that thread.
    """

    def __init__(
        self,
        prefix_cache: PrefixCache,
        store: AgentStore,
        *,
        tail_delay: float,
        write_amplification: float,
        post: Callable[[Callable[[], None]], None],
    ):
        self._prefix_cache = prefix_cache
        self._store = store
        self._post = post
        self._tail_delay = tail_delay
        self._write_amplification = write_amplification
        self.next_save = 0.0  # time.monotonic() when `save_idle` is due

    def claim_branch(self, agent: Agent, match: Match, *, persist: bool) -> Branch:
        """Return the branch that a sequence will leave.

        It is the one that the sequence continues, else a new one that pins what it shares.
        """
        self._share(match.blocks, agent)
        source = match.source
        if (
            source is not None
            and match.extends
            and not source.in_use
            and source.id in agent.branches
        ):
            source.in_use = True
            return source
        branch = self._prefix_cache.new_branch(agent)
        branch.in_use = True
        if match.blocks and persist:
            self._save_path(branch, list(match.blocks))
        return branch

    @staticmethod
    def _share(blocks: Iterable[CachedBlock], agent: Agent) -> None:
        """Let what an agent that is written uses be written too, whoever made it."""
        for block in blocks:
            block.discardable = block.discardable and agent.ephemeral

    def save_block(self, branch: Branch, blocks: list[CachedBlock]) -> None:
        """Queue the last of `blocks`, a branch's path so far.

        If it is stored already, only the branch moves on.
        """
        block = blocks[-1]
        agent = branch.agent
        if block.saving is not None or agent.ephemeral:
            return
        if block.disk_bytes or block.data is None:
            future = self._store.save_branch(
                BranchHead(
                    branch_id=branch.id,
                    agent=agent.key,
                    head=block.key,
                    last_used=self._used(branch),
                )
            )
            future.add_done_callback(
                lambda f: self._post(lambda: self._path_saved(branch, blocks, f))
            )
            return
        to_save = BlockToSave(
            branch_id=branch.id,
            agent=agent.key,
            key=block.key,
            parent=block.parent or None,
            tokens=block.tokens,
            tensors=to_host(block.data.arrays),
            last_used=self._used(branch),
        )
        saving = block.saving = self._store.save_block(to_save)
        saving.add_done_callback(lambda f: self._post(lambda: self._block_saved(branch, blocks, f)))

    def commit(
        self, branch: Branch, blocks: list[CachedBlock], tail: CachedTail, data: Tail | None
    ) -> None:
        """End a sequence: its branch takes over its blocks (already held) and its tail."""
        before = branch.blocks
        branch.blocks = blocks
        self._prefix_cache.release(before)
        tail.discardable = branch.agent.ephemeral
        self._prefix_cache.set_tail(branch, tail, data)
        branch.in_use = False
        branch.save_at = time.monotonic() + self._tail_delay
        self.next_save = min(self.next_save, branch.save_at)
        self.enter(branch)
        self._prefix_cache.drop_unneeded(blocks)

    def enter(self, branch: Branch) -> None:
        """Enter a branch among its agent's; those that are too many by now go from disk, too."""
        for old in self._prefix_cache.put_branch(branch):
            self._delete(old.id, *old.displaced)

    def _delete(self, *branch_ids: str) -> None:
        """Delete branches from disk."""
        for branch_id in branch_ids:
            self._store.delete_branch(branch_id)

    def abandon(self, branch: Branch) -> None:
        """End a sequence with nothing to keep."""
        branch.in_use = False
        if branch.save_at is not None:
            self.next_save = min(self.next_save, branch.save_at)
        if branch.id not in branch.agent.branches:
            self._store.delete_branch(branch.id)

    def save_idle(self, *, now: bool = False) -> bool:
        """Save what rested for `tail_delay` s; `now`: all that is not on disk.

        Returns whether something is left to save.
        """
        clock = time.monotonic()
        self.next_save = math.inf
        for branch in list(self._prefix_cache.branches()):
            if branch.save_at is None or (branch.in_use and not branch.preempted):
                continue
            if now or branch.save_at <= clock:
                self.save_rest(branch, forced=now)
            if branch.save_at is not None:
                self.next_save = min(self.next_save, max(branch.save_at, clock + _SOONEST))
        return self.next_save < math.inf

    def save_for_room(self, nbytes: int) -> None:
        """Save idle caches until at least `nbytes` of RAM can be given back.

        The least recently used go first.
        """
        idle = (
            b
            for b in self._prefix_cache.branches()
            if b.save_at is not None and (b.preempted or not b.in_use)
        )
        for branch in sorted(idle, key=lambda b: b.last_used):
            if nbytes <= 0:
                return
            self.save_rest(branch, forced=True)
            entries: list[Entry] = [*branch.blocks, branch.tail]
            nbytes -= sum(entry.data.nbytes for entry in entries if entry.data is not None)
            if branch.save_at is not None:
                self.next_save = min(self.next_save, branch.save_at)

    def save_rest(self, branch: Branch, *, forced: bool) -> None:
        """Queue a branch's unsaved blocks, root first, and its tail.

        It is looked at again until all of it is on disk. Unless `forced`, a tail waits for its
        branch to leave RAM where writing it now is likely to be in vain.
        """
        blocks_saved = all(n.disk_bytes for n in branch.blocks) and branch.disk_head == branch.head
        tail_saved = branch.tail.data is None or branch.tail.disk_bytes > 0
        if branch.agent.ephemeral or (blocks_saved and tail_saved):
            branch.save_at = None
            self._delete(*branch.displaced)
            branch.displaced = []
            return
        branch.save_at = time.monotonic() + (
            _RETRY_BROKEN if self._store.background_error else _RETRY
        )
        self._save_path(branch, branch.blocks)
        if not tail_saved and branch.tail.saving is None:
            if forced or self._pays(branch):
                self.save_tail(branch)
            elif blocks_saved:
                branch.save_at = math.inf

    def _pays(self, branch: Branch) -> bool:
        """Tell whether a branch's tails stay a small part of what it writes.

        Each tail is replaced by that of the next turn. With blocks B, the tail t and earlier tails
        w, all of it written, (B + t + w) / (B + t) bytes are written for each that stays; once t is
        replaced too, (B + t + w) / B.
        """
        assert branch.tail.data is not None
        tail = branch.tail.data.nbytes
        stored = sum(block.disk_bytes for block in branch.blocks)
        return branch.tail_bytes_written + tail <= (self._write_amplification - 1) * (stored + tail)

    def save_agent(self, agent: Agent) -> Future[None]:
        """Queue all that rests of an agent; the future ends once the disk has been asked for it."""
        for branch in agent.branches.values():
            if not branch.in_use or branch.preempted:
                self.save_rest(branch, forced=True)
        return self._store.flush()

    def detail(self, key: AgentKey) -> AgentDetail:
        """Return what is told of an agent and its branches. Raises AgentNotFound."""
        agent = self._prefix_cache.known(key)
        spec = self._prefix_cache.spec
        rows = [
            BranchInfo(
                tokens=len(branch),
                tier=branch.tier(spec),
                last_used=branch.last_used,
                unsaved_tokens=self.unsaved_tokens(branch),
            )
            for branch in sorted(agent.branches.values(), key=lambda b: -b.last_used)
        ]
        return AgentDetail(agent_info(agent, spec), rows)

    def unsaved_tokens(self, branch: Branch) -> int:
        """Return how many tokens a crash would cost.

        Blocks on disk count for a branch once its row there reaches them.
        """
        keys = [block.key for block in branch.blocks]
        reached = branch.disk_head
        while reached and reached not in keys:  # a running sequence has moved the row on
            block = self._prefix_cache.blocks.get(reached)
            reached = block.parent if block else None
        there = keys.index(reached) + 1 if reached else 0
        entries: list[Entry] = [
            *branch.blocks[:there],
            *([branch.tail] if there == len(keys) else []),
        ]
        return len(branch) - sum(len(entry.tokens) for entry in entries if entry.disk_bytes)

    def note(
        self, agent: Agent, branch: Branch | None = None, *, now: bool = False
    ) -> "Future[None] | None":
        """Tell the store that an agent is used, every few seconds, or `now`.

        Returns what comes of it, if it is told.
        """
        clock = time.monotonic()
        known = self._prefix_cache.agents.get(agent.key) is agent and not agent.ephemeral
        if not known or (not now and clock - agent.noted_at < _NOTE_INTERVAL):
            return None
        agent.noted_at = clock
        return self._store.touch(agent.record(), branch.id if branch else None)

    def _save_path(self, branch: Branch, blocks: list[CachedBlock]) -> None:
        """Queue what of a path is not on disk, and its end, which moves the branch on."""
        for i, block in enumerate(blocks, start=1):
            if not block.disk_bytes or i == len(blocks):
                self.save_block(branch, blocks[:i])

    def save_tail(self, branch: Branch) -> None:
        """Queue a branch's tail."""
        tail = branch.tail
        agent = branch.agent
        assert tail.data is not None
        to_save = TailToSave(
            branch_id=branch.id,
            agent=agent.key,
            head=branch.head,
            tokens=tail.tokens,
            tensors=to_host(tail.data.to_arrays()),
            metadata=tail_metadata(branch.head, tail.tokens, tail.lineage, tail.data.prefix_len),
            last_used=self._used(branch),
        )
        branch.tail_bytes_written += tail.data.nbytes
        tail.saving = self._store.save_tail(to_save)
        blocks = branch.blocks
        tail.saving.add_done_callback(
            lambda f: self._post(lambda: self._tail_saved(branch, blocks, tail, f))
        )

    @staticmethod
    def _used(branch: Branch) -> float:
        """Return when a branch was used, in Unix seconds: a full store keeps what was used last."""
        return time.time() if branch.in_use and not branch.preempted else branch.last_used

    def _block_saved(
        self, branch: Branch, blocks: list[CachedBlock], future: "Future[Any]"
    ) -> None:
        """Note what came of saving the last of `blocks`."""
        blocks[-1].saving = None
        if future.exception() is None:
            blocks[-1].saved(future.result())
        self._left_out(branch, blocks[-1], future)
        self._path_saved(branch, blocks, future)
        self._prefix_cache.drop_unneeded(blocks)

    def _tail_saved(
        self, branch: Branch, blocks: list[CachedBlock], tail: CachedTail, future: "Future[Any]"
    ) -> None:
        """Note what came of saving a tail."""
        tail.saving = None
        if future.exception() is None:
            tail.saved(future.result())
        self._left_out(branch, tail, future)
        self._path_saved(branch, blocks, future)

    @staticmethod
    def _left_out(branch: Branch, entry: Entry, future: "Future[Any]") -> None:
        """Keep what a full store has no room for, used longest ago, while RAM lasts."""
        if isinstance(future.exception(), LeastRecentlyUsed):
            entries: list[Entry] = [entry, *branch.blocks, branch.tail]
            for unsaved in [e for e in entries if not e.disk_bytes]:
                unsaved.discardable = True
            if not branch.in_use or branch.preempted:
                branch.save_at = None

    def _path_saved(self, branch: Branch, blocks: list[CachedBlock], future: "Future[Any]") -> None:
        """Note how far a branch's row in the store reaches."""
        if future.exception() is None:
            branch.disk_head = blocks[-1].key if blocks else None
        elif isinstance(future.exception(), NotFound):
            # part of the path was deleted with another agent: save it again, when the branch's turn
            # comes
            for block in blocks:
                if block.data is not None:
                    block.not_on_disk()
