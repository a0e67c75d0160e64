"""Operations: what is done to agents, rather than asked of them, has in common.

Engine thread only. Each operation ends in `done`, a future, perhaps later, when the disk has
answered; what can't be done raises an AgentMemError at once and changes nothing.
"""

import sqlite3
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from ...agent_key import AgentKey
from ...errors import AgentMemError, AgentNotFound, Conflict, StoreFailed
from ...prefix_cache.agent import Agent, Branch, agent_info
from ...prefix_cache.explain import explain
from ...prefix_cache.info import AgentDetail, BranchInfo, Explanation
from ..startup import Core


class Operations:
    def __init__(self, core: Core):
        self._core, self._prefix_cache, self._write_back = core, core.prefix_cache, core.write_back

    def show(self, key: AgentKey, done: "Future[AgentDetail]") -> None:
        agent = self._agent(key)
        branches = sorted(agent.branches.values(), key=lambda b: -b.last_used)
        rows = [
            BranchInfo(
                len(b),
                b.tier(self._prefix_cache.spec),
                b.last_used,
                self._write_back.unsaved_tokens(b),
            )
            for b in branches
        ]
        done.set_result(AgentDetail(agent_info(agent, self._prefix_cache.spec), rows))

    def explain(
        self,
        key: AgentKey,
        tokens: list[int] | None,
        done: "Future[Explanation | None]",
    ) -> None:
        agent = self._agent(key)
        if tokens is None:
            done.set_result(agent.explained)
        else:
            done.set_result(explain(agent, tokens, self._prefix_cache.match(key, tokens)))

    def _note(self, agent: Agent, done: "Future[None]") -> None:
        noted = self._write_back.note(agent, now=True) or self._core.store.flush()
        self._then(noted, done, lambda _: done.set_result(None))

    def _save(self, agent: Agent, done: "Future[Any]", then: Callable[[Any], None]) -> None:
        """All that rests of an agent, then go on."""
        for branch in agent.branches.values():
            if not branch.in_use or branch.preempted:
                self._write_back.save_rest(branch, forced=True)
        self._then(self._core.store.flush(), done, then)

    def _agent(self, key: AgentKey) -> Agent:
        agent = self._prefix_cache.agents.get(key)
        if agent is None:
            raise AgentNotFound(key.agent_id)
        return agent

    def _check_new(self, key: AgentKey, param: str) -> None:
        """Also a request that waits or runs is of an agent: what it said of that must hold when it
        ends.
        """
        scheduler = self._core.scheduler
        asked = (s.request.agent for s in (*scheduler.waiting, *scheduler.active))
        if key in self._prefix_cache.agents or key in asked:
            message = f"There is an agent {key.agent_id[:200]!r} already; give another {param}."
            raise Conflict(message, param=param, code="agent_exists")

    @staticmethod
    def _newest(agent: Agent) -> Branch:
        if agent.newest is None:
            raise AgentNotFound(agent.key.agent_id)
        return agent.newest

    def _then(
        self, future: "Future[Any]", done: "Future[Any]", function: Callable[[Any], None]
    ) -> None:
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
