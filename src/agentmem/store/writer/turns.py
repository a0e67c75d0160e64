"""Turns: what was said, request by request. Rows of the manifest, of which each agent's form a
tree.

They are text and no cache: a store that is full, or that drops its blocks for another calibration,
keeps them.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from ...agent_key import AgentKey
from .batch import Batch, Job, require_unicode


@dataclass(frozen=True)
class TurnRecord:
    id: str
    agent: AgentKey
    parent: str | None  # the turn that it follows
    content: bytes  # what was said, as JSON
    created: float  # Unix seconds


@dataclass(eq=False)
class PutTurns(Job):
    """Add turns, each after its parent, or change them. An agent that holds nothing yet is entered."""

    turns: list[TurnRecord]

    def __post_init__(self) -> None:
        for turn in self.turns:
            require_unicode(turn.agent)

    def record(self, batch: Batch) -> None:
        for turn in self.turns:
            agent_id = batch.manifest.enter_agent(turn.agent, turn.created)
            content = (
                batch.keys.seal_turn(turn.content, turn.id, agent_id)
                if batch.keys
                else turn.content
            )
            batch.manifest.db.execute(
                "INSERT INTO turns (id, agent_id, parent, content, created) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT DO UPDATE SET content = excluded.content",
                (turn.id, agent_id, turn.parent, content, turn.created),
            )


@dataclass(eq=False)
class DeleteTurns(Job):
    ids: list[str]
    wipe: bool = False  # done once their text is off the disk

    def __post_init__(self) -> None:
        self.alone = self.wipe

    def record(self, batch: Batch) -> None:
        batch.manifest.db.executemany(
            "DELETE FROM turns WHERE id = ?", [(turn_id,) for turn_id in self.ids]
        )

    def committed(self, batch: Batch) -> None:
        batch.manifest.truncate_wal()


@dataclass(eq=False)
class ReadTurns(Job):
    """An agent's, in the order in which they came. A turn that can't be decrypted is left out."""

    agent: AgentKey

    def __post_init__(self) -> None:
        require_unicode(self.agent)

    def record(self, batch: Batch) -> list[TurnRecord]:
        rows = batch.manifest.db.execute(
            "SELECT turns.id, agent_id, parent, content, turns.created FROM turns JOIN agents ON agents.id = agent_id"
            " WHERE namespace = ? AND name = ? ORDER BY turns.rowid",
            self.agent,
        )
        found = []
        for turn_id, agent_id, parent, stored, created in rows.fetchall():
            content = batch.keys.unseal_turn(stored, turn_id, agent_id) if batch.keys else stored
            if content is not None:
                found.append(TurnRecord(turn_id, self.agent, parent, content, created))
        return found


@dataclass(eq=False)
class FindTurn(Job):
    """Find the agent whose turn it is; None: there is no such turn."""

    turn_id: str

    def record(self, batch: Batch) -> AgentKey | None:
        found = batch.manifest.db.execute(
            "SELECT namespace, name FROM turns JOIN agents ON agents.id = agent_id WHERE turns.id = ?",
            (self.turn_id,),
        ).fetchone()
        return AgentKey(*found) if found else None


@dataclass(eq=False)
class TrimTurns(Job):
    """Let go of agents' turns, the least recently used agents' first, until all are `limit` bytes
    or one's are left.
    """

    limit: int

    def record(self, batch: Batch) -> tuple[list[AgentKey], int]:
        """Return whose went, and the bytes that are left."""
        held = batch.manifest.db.execute(
            "SELECT agents.id, namespace, name, sum(length(content)) FROM turns JOIN agents ON agents.id = agent_id"
            " GROUP BY agents.id ORDER BY pinned, last_used"
        ).fetchall()
        left, gone = sum(nbytes for *_, nbytes in held), []
        for agent_id, namespace, name, nbytes in held[:-1]:
            if left <= self.limit:
                break
            batch.manifest.db.execute("DELETE FROM turns WHERE agent_id = ?", (agent_id,))
            gone.append(AgentKey(namespace, name))
            left -= nbytes
        return gone, left


class TurnTable:
    """From any thread. Reads too are done by the writer, in the order asked for: they see what was
    written before.
    """

    def __init__(self, submit: Callable[[Job], Future[Any]], nbytes: int):
        """`nbytes`: of all turns, when the store was opened."""
        self._submit, self.nbytes = submit, nbytes

    def put(self, turns: list[TurnRecord]) -> Future[None]:
        return self._submit(PutTurns(turns))

    def delete(self, ids: list[str], *, wipe: bool = False) -> Future[None]:
        return self._submit(DeleteTurns(ids, wipe))

    def read(self, agent: AgentKey) -> Future[list[TurnRecord]]:
        return self._submit(ReadTurns(agent))

    def find(self, turn_id: str) -> Future[AgentKey | None]:
        return self._submit(FindTurn(turn_id))

    def trim(self, limit: int) -> Future[tuple[list[AgentKey], int]]:
        return self._submit(TrimTurns(limit))
