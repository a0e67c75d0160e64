"""What is done to agents, rather than asked of them: pin, expire, evict, fork, truncate, export.

Engine thread only. Each operation ends in `done`, a future, perhaps later, when the disk has answered; what can't be
done raises an AgentMemError at once and changes nothing.
"""

import math
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, cast

from ..errors import AgentMemError, AgentNotFound, Busy, Conflict, InvalidRequest, NotFound, StoreFailed
from ..kvcache.block import Tail
from ..store.agent_store import Linked
from ..store.records import BlockRecord, BranchRecord
from .agent import Agent, Branch, agent_info
from .block_pool import Entry, Node, OpenBlock
from .index import delete_agent, enter
from .match import Match
from .request import AgentDetail, BranchInfo
from .startup import Core


@dataclass(frozen=True)
class Exported:
    """An agent's caches as they are on disk, under second names that nothing deletes meanwhile."""

    agent: Agent
    branches: list[tuple[list[Node], OpenBlock, str, float]]  # its nodes, its tail, its id, its last use
    files: Linked


@dataclass(frozen=True)
class Imported:
    """What an import stored, to be entered among the agents."""

    branches: list[BranchRecord]
    blocks: list[BlockRecord]


class Lifecycle:
    def __init__(self, core: Core):
        self._core, self._contexts, self._saver = core, core.contexts, core.saver
        self._importing: set[tuple[str, str]] = set()  # namespace, name

    # -- what is known, and kept

    def show(self, namespace: str, name: str, done: "Future[AgentDetail]") -> None:
        agent = self._agent(namespace, name)
        branches = sorted(agent.branches.values(), key=lambda b: -b.last_used)
        rows = [
            BranchInfo(len(b), b.tier(self._contexts.spec), b.last_used, self._saver.unsaved_tokens(b))
            for b in branches
        ]
        done.set_result(AgentDetail(agent_info(agent, self._contexts.spec), rows))

    def tokens(self, namespace: str, name: str, done: "Future[list[int]]") -> None:
        """Of the newest branch."""
        done.set_result(self._newest(self._agent(namespace, name)).tokens().tolist())

    def pin(self, namespace: str, name: str, pinned: bool, done: "Future[None]") -> None:
        """A pinned agent never leaves RAM for others' sake, nor the disk, and does not expire."""
        agent = self._agent(namespace, name)
        agent.pinned = pinned
        self._note(agent, done)

    def set_ttl(self, namespace: str, name: str, ttl: float | None, done: "Future[None]") -> None:
        agent = self._agent(namespace, name)
        agent.ttl = ttl
        self._note(agent, done)

    def _note(self, agent: Agent, done: "Future[None]") -> None:
        noted = self._saver.note(agent, now=True) or self._core.store.flush()
        self._then(noted, done, lambda _: done.set_result(None))

    def expired(self) -> list[tuple[str, str]]:
        """Agents whose time is over: namespace and name."""
        now, scheduler = time.time(), self._core.scheduler
        late = [key for key, agent in self._contexts.agents.items() if self._expiry(agent) <= now]
        asked = {(s.request.namespace, s.request.agent_id) for s in (*scheduler.waiting, *scheduler.active)}
        return [key for key in late if key not in asked]

    def next_expiry(self) -> float:
        """Unix seconds."""
        return min((self._expiry(agent) for agent in self._contexts.agents.values()), default=math.inf)

    @staticmethod
    def _expiry(agent: Agent) -> float:
        in_use = any(branch.in_use for branch in agent.branches.values())
        return math.inf if agent.ttl is None or agent.pinned or in_use else agent.last_used + agent.ttl

    # -- RAM

    def evict(self, namespace: str, name: str, done: "Future[int]") -> None:
        """From RAM to disk, but for what a running request or another agent holds: bytes that RAM got back."""
        agent = self._agent(namespace, name)
        if agent.pinned or agent.ephemeral:
            why = "pinned: unpin it first" if agent.pinned else "ephemeral, never written to disk: delete it instead"
            raise Conflict(f"Agent {name[:200]!r} is {why}.", param="agent_id")

        def saved(_: Any) -> None:
            others = (a for a in self._contexts.agents.values() if a is not agent)
            kept = self._core.budget.in_use() | {id(entry) for other in others for entry in other.entries()}
            gone = {id(e): e for e in agent.entries() if e.data is not None and e.disk_bytes and id(e) not in kept}
            before = self._contexts.pool.nbytes
            for entry in gone.values():
                self._contexts.pool.drop(entry)
            done.set_result(before - self._contexts.pool.nbytes)

        self._save(agent, done, saved)

    def _save(self, agent: Agent, done: "Future[Any]", then: Callable[[Any], None]) -> None:
        """All that rests of an agent, then go on."""
        for branch in agent.branches.values():
            if not branch.in_use or branch.suspended:
                self._saver.save_rest(branch, forced=True)
        self._then(self._core.store.flush(), done, then)

    # -- forks and cuts

    def fork(self, namespace: str, name: str, to: str, num_tokens: int | None, done: "Future[AgentDetail]") -> None:
        """A new agent that holds the first tokens (None: all) of the newest branch; nothing is copied.

        Fewer, if no sequence can go on from there: `done` gets what there is.
        """
        source = self._newest(self._agent(namespace, name))
        self._check_new(namespace, to, "to")
        match = self._cut(source, num_tokens)

        def ready(tail: OpenBlock, data: Tail | None) -> None:
            self._check_new(namespace, to, "to")
            agent = self._contexts.agent(namespace, to)
            agent.ephemeral = source.agent.ephemeral
            branch = self._enter(agent, list(match.nodes), tail, data)
            self._save_fork(source, branch, match.extends, done)

        if match.extends and match.tail is not None:  # all of a tail: it need not be read
            tail = match.tail
            ready(OpenBlock(tail.tokens, lineage=tail.lineage, expendable=source.agent.ephemeral), tail.data)
        else:
            self._read_open_block(match, done, ready)

    def _save_fork(self, source: Branch, branch: Branch, whole: bool, done: "Future[AgentDetail]") -> None:
        """On disk a fork of all that is there is rows, and a second name of the tail's file; else it is saved later."""
        agent, tail = branch.agent, branch.tail
        tail_saved = source.tail.disk_bytes or not len(source.tail.tokens)
        if not whole or not tail_saved or not all(node.disk_bytes for node in branch.nodes):
            self._saver.save_rest(branch, forced=False)
            self.show(agent.namespace, agent.name, done)
            return
        tail.disk_bytes, tail.disk_parts = source.tail.disk_bytes, source.tail.disk_parts
        forked = self._core.store.fork_branch(
            source.id, branch.id, agent.namespace, agent.name, branch.head, branch.last_used
        )

        def on_engine() -> None:
            if forked.exception() is None:
                branch.disk_head = branch.head
            if forked.exception() is not None or not forked.result():
                tail.not_on_disk()
                if tail.data is None and branch.tail is tail:
                    self._contexts.set_tail(branch, OpenBlock())
            self._guarded(done, lambda: self.show(agent.namespace, agent.name, done))

        forked.add_done_callback(lambda _: self._core.post(on_engine))

    def truncate(
        self, namespace: str, name: str, num_tokens: int, held: int | None, done: "Future[AgentDetail]"
    ) -> None:
        """Forget what comes after the first tokens of the newest branch, which holds `held`, in RAM and on disk.

        Fewer are kept if no sequence can go on from there: `done` gets what there is.
        """
        agent = self._agent(namespace, name)
        old = self._newest(agent)
        if old.in_use:
            raise Conflict(f"Agent {name[:200]!r} has a request running; wait for it.", param="agent_id")
        if held not in (None, len(old)):
            raise Conflict(f"Agent {name[:200]!r} was changed by another request; try again.", param="agent_id")
        match = self._cut(old, num_tokens)
        if num_tokens == len(old):
            self.show(namespace, name, done)
            return

        def ready(tail: OpenBlock, data: Tail | None) -> None:
            if old.in_use or agent.branches.get(old.id) is not old:
                raise Conflict(f"Agent {name[:200]!r} was changed by another request; try again.", param="agent_id")
            self._contexts.hold(match.nodes)  # the branch that held them goes first, or it would displace the new one
            self._contexts.drop_branch(old)
            branch = self._enter(agent, list(match.nodes), tail, data)
            self._contexts.release(match.nodes)
            branch.displaced += [old.id, *old.displaced]
            self._save(agent, done, lambda _: self._truncated(branch, done, tries=3))

        self._read_open_block(match, done, ready)

    def _truncated(self, branch: Branch, done: "Future[AgentDetail]", tries: int) -> None:
        """What is kept is on disk by now, or after one more look if it was on its way: what is not goes from there."""
        if branch.agent.branches.get(branch.id) is not branch:  # deleted meanwhile: to save it would bring it back
            raise AgentNotFound(branch.agent.name)
        self._saver.save_rest(branch, forced=True)
        saved, agent = not branch.displaced, branch.agent
        if not saved and not tries:
            raise StoreFailed(
                "What is left of the agent could not be saved, so the rest is still on disk: see /health."
            )

        def flushed(_: Any) -> None:
            if saved:
                self.show(agent.namespace, agent.name, done)
            else:
                self._truncated(branch, done, tries - 1)

        self._then(self._core.store.flush(), done, flushed)

    def _cut(self, branch: Branch, num_tokens: int | None) -> Match:
        if num_tokens is not None and not 1 <= num_tokens <= len(branch):
            raise InvalidRequest(f"tokens must be 1 to {len(branch)}, which is what there is.", param="tokens")
        match = self._contexts.prefix(branch, len(branch) if num_tokens is None else num_tokens)
        if not match.length:
            raise Conflict(
                "Nothing is kept from which a sequence could go on there or before: windows and states of the tokens "
                "up to there are neither in RAM nor on disk.",
                param="tokens",
            )
        return match

    def _enter(self, agent: Agent, nodes: list[Node], tail: OpenBlock, data: Tail | None) -> Branch:
        branch = self._contexts.new_branch(agent)
        branch.nodes, branch.save_at = nodes, math.inf
        self._contexts.hold(nodes)
        self._contexts.set_tail(branch, tail, data)
        for old in self._contexts.put_branch(branch):
            for branch_id in (old.id, *old.displaced):
                self._core.store.delete_branch(branch_id)
        return branch

    def _read_open_block(
        self, match: Match, done: "Future[Any]", ready: Callable[[OpenBlock, Tail | None], None]
    ) -> None:
        """Go on with what follows the whole blocks of `match`, from disk if need be."""
        entry: Entry | None = match.cut_node if match.cut_node is not None else match.tail
        missing = [what for what in match.missing if what.entry is entry]
        if not missing:
            self._open_block(match, ready)
            return
        if not self._core.budget.make_room(sum(m.nbytes for m in missing), match.entries(), urgent=False):
            raise Busy("There is no room in RAM (kv_budget) to read the block that is cut.", code="kv_budget_full")
        self._contexts.hold_match(match)

        def read(_bytes: int, _at: float) -> None:
            self._guarded(done, lambda: self._open_block(match, ready))
            self._contexts.release_match(match)

        self._core.restorer.restore(match, read, only=entry)

    def _open_block(self, match: Match, ready: Callable[[OpenBlock, Tail | None], None]) -> None:
        if any(what.entry in (match.cut_node, match.tail) for what in match.missing):
            raise NotFound("The block to be cut could not be read; it was put aside.", code="cache_damaged")
        source = match.source
        assert source is not None
        here = source.agent.branches.get(source.id) is source and source.nodes[: len(match.nodes)] == [*match.nodes]
        if not here or len(source) < match.length:  # deleted, or found damaged, while it was read
            raise Conflict("The agent was changed by another request; try again.", param="agent_id")
        data, lineage = self._core.restorer.open_block(match)
        tokens = source.tokens()[len(match.nodes) * self._contexts.block_size : match.length]
        ready(OpenBlock(tokens, lineage=lineage, expendable=source.agent.ephemeral), data and data.compact())

    # -- export

    def export(self, namespace: str, name: str, done: "Future[Exported]") -> None:
        """All that is committed of the agent, on disk; whoever gets it unlinks the files in the end."""
        agent = self._agent(namespace, name)
        if agent.ephemeral:
            raise Conflict(f"Agent {name[:200]!r} is ephemeral, never written to disk.", param="agent_id")

        def saved(_: Any) -> None:
            held = [(list(b.nodes), b.tail, b.id, b.last_used) for b in agent.branches.values() if len(b)]
            if not held:  # deleted meanwhile
                raise AgentNotFound(name)
            blocks = {node.key: node for nodes, *_ in held for node in nodes}
            tails = [(tail, branch_id) for _, tail, branch_id, _ in held if len(tail.tokens)]
            entries: list[Entry] = [*blocks.values(), *(tail for tail, _ in tails)]
            if not all(entry.disk_bytes for entry in entries):
                if any(branch.in_use for branch in agent.branches.values()):
                    raise Conflict(f"Agent {name[:200]!r} has a request running; wait for it.", param="agent_id")
                raise StoreFailed("The agent could not be saved: see /health.")
            links = self._core.store.link_files(list(blocks), [branch_id for _, branch_id in tails])
            self._then(links, done, lambda files: done.set_result(Exported(agent, held, files)))

        self._save(agent, done, saved)

    def begin_import(self, namespace: str, name: str, done: "Future[None]") -> None:
        """Nobody else may import an agent of this name until `end_import`."""
        self._check_new(namespace, name, "agent_id")
        if (namespace, name) in self._importing:
            raise Conflict(f"Agent {name[:200]!r} is being imported already.", param="agent_id", code="agent_exists")
        self._importing.add((namespace, name))
        done.set_result(None)

    def end_import(
        self, namespace: str, name: str, imported: Imported | None, done: "Future[AgentDetail | None]"
    ) -> None:
        """Enter what it stored, if it did."""
        self._importing.discard((namespace, name))
        if imported is None:
            done.set_result(None)
            return
        enter(self._contexts, imported.branches, imported.blocks)
        agent = self._agent(namespace, name)
        agent.last_used = max(branch.last_used for branch in imported.branches)
        self.show(namespace, name, cast("Future[AgentDetail]", done))

    # -- the store

    def collect_garbage(self, done: "Future[int]") -> None:
        before = self._core.store.stats()["disk_bytes"]
        for namespace, name in self.expired():
            delete_agent(self._contexts, self._core.store, namespace, name, Future())
        collected = self._core.store.collect_garbage()
        self._then(collected, done, lambda _: done.set_result(before - self._core.store.stats()["disk_bytes"]))

    # -- helpers

    def _agent(self, namespace: str, name: str) -> Agent:
        agent = self._contexts.agents.get((namespace, name))
        if agent is None:
            raise AgentNotFound(name)
        return agent

    def _check_new(self, namespace: str, name: str, param: str) -> None:
        """Also a request that waits or runs is of an agent: what it said of that must hold when it ends."""
        key, scheduler = (namespace, name), self._core.scheduler
        asked = ((s.request.namespace, s.request.agent_id) for s in (*scheduler.waiting, *scheduler.active))
        if key in self._contexts.agents or key in asked:
            message = f"There is an agent {name[:200]!r} already; give another {param}."
            raise Conflict(message, param=param, code="agent_exists")

    @staticmethod
    def _newest(agent: Agent) -> Branch:
        if agent.newest is None:
            raise AgentNotFound(agent.name)
        return agent.newest

    def _then(self, future: "Future[Any]", done: "Future[Any]", function: Callable[[Any], None]) -> None:
        """Call `function` with the result, on the engine thread; what goes wrong goes to `done`."""

        def on_engine() -> None:
            self._guarded(done, lambda: function(future.result()))

        future.add_done_callback(lambda _: self._core.post(on_engine))

    @staticmethod
    def _guarded(done: "Future[Any]", function: Callable[[], None]) -> None:
        try:
            function()
        except AgentMemError as e:
            done.set_exception(e)
        except (OSError, sqlite3.Error) as e:
            done.set_exception(StoreFailed(f"The store could not do it: {e}"))
