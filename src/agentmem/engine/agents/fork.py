"""Forks and truncations: an agent that goes on from the first tokens of a branch."""

import math

from ...agent_key import AgentKey
from ...errors import AgentNotFound, Busy, Conflict, InvalidRequest, NotFound, StoreFailed
from ...kvcache.block import Tail
from ...prefix_cache.agent import Agent, Branch
from ...prefix_cache.block_pool import CachedBlock, CachedTail, Entry
from ...prefix_cache.cache import PrefixCache
from ...prefix_cache.info import AgentDetail
from ...prefix_cache.match import Match
from ...prefix_cache.restore import Restorer
from ...prefix_cache.write_back import WriteBack
from ...store.agent_store import AgentStore
from ...store.records import BranchHead
from ..budget import RamBudget
from ..scheduler import Scheduler
from ..tasks import Tasks, ended, finished, on_engine_thread
from .lifecycle import check_new, newest_branch, stored

_TRIES = 4  # times that what is left of a truncated agent is looked at, until it is on disk


def _changed(key: AgentKey) -> Conflict:
    """Return the error for an agent that is not as it was when the operation began."""
    message = f"Agent {key.agent_id[:200]!r} was changed by another request; try again."
    return Conflict(message, param="agent_id")


class Forks:
    """Cuts branches. The event loop awaits its public methods, as those of Lifecycle."""

    def __init__(
        self,
        *,
        tasks: Tasks,
        prefix_cache: PrefixCache,
        write_back: WriteBack,
        restorer: Restorer,
        store: AgentStore,
        scheduler: Scheduler,
        budget: RamBudget,
    ):
        self._tasks = tasks
        self._prefix_cache = prefix_cache
        self._write_back = write_back
        self._restorer = restorer
        self._store = store
        self._scheduler = scheduler
        self._budget = budget

    @on_engine_thread
    async def fork(self, key: AgentKey, to: str, num_tokens: int | None) -> AgentDetail:
        """Make an agent `to` of the first tokens (None: all) of the newest branch; copy nothing.

        It holds fewer tokens where no sequence can go on from there. Raises Conflict where `to`
        exists.
        """
        source = newest_branch(self._prefix_cache.known(key))
        target = AgentKey(key.namespace, to)
        self._check_new(target)
        match = self._first(source, num_tokens)
        self._prefix_cache.hold_match(match)
        try:
            tail, data = await self._open_block(match)
            self._check_new(target)
            agent = self._prefix_cache.agent(target)
            agent.ephemeral = source.agent.ephemeral
            branch = self._enter(agent, list(match.blocks), tail, data)
        finally:
            self._prefix_cache.release_match(match)
        await self._save_fork(source, branch, whole=match.extends)
        return self._write_back.detail(target)

    def _check_new(self, target: AgentKey) -> None:
        """Raise Conflict where there is an agent of that key."""
        check_new(target, prefix_cache=self._prefix_cache, scheduler=self._scheduler, param="to")

    async def _save_fork(self, source: Branch, branch: Branch, *, whole: bool) -> None:
        """Write what a fork of all that is on disk is there: rows, and a second name of a file.

        Any other fork is queued like what rests: its blocks at once, its tail where that pays.
        """
        tail = branch.tail
        tail_saved = source.tail.disk_bytes or not len(source.tail.tokens)
        if not whole or not tail_saved or not all(block.disk_bytes for block in branch.blocks):
            self._write_back.save_rest(branch, forced=False)
            return
        tail.disk_bytes = source.tail.disk_bytes
        tail.disk_parts = source.tail.disk_parts
        head = BranchHead(
            branch_id=branch.id,
            agent=branch.agent.key,
            head=branch.head,
            last_used=branch.last_used,
        )
        forked = self._store.fork_branch(source.id, head)
        await ended(forked)
        there = forked.exception() is None
        if there:
            branch.disk_head = branch.head
        if not there or not forked.result():
            tail.not_on_disk()
            if tail.data is None and branch.tail is tail:
                self._prefix_cache.set_tail(branch, CachedTail())

    @on_engine_thread
    async def truncate(self, key: AgentKey, num_tokens: int, held: int | None) -> AgentDetail:
        """Forget what comes after the first tokens of the newest branch, in RAM and on disk.

        Fewer are kept where no sequence can go on from there. Raises Conflict where the branch is
        in use, or does not hold `held` tokens (None: however many).
        """
        agent = self._prefix_cache.known(key)
        old = newest_branch(agent)
        if old.in_use:
            message = f"Agent {key.agent_id[:200]!r} has a request running; wait for it."
            raise Conflict(message, param="agent_id")
        if held not in (None, len(old)):
            raise _changed(key)
        match = self._first(old, num_tokens)
        if num_tokens == len(old):
            return self._write_back.detail(key)
        self._prefix_cache.hold_match(match)
        try:
            tail, data = await self._open_block(match)
            if old.in_use or agent.branches.get(old.id) is not old:
                raise _changed(key)
            # it goes first, or it would displace the new one
            self._prefix_cache.drop_branch(old)
            branch = self._enter(agent, list(match.blocks), tail, data)
        finally:
            self._prefix_cache.release_match(match)
        branch.displaced += [old.id, *old.displaced]
        await stored(self._write_back.save_agent(agent))
        await self._delete_displaced(branch)
        return self._write_back.detail(key)

    async def _delete_displaced(self, branch: Branch) -> None:
        """See what is kept onto the disk, a few looks if it is on its way, and the rest off it."""
        for tries_left in reversed(range(_TRIES)):
            if branch.agent.branches.get(branch.id) is not branch:
                # deleted meanwhile: to save it would bring it back
                raise AgentNotFound(branch.agent.key.agent_id)
            self._write_back.save_rest(branch, forced=True)
            saved = not branch.displaced
            if not saved and not tries_left:
                raise StoreFailed(
                    "What is left of the agent could not be saved, so the rest is still on disk: "
                    "see /health."
                )
            await stored(self._store.flush())
            if saved:
                return

    def _first(self, branch: Branch, num_tokens: int | None) -> Match:
        """Return what of the branch's first tokens (None: of all) a sequence can go on from."""
        if num_tokens is not None and not 1 <= num_tokens <= len(branch):
            raise InvalidRequest(
                f"tokens must be 1 to {len(branch)}, which is what there is.", param="tokens"
            )
        match = self._prefix_cache.prefix(branch, len(branch) if num_tokens is None else num_tokens)
        if not match.length:
            raise Conflict(
                "Nothing is kept from which a sequence could go on there or before: windows and "
                "states of the tokens up to there are neither in RAM nor on disk.",
                param="tokens",
            )
        return match

    def _enter(
        self, agent: Agent, blocks: list[CachedBlock], tail: CachedTail, data: Tail | None
    ) -> Branch:
        """Make a branch of `blocks` and `tail`, and enter it among its agent's."""
        branch = self._prefix_cache.new_branch(agent)
        branch.blocks = blocks
        branch.save_at = math.inf
        self._prefix_cache.hold(blocks)
        self._prefix_cache.set_tail(branch, tail, data)
        self._write_back.enter(branch)
        return branch

    async def _open_block(self, match: Match) -> tuple[CachedTail, Tail | None]:
        """Return the tail that follows the whole blocks of `match`, which the caller holds.

        What it is cut from is read first, if need be: whatever the caller checked, it checks again.
        Raises Busy, NotFound and Conflict.
        """
        source = match.source
        assert source is not None
        discardable = source.agent.ephemeral
        if match.extends and match.tail is not None:
            return CachedTail(
                match.tail.tokens, lineage=match.tail.lineage, discardable=discardable
            ), match.tail.data
        await self._read_open_block(match)
        unchanged = source.blocks[: len(match.blocks)] == list(match.blocks)
        here = source.agent.branches.get(source.id) is source and unchanged
        if not here or len(source) < match.length:  # deleted, or found damaged, while it was read
            raise Conflict("The agent was changed by another request; try again.", param="agent_id")
        data, lineage = self._restorer.open_block(match)
        start = len(match.blocks) * self._prefix_cache.spec.block_size
        tokens = source.tokens()[start : match.length]
        tail = CachedTail(tokens, lineage=lineage, discardable=discardable)
        return tail, data and data.compact()

    async def _read_open_block(self, match: Match) -> None:
        """Read from disk what the open block of `match` is cut from, unless it is in RAM."""
        entry: Entry | None = match.cut_block if match.cut_block is not None else match.tail
        while missing := [what for what in match.missing if what.entry is entry]:
            nbytes = sum(what.nbytes for what in missing)
            if not self._budget.make_room(nbytes, match.entries(), urgent=False):
                raise Busy(
                    "There is no room in RAM (kv_budget) to read the block that is cut.",
                    code="kv_budget_full",
                )
            restored = await finished(self._restorer.restore(match, only=entry))
            # what was read may have left RAM for another one who needed room before this goes on
            if not restored.nbytes and any(what.entry is entry for what in match.missing):
                raise NotFound(
                    "The block to be cut could not be read; it was put aside.", code="cache_damaged"
                )
