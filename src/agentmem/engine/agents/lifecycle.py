"""What is done to agents, rather than asked of them: pin, expire, prefetch, evict, export, delete."""

import math
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, cast

from ...agent_key import AgentKey
from ...errors import AgentMemError, AgentNotFound, Busy, Conflict, StoreFailed
from ...prefix_cache.agent import Agent
from ...prefix_cache.block_pool import CachedBlock, CachedTail, Entry
from ...prefix_cache.info import AgentDetail
from ...prefix_cache.load import enter
from ...store.records import BlockRecord, BranchRecord, Linked
from ..api import Forget, GenerateRequest
from ..startup import Core
from .operations import Operations


@dataclass(frozen=True)
class Exported:
    """An agent's caches as they are on disk, under second names that nothing deletes meanwhile."""

    agent: Agent
    branches: list[
        tuple[list[CachedBlock], CachedTail, str, float]
    ]  # its nodes, its tail, its id, its last use
    files: Linked


@dataclass(frozen=True)
class Imported:
    """What an import stored, to be entered among the agents."""

    branches: list[BranchRecord]
    blocks: list[BlockRecord]


class Lifecycle(Operations):
    def __init__(self, core: Core):
        super().__init__(core)
        self._importing: set[AgentKey] = set()
        self.forget: Forget = lambda key, delete: delete()

    # -- what is known, and kept

    def check_ephemeral(self, request: GenerateRequest) -> None:
        """Raises Conflict where it wants the agent written to disk, or not, otherwise than it is."""
        key, scheduler = request.agent, self._core.scheduler
        known = self._prefix_cache.agents.get(key)
        asked = (
            [s.request for s in (*scheduler.active, *scheduler.waiting)] if known is None else []
        )
        said = [bool(r.ephemeral) for r in asked if r.agent == key]
        if known is not None:
            said = [known.ephemeral]
        if said and request.ephemeral not in (None, any(said)):
            is_now = "never written to disk" if any(said) else "written to disk"
            raise Conflict(
                f"agentmem.ephemeral: agent {key.agent_id[:200]!r} exists and is {is_now}; delete it first, or use "
                "another agent_id",
                param="agentmem.ephemeral",
            )

    def tokens(self, key: AgentKey, done: "Future[list[int]]") -> None:
        """Of the newest branch."""
        done.set_result(self._newest(self._agent(key)).tokens().tolist())

    def pin(self, key: AgentKey, pinned: bool, done: "Future[None]") -> None:
        """A pinned agent never leaves RAM for others' sake, nor the disk, and does not expire."""
        agent = self._agent(key)
        agent.pinned = pinned
        self._note(agent, done)

    def set_ttl(self, key: AgentKey, ttl: float | None, done: "Future[None]") -> None:
        agent = self._agent(key)
        agent.ttl = ttl
        self._note(agent, done)

    def expired(self) -> list[AgentKey]:
        """Agents whose time is over."""
        now, scheduler = time.time(), self._core.scheduler
        late = [
            key for key, agent in self._prefix_cache.agents.items() if self._expiry(agent) <= now
        ]
        asked = {s.request.agent for s in (*scheduler.waiting, *scheduler.active)}
        return [key for key in late if key not in asked]

    def next_expiry(self) -> float:
        """Unix seconds."""
        return min(
            (self._expiry(agent) for agent in self._prefix_cache.agents.values()), default=math.inf
        )

    @staticmethod
    def _expiry(agent: Agent) -> float:
        in_use = any(branch.in_use for branch in agent.branches.values())
        return (
            math.inf if agent.ttl is None or agent.pinned or in_use else agent.last_used + agent.ttl
        )

    # -- RAM

    def prefetch(self, key: AgentKey, done: "Future[int | None]") -> None:
        """Bring the agent's newest branch into RAM; `done` gets the bytes read, None if there is no
        such agent.

        Busy: there is no room now.
        """
        agent = self._prefix_cache.agents.get(key)
        if agent is None or not agent.branches:
            done.set_result(None)
            return
        branch = agent.newest
        assert branch is not None
        match = self._prefix_cache.prefix(branch, len(branch))
        nbytes, budget = match.missing_bytes, self._core.budget
        if not match.missing:
            self._prefix_cache.touch(match)
            done.set_result(0)
        elif not budget.make_room(nbytes, match.entries(), urgent=False):
            raise Busy(
                f"There is no room for the {nbytes:,} bytes of agent {key.agent_id[:200]!r}: "
                f"{budget.used_bytes:,} of the {budget.limit:,} bytes of RAM for caches "
                "(kv_budget) are in use or reserved.",
                code="kv_budget_full",
            )
        else:
            self._prefix_cache.hold_match(match)
            began = time.perf_counter()

            def restored(nbytes: int, at: float) -> None:
                self._core.trace.span(
                    "restore", began, max(began, at), agent=key.agent_id, bytes=nbytes
                )
                self._prefix_cache.release_match(match)
                done.set_result(nbytes)

            self._core.restorer.restore(match, restored)

    def evict(self, key: AgentKey, done: "Future[int]") -> None:
        """From RAM to disk, but for what a running request or another agent holds: bytes that RAM
        got back.
        """
        agent = self._agent(key)
        if agent.pinned or agent.ephemeral:
            why = (
                "pinned: unpin it first"
                if agent.pinned
                else "ephemeral, never written to disk: delete it instead"
            )
            raise Conflict(f"Agent {key.agent_id[:200]!r} is {why}.", param="agent_id")

        def saved(_: Any) -> None:
            others = (a for a in self._prefix_cache.agents.values() if a is not agent)
            kept = self._core.budget.in_use() | {
                id(entry) for other in others for entry in other.entries()
            }
            gone = {
                id(e): e
                for e in agent.entries()
                if e.data is not None and e.disk_bytes and id(e) not in kept
            }
            before = self._prefix_cache.pool.nbytes
            for entry in gone.values():
                self._prefix_cache.pool.drop(entry)
            done.set_result(before - self._prefix_cache.pool.nbytes)

        self._save(agent, done, saved)

    # -- export

    def export(self, key: AgentKey, done: "Future[Exported]") -> None:
        """All that is committed of the agent, on disk; whoever gets it unlinks the files in the
        end.
        """
        agent = self._agent(key)
        if agent.ephemeral:
            raise Conflict(
                f"Agent {key.agent_id[:200]!r} is ephemeral, never written to disk.",
                param="agent_id",
            )

        def saved(_: Any) -> None:
            held = [
                (list(b.nodes), b.tail, b.id, b.last_used)
                for b in agent.branches.values()
                if len(b)
            ]
            if not held:  # deleted meanwhile
                raise AgentNotFound(key.agent_id)
            blocks = {node.key: node for nodes, *_ in held for node in nodes}
            tails = [(tail, branch_id) for _, tail, branch_id, _ in held if len(tail.tokens)]
            entries: list[Entry] = [*blocks.values(), *(tail for tail, _ in tails)]
            if not all(entry.disk_bytes for entry in entries):
                if any(branch.in_use for branch in agent.branches.values()):
                    raise Conflict(
                        f"Agent {key.agent_id[:200]!r} has a request running; wait for it.",
                        param="agent_id",
                    )
                raise StoreFailed("The agent could not be saved: see /health.")
            links = self._core.store.link_files(list(blocks), [branch_id for _, branch_id in tails])
            self._then(links, done, lambda files: done.set_result(Exported(agent, held, files)))

        self._save(agent, done, saved)

    def begin_import(self, key: AgentKey, done: "Future[None]") -> None:
        """Nobody else may import an agent of this name until `end_import`."""
        self._check_new(key, "agent_id")
        if key in self._importing:
            raise Conflict(
                f"Agent {key.agent_id[:200]!r} is being imported already.",
                param="agent_id",
                code="agent_exists",
            )
        self._importing.add(key)
        done.set_result(None)

    def end_import(
        self,
        key: AgentKey,
        imported: Imported | None,
        done: "Future[AgentDetail | None]",
    ) -> None:
        """Enter what it stored, if it did."""
        self._importing.discard(key)
        if imported is None:
            done.set_result(None)
            return
        enter(self._prefix_cache, imported.branches, imported.blocks)
        agent = self._agent(key)
        agent.last_used = max(branch.last_used for branch in imported.branches)
        self.show(key, cast("Future[AgentDetail]", done))

    # -- the store

    def delete(self, key: AgentKey, done: "Future[bool]") -> None:
        """Forget the agent; `done` gets whether there was one, once its bytes are off the disk.

        Its running sequences go on, and leave nothing behind.
        """
        for seq in (*self._core.scheduler.active, *self._core.scheduler.waiting):
            if seq.request.agent == key:
                seq.discard = True
        agent = self._prefix_cache.agents.get(key)
        if agent is not None:
            nodes = [n for b in agent.branches.values() for n in b.nodes]
            self._prefix_cache.drop_agent(agent)
            kept = {
                id(n)
                for b in self._prefix_cache.branches()
                if not b.agent.ephemeral
                for n in b.nodes
            }
            unwritten = {
                id(n) for b in self._prefix_cache.branches() if b.agent.ephemeral for n in b.nodes
            }
            for node in (
                nodes
            ):  # what only a running sequence or an ephemeral agent still holds goes from disk
                if id(node) not in kept:
                    node.not_on_disk()
                    node.discardable = node.discardable or id(node) in unwritten
                    if node.data is None and id(node) in unwritten:
                        self._prefix_cache.lose(node)

        def deleted(stored: "Future[bool]") -> None:
            error = stored.exception()
            if error is not None:
                failed = StoreFailed(
                    f"The agent's bytes may still be on disk: {error}; delete it again"
                )
                done.set_exception(error if isinstance(error, AgentMemError) else failed)
            else:
                done.set_result(stored.result() or agent is not None)

        store = self._core.store
        forgotten = self.forget(key, lambda: store.delete_agent(key))
        forgotten.add_done_callback(deleted)

    def collect_garbage(self, done: "Future[int]") -> None:
        before = self._core.store.stats()["disk_bytes"]
        for key in self.expired():
            self.delete(key, Future())
        collected = self._core.store.collect_garbage()
        self._then(
            collected,
            done,
            lambda _: done.set_result(before - self._core.store.stats()["disk_bytes"]),
        )
