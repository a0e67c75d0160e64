"""Rows of turns: what was said, request by request, of which each agent's form a tree."""

import sqlite3
from collections.abc import Iterable

from ...agent_key import AgentKey
from ..records import TurnRecord
from .agents import AgentRows
from .file_keys import FileKeys


class TurnRows:
    """The turns of a manifest; changes are made inside its transaction."""

    keys: FileKeys | None = None  # where they are encrypted

    def __init__(self, db: sqlite3.Connection, agents: AgentRows):
        self._db, self._agents = db, agents

    def put(self, turn: TurnRecord) -> None:
        """Add or change a turn. An agent that holds nothing yet is entered."""
        agent_id = self._agents.enter(turn.agent, turn.created)
        content = turn.content
        if self.keys:
            content = self.keys.seal_turn(content, turn.id, agent_id)
        self._db.execute(
            "INSERT INTO turns (id, agent_id, parent, content, created) VALUES (?, ?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET content = excluded.content",
            (turn.id, agent_id, turn.parent, content, turn.created),
        )

    def delete(self, ids: Iterable[str]) -> None:
        """Delete the turns that have these ids, where there are any."""
        self._db.executemany("DELETE FROM turns WHERE id = ?", [(turn_id,) for turn_id in ids])

    def of_agent(self, agent: AgentKey) -> list[TurnRecord]:
        """Return an agent's turns in the order in which they came.

        One that can't be decrypted is left out.
        """
        rows = self._db.execute(
            "SELECT turns.id, agent_id, parent, content, turns.created"
            " FROM turns JOIN agents ON agents.id = agent_id"
            " WHERE namespace = ? AND name = ? ORDER BY turns.rowid",
            agent,
        )
        found = []
        for turn_id, agent_id, parent, stored, created in rows.fetchall():
            content = stored
            if self.keys:
                content = self.keys.unseal_turn(stored, turn_id, agent_id)
            if content is not None:
                turn = TurnRecord(
                    id=turn_id, agent=agent, parent=parent, content=content, created=created
                )
                found.append(turn)
        return found

    def owner(self, turn_id: str) -> AgentKey | None:
        """Return the agent whose turn it is; None: there is no such turn."""
        found = self._db.execute(
            "SELECT namespace, name FROM turns JOIN agents ON agents.id = agent_id"
            " WHERE turns.id = ?",
            (turn_id,),
        ).fetchone()
        return AgentKey(*found) if found else None

    def total_bytes(self) -> int:
        """Return the bytes of all turns, as they are stored."""
        (nbytes,) = self._db.execute(
            "SELECT coalesce(sum(length(content)), 0) FROM turns"
        ).fetchone()
        return int(nbytes)

    def trim(self, limit: int) -> tuple[list[AgentKey], int]:
        """Delete agents' turns until all are `limit` bytes, or one agent's are left.

        Pinned agents' go last, else the least recently used agents' first. Returns whose went, and
        the bytes that are left.
        """
        held = self._db.execute(
            "SELECT agents.id, namespace, name, sum(length(content))"
            " FROM turns JOIN agents ON agents.id = agent_id"
            " GROUP BY agents.id ORDER BY pinned, last_used"
        ).fetchall()
        left = sum(nbytes for *_, nbytes in held)
        gone = []
        for agent_id, namespace, name, nbytes in held[:-1]:
            if left <= limit:
                break
            self._db.execute("DELETE FROM turns WHERE agent_id = ?", (agent_id,))
            gone.append(AgentKey(namespace, name))
            left -= nbytes
        return gone, left

    def move(self, agent_id: int, to_agent_id: int) -> None:
        """Give an agent's turns to another one. A turn that can't be decrypted goes."""
        if self.keys:
            self._reseal(self.keys, agent_id, to_agent_id)
        self._db.execute(
            "UPDATE turns SET agent_id = ? WHERE agent_id = ?", (to_agent_id, agent_id)
        )

    def _reseal(self, keys: FileKeys, agent_id: int, to_agent_id: int) -> None:
        rows = self._db.execute(
            "SELECT id, content FROM turns WHERE agent_id = ?", (agent_id,)
        ).fetchall()
        for turn_id, sealed in rows:
            content = keys.unseal_turn(sealed, turn_id, agent_id)
            if content is None:
                self._db.execute("DELETE FROM turns WHERE id = ?", (turn_id,))
            else:
                resealed = keys.seal_turn(content, turn_id, to_agent_id)
                self._db.execute("UPDATE turns SET content = ? WHERE id = ?", (resealed, turn_id))
