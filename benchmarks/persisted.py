"""What a store's manifest said when its server was killed, and whether a restart has it still."""

import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from agentmem.errors import CorruptSegment, StoreError
from agentmem.store.agent_store import AgentStore
from agentmem.store.records import StoreIndex


@dataclass(frozen=True)
class Chain:
    """A branch: its blocks, root first, and whether a tail follows them."""

    agent: str
    keys: tuple[bytes, ...]
    has_tail: bool

    def covers(self, other: "Chain") -> bool:
        """Tell whether nothing of `other` is missing here.

        It has the same blocks, and more or a tail where `other` has one.
        """
        if self.agent != other.agent or self.keys[: len(other.keys)] != other.keys:
            return False
        return len(self.keys) > len(other.keys) or self.has_tail or not other.has_tail


@dataclass(frozen=True)
class Persisted:
    fingerprint: str
    meta: dict[str, str]
    paths: list[Chain]

    def blocks_of(self, agent: str) -> int:
        """Return how many blocks the longest branch of an agent has."""
        return max((len(path.keys) for path in self.paths if path.agent == agent), default=0)


def read_manifest(home: Path) -> Persisted | None:
    """Read from outside, beside a server or after one; None before there is a store."""
    for path in home.glob("store/*/manifest.sqlite"):
        uri = path.absolute().as_uri() + "?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=1.0)) as db:
            db.execute("BEGIN")  # one state for all that is read
            meta = dict(db.execute("SELECT key, value FROM meta"))
            parents = dict(db.execute("SELECT key, parent FROM blocks"))
            branches = db.execute(
                "SELECT name, head, tail_generation FROM branches "
                "JOIN agents ON agents.id = agent_id"
            ).fetchall()
        paths = [
            Chain(name, _chain(parents, head), tail is not None) for name, head, tail in branches
        ]
        return Persisted(path.parent.name, meta, paths)
    return None


def _chain(parents: dict[bytes, bytes | None], head: bytes | None) -> tuple[bytes, ...]:
    keys = []
    while head is not None:
        keys.append(head)
        head = parents[head]
    return tuple(reversed(keys))


def lost(home: Path, before: Persisted, *, deleted: set[str], deleting: set[str]) -> list[str]:
    """Find what of `before` a copy of the store has not, and what it has that it should not.

    `deleted`: agents whose deletion was acknowledged; `deleting`: asked for, which may have
    happened or not.
    """
    with tempfile.TemporaryDirectory(dir=home.parent) as copy:
        shutil.copytree(home / "store" / before.fingerprint, Path(copy) / before.fingerprint)
        try:
            store = AgentStore.open(Path(copy), before.fingerprint, before.meta)
        except StoreError as e:
            return [f"the store does not open: {e}"]
        with closing(store):
            return [*_unreadable(store), *_missing(store.index(), before, deleted, deleting)]


def _unreadable(store: AgentStore) -> Iterator[str]:
    index = store.index()
    reads = {f"block {block.key.hex()}": store.read_block(block.key) for block in index.blocks}
    for branch in index.branches:
        if branch.tail is not None:
            reads[f"tail of {branch.agent.agent_id}"] = store.read_tail(branch.id)
    for what, future in reads.items():
        if isinstance(error := future.exception(), CorruptSegment):
            yield f"{what}: {error}"
        elif error is not None:
            raise error


def _missing(
    index: StoreIndex, before: Persisted, deleted: set[str], deleting: set[str]
) -> Iterator[str]:
    parents = {block.key: block.parent for block in index.blocks}
    after = []
    for branch in index.branches:
        keys = _chain(parents, branch.head)
        after.append(Chain(branch.agent.agent_id, keys, branch.tail is not None))
    for path in after:
        if path.agent in deleted:
            yield f"{path.agent} was deleted, and is back"
    for path in before.paths:
        if path.agent not in deleted | deleting and not any(now.covers(path) for now in after):
            tail = " and a tail" if path.has_tail else ""
            yield f"{path.agent} had {len(path.keys)} blocks{tail}, they are lost"
