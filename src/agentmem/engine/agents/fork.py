"""Forks and truncations: an agent that goes on from the first tokens of a branch. See
operations.py.
"""

import math
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from ...agent_key import AgentKey
from ...errors import AgentNotFound, Busy, Conflict, InvalidRequest, NotFound, StoreFailed
from ...kvcache.block import Tail
from ...prefix_cache.agent import Agent, Branch
from ...prefix_cache.block_pool import CachedBlock, CachedTail, Entry
from ...prefix_cache.info import AgentDetail
from ...prefix_cache.match import Match
from ...store.records import BranchHead
from .operations import Operations


class Forks(Operations):
    def fork(
        self,
        key: AgentKey,
        to: str,
        num_tokens: int | None,
        done: "Future[AgentDetail]",
    ) -> None:
        """A new agent that holds the first tokens (None: all) of the newest branch; nothing is
        copied.

        Fewer, if no sequence can go on from there: `done` gets what there is.
        """
        source = self._newest(self._agent(key))
        target = AgentKey(key.namespace, to)
        self._check_new(target, "to")
        match = self._cut(source, num_tokens)

        def ready(tail: CachedTail, data: Tail | None) -> None:
            self._check_new(target, "to")
            agent = self._prefix_cache.agent(target)
            agent.ephemeral = source.agent.ephemeral
            branch = self._enter(agent, list(match.nodes), tail, data)
            self._save_fork(source, branch, match.extends, done)

        if match.extends and match.tail is not None:  # all of a tail: it need not be read
            tail = match.tail
            ready(
                CachedTail(tail.tokens, lineage=tail.lineage, discardable=source.agent.ephemeral),
                tail.data,
            )
        else:
            self._read_open_block(match, done, ready)

    def _save_fork(
        self, source: Branch, branch: Branch, whole: bool, done: "Future[AgentDetail]"
    ) -> None:
        """On disk a fork of all that is there is rows, and a second name of the tail's file; else
        it is saved later.
        """
        agent, tail = branch.agent, branch.tail
        tail_saved = source.tail.disk_bytes or not len(source.tail.tokens)
        if not whole or not tail_saved or not all(node.disk_bytes for node in branch.nodes):
            self._write_back.save_rest(branch, forced=False)
            self.show(agent.key, done)
            return
        tail.disk_bytes, tail.disk_parts = source.tail.disk_bytes, source.tail.disk_parts
        forked = self._core.store.fork_branch(
            source.id,
            BranchHead(
                branch_id=branch.id,
                agent=agent.key,
                head=branch.head,
                last_used=branch.last_used,
            ),
        )

        def on_engine() -> None:
            if forked.exception() is None:
                branch.disk_head = branch.head
            if forked.exception() is not None or not forked.result():
                tail.not_on_disk()
                if tail.data is None and branch.tail is tail:
                    self._prefix_cache.set_tail(branch, CachedTail())
            self._guarded(done, lambda: self.show(agent.key, done))

        forked.add_done_callback(lambda _: self._core.post(on_engine))

    def truncate(
        self,
        key: AgentKey,
        num_tokens: int,
        held: int | None,
        done: "Future[AgentDetail]",
    ) -> None:
        """Forget what comes after the first tokens of the newest branch, which holds `held`, in RAM
        and on disk.

        Fewer are kept if no sequence can go on from there: `done` gets what there is.
        """
        agent = self._agent(key)
        old = self._newest(agent)
        if old.in_use:
            raise Conflict(
                f"Agent {key.agent_id[:200]!r} has a request running; wait for it.",
                param="agent_id",
            )
        if held not in (None, len(old)):
            raise Conflict(
                f"Agent {key.agent_id[:200]!r} was changed by another request; try again.",
                param="agent_id",
            )
        match = self._cut(old, num_tokens)
        if num_tokens == len(old):
            self.show(key, done)
            return

        def ready(tail: CachedTail, data: Tail | None) -> None:
            if old.in_use or agent.branches.get(old.id) is not old:
                raise Conflict(
                    f"Agent {key.agent_id[:200]!r} was changed by another request; try again.",
                    param="agent_id",
                )
            self._prefix_cache.hold_match(
                match
            )  # the branch that held it goes first, or it would displace the new one
            self._prefix_cache.drop_branch(old)
            branch = self._enter(agent, list(match.nodes), tail, data)
            self._prefix_cache.release_match(match)
            branch.displaced += [old.id, *old.displaced]
            self._save(agent, done, lambda _: self._truncated(branch, done, tries=3))

        self._read_open_block(match, done, ready)

    def _truncated(self, branch: Branch, done: "Future[AgentDetail]", tries: int) -> None:
        """What is kept is on disk by now, or after one more look if it was on its way: what is not
        goes from there.
        """
        if (
            branch.agent.branches.get(branch.id) is not branch
        ):  # deleted meanwhile: to save it would bring it back
            raise AgentNotFound(branch.agent.key.agent_id)
        self._write_back.save_rest(branch, forced=True)
        saved, agent = not branch.displaced, branch.agent
        if not saved and not tries:
            raise StoreFailed(
                "What is left of the agent could not be saved, so the rest is still on disk: see /health."
            )

        def flushed(_: Any) -> None:
            if saved:
                self.show(agent.key, done)
            else:
                self._truncated(branch, done, tries - 1)

        self._then(self._core.store.flush(), done, flushed)

    def _cut(self, branch: Branch, num_tokens: int | None) -> Match:
        if num_tokens is not None and not 1 <= num_tokens <= len(branch):
            raise InvalidRequest(
                f"tokens must be 1 to {len(branch)}, which is what there is.", param="tokens"
            )
        match = self._prefix_cache.prefix(branch, len(branch) if num_tokens is None else num_tokens)
        if not match.length:
            raise Conflict(
                "Nothing is kept from which a sequence could go on there or before: windows and states of the tokens "
                "up to there are neither in RAM nor on disk.",
                param="tokens",
            )
        return match

    def _enter(
        self, agent: Agent, nodes: list[CachedBlock], tail: CachedTail, data: Tail | None
    ) -> Branch:
        branch = self._prefix_cache.new_branch(agent)
        branch.nodes, branch.save_at = nodes, math.inf
        self._prefix_cache.hold(nodes)
        self._prefix_cache.set_tail(branch, tail, data)
        self._write_back.enter(branch)
        return branch

    def _read_open_block(
        self, match: Match, done: "Future[Any]", ready: Callable[[CachedTail, Tail | None], None]
    ) -> None:
        """Go on with what follows the whole blocks of `match`, from disk if need be."""
        entry: Entry | None = match.cut_node if match.cut_node is not None else match.tail
        missing = [what for what in match.missing if what.entry is entry]
        if not missing:
            self._open_block(match, ready)
            return
        if not self._core.budget.make_room(
            sum(m.nbytes for m in missing), match.entries(), urgent=False
        ):
            raise Busy(
                "There is no room in RAM (kv_budget) to read the block that is cut.",
                code="kv_budget_full",
            )
        self._prefix_cache.hold_match(match)

        def read(_bytes: int, _at: float) -> None:
            self._guarded(done, lambda: self._open_block(match, ready))
            self._prefix_cache.release_match(match)

        self._core.restorer.restore(match, read, only=entry)

    def _open_block(self, match: Match, ready: Callable[[CachedTail, Tail | None], None]) -> None:
        if any(what.entry in (match.cut_node, match.tail) for what in match.missing):
            raise NotFound(
                "The block to be cut could not be read; it was put aside.", code="cache_damaged"
            )
        source = match.source
        assert source is not None
        here = source.agent.branches.get(source.id) is source and source.nodes[
            : len(match.nodes)
        ] == [*match.nodes]
        if not here or len(source) < match.length:  # deleted, or found damaged, while it was read
            raise Conflict("The agent was changed by another request; try again.", param="agent_id")
        data, lineage = self._core.restorer.open_block(match)
        tokens = source.tokens()[
            len(match.nodes) * self._prefix_cache.spec.block_size : match.length
        ]
        ready(
            CachedTail(tokens, lineage=lineage, discardable=source.agent.ephemeral),
            data and data.compact(),
        )
