"""Jobs on turns, which are what was said, request by request: rows of the manifest.

They are text and no cache: a store that is full, or that drops its blocks for another calibration,
keeps them.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from ...agent_key import AgentKey
from ..records import TurnRecord
from .batch import Batch, Job, require_unicode


@dataclass(eq=False)
class PutTurns(Job):
    """Add turns, each after its parent, or change them."""

    turns: list[TurnRecord]

    def __post_init__(self) -> None:
        for turn in self.turns:
            require_unicode(turn.agent)

    def record(self, batch: Batch) -> None:
        for turn in self.turns:
            batch.manifest.turns.put(turn)


@dataclass(eq=False)
class DeleteTurns(Job):
    """Delete turns; with `wipe` it is done once their text is off the disk."""

    ids: list[str]
    wipe: bool = False

    def __post_init__(self) -> None:
        self.alone = self.wipe

    def record(self, batch: Batch) -> None:
        batch.manifest.turns.delete(self.ids)

    def committed(self, batch: Batch) -> None:
        batch.manifest.truncate_wal()


@dataclass(eq=False)
class ReadTurns(Job):
    """Look up an agent's turns, in the order in which they came."""

    agent: AgentKey

    def __post_init__(self) -> None:
        require_unicode(self.agent)

    def record(self, batch: Batch) -> list[TurnRecord]:
        return batch.manifest.turns.of_agent(self.agent)


@dataclass(eq=False)
class FindTurn(Job):
    """Find the agent whose turn it is."""

    turn_id: str

    def record(self, batch: Batch) -> AgentKey | None:
        return batch.manifest.turns.owner(self.turn_id)


@dataclass(eq=False)
class TrimTurns(Job):
    """Let go of agents' turns until all are `limit` bytes, or one agent's are left."""

    limit: int

    def record(self, batch: Batch) -> tuple[list[AgentKey], int]:
        return batch.manifest.turns.trim(self.limit)


class TurnTable:
    """The turns in a store, from any thread.

    Reads too are done by the writer, in the order asked for: they see what was written before.
    """

    def __init__(self, submit: Callable[[Job], Future[Any]], nbytes: int):
        """Take the writer's `submit`, and the bytes of all turns when the store was opened."""
        self._submit, self.nbytes = submit, nbytes

    def put(self, turns: list[TurnRecord]) -> Future[None]:
        """Add turns, each after its parent, or change them; agents are entered if need be."""
        return self._submit(PutTurns(turns))

    def delete(self, ids: list[str], *, wipe: bool = False) -> Future[None]:
        """Delete turns; with `wipe` the future resolves once their text is off the disk."""
        return self._submit(DeleteTurns(ids, wipe))

    def read(self, agent: AgentKey) -> Future[list[TurnRecord]]:
        """Return an agent's turns in the order in which they came.

        A turn that can't be decrypted is left out.
        """
        return self._submit(ReadTurns(agent))

    def find(self, turn_id: str) -> Future[AgentKey | None]:
        """Return the agent whose turn it is; None: there is no such turn."""
        return self._submit(FindTurn(turn_id))

    def trim(self, limit: int) -> Future[tuple[list[AgentKey], int]]:
        """Let go of turns, the least recently used agents' first, until all are `limit` bytes.

        One agent's are left in any case. Gives whose went, and the bytes that are left.
        """
        return self._submit(TrimTurns(limit))
