"""Rows of agents."""

import sqlite3
from collections.abc import Iterable

from ...agent_key import AgentKey
from ..records import AgentRecord

_IS_BARE = (
    "NOT EXISTS (SELECT 1 FROM branches WHERE agent_id = agents.id)"
    " AND NOT EXISTS (SELECT 1 FROM turns WHERE agent_id = agents.id)"
)


class AgentRows:
    """The agents of a manifest; changes are made inside its transaction."""

    def __init__(self, db: sqlite3.Connection):
        self._db = db

    def all(self) -> list[AgentRecord]:
        """Return every agent, in the order in which they were entered."""
        found = self._db.execute(
            "SELECT namespace, name, created, last_used, pinned, ttl, requests, hit_tokens"
            " FROM agents ORDER BY id"
        )
        return [
            AgentRecord(
                key=AgentKey(namespace, name),
                created=created,
                last_used=last_used,
                pinned=bool(pinned),
                ttl=ttl,
                requests=requests,
                hit_tokens=hit_tokens,
            )
            for namespace, name, created, last_used, pinned, ttl, requests, hit_tokens in found
        ]

    def expired(self, now: float) -> list[AgentKey]:
        """Return the agents whose time is over at `now`, in Unix seconds."""
        found = self._db.execute(
            "SELECT namespace, name FROM agents"
            " WHERE ttl IS NOT NULL AND NOT pinned AND last_used + ttl < ?",
            (now,),
        )
        return [AgentKey(namespace, name) for namespace, name in found]

    def id_of(self, agent: AgentKey) -> int | None:
        """Return the agent's row id; None: there is no such agent."""
        row = self._db.execute(
            "SELECT id FROM agents WHERE namespace = ? AND name = ?", agent
        ).fetchone()
        return int(row[0]) if row else None

    def put(self, agent: AgentRecord) -> None:
        """Add or change an agent. What was counted and its last use never go back."""
        self._db.execute(
            "INSERT INTO agents"
            " (namespace, name, created, last_used, pinned, ttl, requests, hit_tokens)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
            " last_used = max(last_used, excluded.last_used),"
            " pinned = excluded.pinned, ttl = excluded.ttl,"
            " requests = max(requests, excluded.requests),"
            " hit_tokens = max(hit_tokens, excluded.hit_tokens)",
            (
                agent.key.namespace,
                agent.key.agent_id,
                agent.created,
                agent.last_used,
                int(agent.pinned),
                agent.ttl,
                agent.requests,
                agent.hit_tokens,
            ),
        )

    def enter(self, agent: AgentKey, last_used: float) -> int:
        """Add the agent if need be, and note its use; return its row id."""
        (agent_id,) = self._db.execute(
            "INSERT INTO agents (namespace, name, created, last_used) VALUES (?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET last_used = max(last_used, excluded.last_used)"
            " RETURNING id",
            (agent.namespace, agent.agent_id, last_used, last_used),
        ).fetchone()
        return int(agent_id)

    def rename(self, agent_id: int, to: AgentKey) -> None:
        """Give an agent another name, which nobody has."""
        self._db.execute(
            "UPDATE agents SET namespace = ?, name = ? WHERE id = ?",
            (to.namespace, to.agent_id, agent_id),
        )

    def note_use_of(self, agent_id: int, by: int) -> None:
        """Note that an agent was used when another one was."""
        self._db.execute(
            "UPDATE agents SET last_used ="
            " max(last_used, (SELECT last_used FROM agents WHERE id = ?)) WHERE id = ?",
            (by, agent_id),
        )

    def delete(self, agent_id: int) -> None:
        """Delete an agent with its key, its branches and its turns."""
        self._db.execute("DELETE FROM agents WHERE id = ?", (agent_id,))

    def delete_namespace(self, namespace: str) -> None:
        """Delete all agents of a namespace, each as `delete` does."""
        self._db.execute("DELETE FROM agents WHERE namespace = ?", (namespace,))

    def delete_if_bare(self, agent_ids: Iterable[int]) -> None:
        """Delete those of these agents that have neither branches nor turns."""
        self._db.executemany(
            f"DELETE FROM agents WHERE id = ? AND {_IS_BARE}",
            [(agent_id,) for agent_id in agent_ids],
        )

    def delete_bare(self) -> None:
        """Delete the agents that have neither branches nor turns."""
        self._db.execute(f"DELETE FROM agents WHERE {_IS_BARE}")
