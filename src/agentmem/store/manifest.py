"""The manifest: a SQLite database (WAL) of agents, branches and blocks. It is the truth about the store.

One connection, used by one thread at a time: by whoever opens the store, then by the writer.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import NotFound, StoreError
from .records import AgentRecord, BlockRecord, BranchRecord, FileRef, StoreIndex, TailRecord


def _v1(db: sqlite3.Connection) -> None:
    db.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
    db.execute(
        "CREATE TABLE agents (id INTEGER PRIMARY KEY, namespace TEXT NOT NULL, name TEXT NOT NULL,"
        " created REAL NOT NULL, last_used REAL NOT NULL, UNIQUE (namespace, name))"
    )
    db.execute(
        "CREATE TABLE blocks (key BLOB PRIMARY KEY, parent BLOB, tokens BLOB NOT NULL, nbytes INTEGER NOT NULL,"
        " checksum BLOB NOT NULL, created REAL NOT NULL)"
    )
    db.execute("CREATE INDEX blocks_parent ON blocks (parent)")
    db.execute(
        "CREATE TABLE branches (id TEXT PRIMARY KEY, agent_id INTEGER NOT NULL REFERENCES agents ON DELETE CASCADE,"
        " head BLOB, tail_tokens BLOB, tail_nbytes INTEGER, tail_checksum BLOB, tail_generation INTEGER,"
        " last_used REAL NOT NULL)"
    )
    db.execute("CREATE INDEX branches_agent ON branches (agent_id)")
    db.execute("CREATE INDEX branches_head ON branches (head)")


MIGRATIONS = [_v1]  # to change the tables, append a function; never edit one that was released

_NO_TAIL = "tail_tokens = NULL, tail_nbytes = NULL, tail_checksum = NULL, tail_generation = NULL"


def _pack(tokens: np.ndarray) -> bytes:
    return np.ascontiguousarray(tokens, "<u4").tobytes()


def _unpack(blob: bytes) -> np.ndarray:
    return np.frombuffer(blob, "<u4")


class Manifest:
    def __init__(self, db: sqlite3.Connection):
        self._db = db

    @classmethod
    def open(cls, path: Path) -> "Manifest":
        """Open, creating and migrating as needed. A newer format raises StoreError and leaves every byte as it was."""
        _refuse_newer(path)
        # SQLite gives -wal and -shm the database's mode
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        os.fchmod(fd, 0o600)
        os.close(fd)
        # nobody else should hold a lock on it; where someone does, saves fail rather than pile up behind it
        db = sqlite3.connect(path, timeout=1.0, isolation_level=None, check_same_thread=False)
        try:
            # secure_delete: a deleted agent's tokens don't stay in free pages. fullfsync: macOS, see segment._fsync
            for pragma in (
                "journal_mode = WAL",
                "synchronous = FULL",
                "fullfsync = ON",
                "checkpoint_fullfsync = ON",
                "foreign_keys = ON",
                "secure_delete = ON",
            ):
                db.execute(f"PRAGMA {pragma}")
            manifest = cls(db)
            manifest._migrate()
            return manifest
        except sqlite3.Error:
            db.close()
            raise

    def _migrate(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        for number, migrate in enumerate(MIGRATIONS[version:], version + 1):
            with self.transaction():
                migrate(self._db)
                self._db.execute(f"PRAGMA user_version = {number}")

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, durable when it ends without an error."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def truncate_wal(self) -> None:
        """Copy the log into the database and empty it: what was deleted isn't in it any more."""
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    # What the store holds

    def meta(self) -> dict[str, str]:
        return dict(self._db.execute("SELECT key, value FROM meta"))

    def reset(self, meta: dict[str, str]) -> None:
        """Forget everything; `meta` is what the blocks to come are made with."""
        for table in ("branches", "agents", "blocks", "meta"):
            self._db.execute(f"DELETE FROM {table}")
        self._db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())

    def index(self) -> StoreIndex:
        agents = self._db.execute("SELECT namespace, name, created, last_used FROM agents ORDER BY id")
        branches = self._db.execute(
            "SELECT b.id, namespace, name, head, tail_tokens, tail_nbytes, tail_checksum, b.last_used"
            " FROM branches b JOIN agents a ON a.id = agent_id ORDER BY b.rowid"
        )
        blocks = self._db.execute("SELECT key, parent, tokens, nbytes, checksum, created FROM blocks ORDER BY rowid")
        return StoreIndex(
            [AgentRecord(*row) for row in agents],
            [_branch(*row) for row in branches],
            [_block(*row) for row in blocks],
        )

    def block(self, key: bytes) -> BlockRecord | None:
        row = self._db.execute(
            "SELECT key, parent, tokens, nbytes, checksum, created FROM blocks WHERE key = ?", (key,)
        ).fetchone()
        return row and _block(*row)

    def block_file(self, key: bytes) -> FileRef | None:
        row = self._db.execute("SELECT nbytes, checksum FROM blocks WHERE key = ?", (key,)).fetchone()
        return row and FileRef(*row)

    def tail_file(self, branch_id: str) -> FileRef | None:
        return self.tail_files("AND id = ?", branch_id).get(branch_id)

    def tail_files(self, where: str = "", *values: Any) -> dict[str, FileRef]:
        rows = self._db.execute(
            "SELECT id, tail_nbytes, tail_checksum, tail_generation FROM branches"
            f" WHERE tail_generation IS NOT NULL {where}",
            values,
        )
        return {branch_id: FileRef(*ref) for branch_id, *ref in rows}

    def block_files(self) -> dict[bytes, FileRef]:
        return {key: FileRef(*ref) for key, *ref in self._db.execute("SELECT key, nbytes, checksum FROM blocks")}

    def parents(self) -> dict[bytes, bytes | None]:
        """Parent by key, each after its parent (which had to be there when it was added)."""
        return dict(self._db.execute("SELECT key, parent FROM blocks ORDER BY rowid"))

    def heads(self) -> dict[str, bytes | None]:
        return dict(self._db.execute("SELECT id, head FROM branches"))

    def counts(self) -> tuple[int, int]:
        """Agents, branches."""
        return self._db.execute("SELECT (SELECT count(*) FROM agents), (SELECT count(*) FROM branches)").fetchone()

    # Changes, each inside a transaction

    def require_block(self, key: bytes | None) -> None:
        """NotFound unless `key` is a block or None (no block at all)."""
        if key is not None and self.block_file(key) is None:
            raise NotFound(f"block {key.hex()} isn't in the store; save it, from the root on, before what follows it")

    def add_block(self, block: BlockRecord) -> None:
        self._db.execute(
            "INSERT INTO blocks (key, parent, tokens, nbytes, checksum, created) VALUES (?, ?, ?, ?, ?, ?)",
            (block.key, block.parent, _pack(block.tokens), block.nbytes, block.checksum, block.created),
        )

    def put_branch(self, branch_id: str, namespace: str, agent: str, head: bytes | None, last_used: float) -> None:
        """Add the branch (and its agent) or move it to `head`; a tail that doesn't follow `head` goes."""
        (agent_id,) = self._db.execute(
            "INSERT INTO agents (namespace, name, created, last_used) VALUES (?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET last_used = max(last_used, excluded.last_used) RETURNING id",
            (namespace, agent, last_used, last_used),
        ).fetchone()
        self._db.execute(f"UPDATE branches SET {_NO_TAIL} WHERE id = ? AND head IS NOT ?", (branch_id, head))
        self._db.execute(
            "INSERT INTO branches (id, agent_id, head, last_used) VALUES (?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET head = excluded.head, last_used = max(last_used, excluded.last_used)",
            (branch_id, agent_id, head, last_used),
        )

    def set_tail(self, branch_id: str, tail: TailRecord, generation: int) -> None:
        self._db.execute(
            "UPDATE branches SET tail_tokens = ?, tail_nbytes = ?, tail_checksum = ?, tail_generation = ? WHERE id = ?",
            (_pack(tail.tokens), tail.nbytes, tail.checksum, generation, branch_id),
        )

    def clear_tail(self, branch_id: str) -> None:
        self._db.execute(f"UPDATE branches SET {_NO_TAIL} WHERE id = ?", (branch_id,))

    def cut_branch(self, branch_id: str, head: bytes | None) -> None:
        self._db.execute(f"UPDATE branches SET head = ?, {_NO_TAIL} WHERE id = ?", (head, branch_id))

    def touch(self, namespace: str, agent: str, last_used: float) -> None:
        self._db.execute(
            "UPDATE agents SET last_used = max(last_used, ?) WHERE namespace = ? AND name = ?",
            (last_used, namespace, agent),
        )

    def delete_branch(self, branch_id: str) -> None:
        """And its agent, if it was the last."""
        self._db.execute("DELETE FROM branches WHERE id = ?", (branch_id,))
        self._delete_bare_agents()

    def delete_empty_branches(self) -> None:
        """And agents that have none left."""
        self._db.execute("DELETE FROM branches WHERE head IS NULL AND tail_generation IS NULL")
        self._delete_bare_agents()

    def _delete_bare_agents(self) -> None:
        self._db.execute("DELETE FROM agents WHERE id NOT IN (SELECT agent_id FROM branches)")

    def delete_agent(self, namespace: str, agent: str) -> list[str] | None:
        """The ids of the branches that went with it; None if there is no such agent."""
        row = self._db.execute("SELECT id FROM agents WHERE namespace = ? AND name = ?", (namespace, agent)).fetchone()
        if row is None:
            return None
        branches = [b for (b,) in self._db.execute("SELECT id FROM branches WHERE agent_id = ?", row)]
        self._db.execute("DELETE FROM agents WHERE id = ?", row)
        return branches

    def branches_through(self, key: bytes) -> list[str]:
        """The branches whose chain contains the block."""
        rows = self._db.execute(
            "WITH RECURSIVE below(key) AS"
            " (VALUES (?) UNION SELECT blocks.key FROM blocks JOIN below ON parent = below.key)"
            " SELECT id FROM branches WHERE head IN below",
            (key,),
        )
        return [branch_id for (branch_id,) in rows]

    def delete_unreachable(self) -> list[bytes]:
        """Delete every block in no branch's chain; their keys."""
        rows = self._db.execute(
            "WITH RECURSIVE live(key) AS (SELECT head FROM branches WHERE head IS NOT NULL"
            " UNION SELECT parent FROM blocks JOIN live USING (key) WHERE parent IS NOT NULL)"
            " SELECT key FROM blocks WHERE key NOT IN live"
        ).fetchall()
        self._db.executemany("DELETE FROM blocks WHERE key = ?", rows)
        return [key for (key,) in rows]


def _refuse_newer(path: Path) -> None:
    if not path.exists():
        return
    # read-only: closing a writable connection would fold the log into the database
    with closing(sqlite3.connect(path.absolute().as_uri() + "?mode=ro", uri=True)) as db:
        (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise StoreError(
            f"{path} has format {version}, this agentmem knows up to {len(MIGRATIONS)}: it was written by a newer one; "
            "use that, or another --home"
        )


def _branch(branch_id: str, namespace: str, agent: str, head: bytes | None, *rest: Any) -> BranchRecord:
    tokens, nbytes, checksum, last_used = rest
    tail = None if tokens is None else TailRecord(_unpack(tokens), nbytes, checksum)
    return BranchRecord(branch_id, namespace, agent, head, tail, last_used)


def _block(key: bytes, parent: bytes | None, tokens: bytes, *rest: Any) -> BlockRecord:
    return BlockRecord(key, parent, _unpack(tokens), *rest)
