"""What is done to agents, rather than asked of them: show, pin, expire, prefetch, evict, delete."""

import math
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

from ...agent_key import AgentKey
from ...errors import AgentMemError, AgentNotFound, Busy, Conflict, StoreFailed
from ...prefix_cache.agent import Agent, Branch
from ...prefix_cache.cache import PrefixCache
from ...prefix_cache.explain import explain
from ...prefix_cache.info import AgentDetail, AgentInfo, Explanation
from ...prefix_cache.restore import Restorer
from ...prefix_cache.write_back import WriteBack
from ...store.agent_store import AgentStore
from ..api import GenerateRequest
from ..budget import RamBudget
from ..scheduler import Scheduler
from ..tasks import Tasks, ended, finished, on_engine_thread
from ..trace import Trace

T = TypeVar("T")
# deletes an agent, by what it is given: whoever keeps more of the agent lets go of that first
Forget = Callable[[AgentKey, Callable[[], Future[bool]]], Future[bool]]


async def stored(future: Future[T]) -> T:
    """Wait for the store; raise StoreFailed where the disk or the database refused."""
    try:
        return await finished(future)
    except (OSError, sqlite3.Error) as e:
        raise StoreFailed(f"The store could not do it: {e}") from e


def newest_branch(agent: Agent) -> Branch:
    """Return the branch that was used last. Raises AgentNotFound where there is none yet."""
    if agent.newest is None:
        raise AgentNotFound(agent.key.agent_id)
    return agent.newest


def check_new(
    key: AgentKey, *, prefix_cache: PrefixCache, scheduler: Scheduler, param: str
) -> None:
    """Raise Conflict, which names `param`, where there is such an agent.

    A request that waits or runs is of an agent too: what it said of it must hold when it ends.
    """
    if key in prefix_cache.agents or scheduler.asks_for(key):
        message = f"There is an agent {key.agent_id[:200]!r} already; give another {param}."
        raise Conflict(message, param=param, code="agent_exists")


class Lifecycle:
    """What becomes of agents, and what is told of them.

    The event loop awaits the coroutine methods. They raise AgentNotFound where there is no such
    agent, unless they say otherwise; what can't be done raises before it changes anything.
    """

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
        trace: Trace,
    ):
        self._tasks = tasks
        self._prefix_cache = prefix_cache
        self._write_back = write_back
        self._restorer = restorer
        self._store = store
        self._scheduler = scheduler
        self._budget = budget
        self._trace = trace
        self.on_forget: Forget = lambda key, delete: delete()  # called on the engine thread

    # -- what is told

    def infos(self, namespace: str) -> list[AgentInfo]:
        """Return a row for each agent of the namespace. On any thread."""
        return self._prefix_cache.infos(namespace)

    @on_engine_thread
    async def show(self, key: AgentKey) -> AgentDetail:
        """Return an agent and its branches."""
        return self._write_back.detail(key)

    @on_engine_thread
    async def tokens(self, key: AgentKey) -> list[int]:
        """Return the token ids of the newest branch."""
        tokens: list[int] = newest_branch(self._prefix_cache.known(key)).tokens().tolist()
        return tokens

    @on_engine_thread
    async def explain(self, key: AgentKey, tokens: list[int] | None) -> Explanation | None:
        """Tell how much of a prompt that could be sent now is cached, and why no more.

        `tokens` None: of the last prompt that was sent; None if there was none.
        """
        agent = self._prefix_cache.known(key)
        if tokens is None:
            return agent.explained
        return explain(agent, tokens, self._prefix_cache.match(key, tokens))

    # -- what is kept

    def check_ephemeral(self, request: GenerateRequest) -> None:
        """Raise Conflict where it wants its agent written to disk, or not, otherwise than it is.

        On the engine thread.
        """
        key = request.agent
        known = self._prefix_cache.agents.get(key)
        if known is not None:
            said = [known.ephemeral]
        else:
            said = [bool(seq.request.ephemeral) for seq in self._scheduler.of_agent(key)]
        if said and request.ephemeral not in (None, any(said)):
            is_now = "never written to disk" if any(said) else "written to disk"
            raise Conflict(
                f"agentmem.ephemeral: agent {key.agent_id[:200]!r} exists and is {is_now}; delete "
                "it first, or use another agent_id",
                param="agentmem.ephemeral",
            )

    @on_engine_thread
    async def pin(self, key: AgentKey, pinned: bool) -> None:
        """Keep an agent in RAM and on disk whatever others need, and do not let it expire."""
        agent = self._prefix_cache.known(key)
        agent.pinned = pinned
        await self._note(agent)

    @on_engine_thread
    async def set_ttl(self, key: AgentKey, ttl: float | None) -> None:
        """Keep an agent for `ttl` seconds after its last use; None: for good."""
        agent = self._prefix_cache.known(key)
        agent.ttl = ttl
        await self._note(agent)

    async def _note(self, agent: Agent) -> None:
        """See what is set for an agent onto the disk."""
        await stored(self._write_back.note(agent, now=True) or self._store.flush())

    def expired(self) -> list[AgentKey]:
        """Return the agents whose time is over and of which nothing is asked. Engine thread."""
        now = time.time()
        late = [
            key for key, agent in self._prefix_cache.agents.items() if self._expiry(agent) <= now
        ]
        return [key for key in late if not self._scheduler.asks_for(key)]

    def next_expiry(self) -> float:
        """Return when the next agent expires, in Unix seconds; infinity: none will."""
        agents = self._prefix_cache.agents.values()
        return min((self._expiry(agent) for agent in agents), default=math.inf)

    @staticmethod
    def _expiry(agent: Agent) -> float:
        """Return when an agent expires, in Unix seconds; infinity: not as things stand."""
        in_use = any(branch.in_use for branch in agent.branches.values())
        if agent.ttl is None or agent.pinned or in_use:
            return math.inf
        return agent.last_used + agent.ttl

    # -- RAM

    @on_engine_thread
    async def prefetch(self, key: AgentKey) -> int | None:
        """Read an agent's newest branch into RAM; return the bytes read, None for no such agent.

        Raises Busy where there is no room now.
        """
        agent = self._prefix_cache.agents.get(key)
        if agent is None or agent.newest is None:
            return None
        match = self._prefix_cache.prefix(agent.newest, len(agent.newest))
        if not match.missing:
            self._prefix_cache.touch(match)
            return 0
        nbytes = match.missing_bytes
        budget = self._budget
        if not budget.make_room(nbytes, match.entries(), urgent=False):
            raise Busy(
                f"There is no room for the {nbytes:,} bytes of agent {key.agent_id[:200]!r}: "
                f"{budget.used_bytes:,} of the {budget.limit:,} bytes of RAM for caches "
                "(kv_budget) are in use or reserved.",
                code="kv_budget_full",
            )
        began = time.perf_counter()
        self._prefix_cache.hold_match(match)
        try:
            restored = await finished(self._restorer.restore(match))
        finally:
            self._prefix_cache.release_match(match)
        ended_at = max(began, restored.at)
        agent_id = key.agent_id
        nbytes = restored.nbytes
        self._trace.span("restore", began, ended_at, agent=agent_id, bytes=nbytes)
        return nbytes

    @on_engine_thread
    async def evict(self, key: AgentKey) -> int:
        """Move an agent from RAM to disk, but for what others hold; return the bytes of RAM freed.

        Others are running requests, operations that read, and other agents. Raises Conflict for an
        agent that is pinned or ephemeral.
        """
        agent = self._prefix_cache.known(key)
        if agent.pinned or agent.ephemeral:
            why = "pinned: unpin it first"
            if not agent.pinned:
                why = "ephemeral, never written to disk: delete it instead"
            raise Conflict(f"Agent {key.agent_id[:200]!r} is {why}.", param="agent_id")
        await stored(self._write_back.save_agent(agent))
        kept = self._budget.in_use() | {id(entry) for entry in self._prefix_cache.held_entries()}
        for other in self._prefix_cache.agents.values():
            if other is not agent:
                kept.update(id(entry) for entry in other.entries())
        pool = self._prefix_cache.pool
        before = pool.nbytes
        for entry in agent.entries():
            if entry.disk_bytes and id(entry) not in kept:
                pool.drop(entry)
        return before - pool.nbytes

    # -- the store

    @on_engine_thread
    async def delete(self, key: AgentKey) -> bool:
        """Forget an agent; True once its bytes are off the disk, False if there was none.

        Its running sequences go on, and leave nothing behind.
        """
        return await self._forget(key)

    def delete_expired(self) -> None:
        """Begin to delete the agents whose time is over. On the engine thread."""
        for key in self.expired():
            self._tasks.start(self._forget_expired(key))

    async def _forget_expired(self, key: AgentKey) -> None:
        with suppress(AgentMemError):  # nobody waits; /health tells of a store that can't write
            await self._forget(key)

    async def _forget(self, key: AgentKey) -> bool:
        """Drop an agent, in RAM and then on disk; return whether there was one."""
        for seq in self._scheduler.of_agent(key):
            seq.discard = True
        agent = self._prefix_cache.agents.get(key)
        if agent is not None:
            self._drop(agent)
        forgotten = self.on_forget(key, lambda: self._store.delete_agent(key))
        await ended(forgotten)
        error = forgotten.exception()
        if isinstance(error, AgentMemError):
            raise error
        if error is not None:
            message = f"The agent's bytes may still be on disk: {error}; delete it again"
            raise StoreFailed(message)
        return forgotten.result() or agent is not None

    def _drop(self, agent: Agent) -> None:
        """Let go of an agent's caches.

        What only sequences or ephemeral agents still hold counts as not on disk.
        """
        blocks = [block for branch in agent.branches.values() for block in branch.blocks]
        self._prefix_cache.drop_agent(agent)
        written: set[int] = set()
        unwritten: set[int] = set()
        for branch in self._prefix_cache.branches():
            held = unwritten if branch.agent.ephemeral else written
            held.update(id(block) for block in branch.blocks)
        for block in blocks:
            if id(block) not in written:
                block.not_on_disk()
                block.discardable = block.discardable or id(block) in unwritten
                if block.data is None and id(block) in unwritten:
                    self._prefix_cache.lose(block)

    @on_engine_thread
    async def collect_garbage(self) -> int:
        """Let go of what has expired, is in quarantine, or belongs to nobody.

        Returns the bytes of disk that came free.
        """
        before = self._store.stats()["disk_bytes"]
        self.delete_expired()
        await stored(self._store.collect_garbage())
        return before - self._store.stats()["disk_bytes"]
