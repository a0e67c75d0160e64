"""The manifest's SQLite database (WAL): how it is opened, brought to this format, and changed in
transactions.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Self

from ...errors import AgentMemError, StoreError
from . import schema

_HOURS_KEPT = 48


class Database:
    """One connection, used by one thread at a time: by whoever opens the store, then by the writer."""

    damaged_rows = 0  # found and dropped when it was opened

    def __init__(self, db: sqlite3.Connection):
        self.db = db

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open, creating and migrating as needed; rows that are damaged are gone.

        A newer format raises StoreError and leaves every byte as it was. schema.Damaged: it is no
        manifest any more.
        """
        refuse_newer(path)
        # SQLite gives -wal and -shm the database's mode
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        os.fchmod(fd, 0o600)
        os.close(fd)
        # nobody else should hold a lock on it; where someone does, saves fail rather than pile up
        # behind it
        db = sqlite3.connect(path, timeout=1.0, isolation_level=None, check_same_thread=False)
        try:
            # secure_delete: a deleted agent's tokens don't stay in free pages. fullfsync: macOS,
            # see segment._fsync
            for pragma in (
                "journal_mode = WAL",
                "journal_size_limit = 1048576",
                "wal_autocheckpoint = 200",
                "synchronous = FULL",
                "fullfsync = ON",
                "checkpoint_fullfsync = ON",
                "foreign_keys = ON",
                "secure_delete = ON",
            ):
                db.execute(f"PRAGMA {pragma}")
            schema.migrate(db)
            schema.check(db)
            database = cls(db)
            with database.transaction():
                database.damaged_rows = schema.drop_damaged_rows(db)
            return database
        except (sqlite3.Error, UnicodeDecodeError, schema.Damaged) as e:
            db.close()
            if not isinstance(e, schema.Damaged) and schema.is_damage(e):
                raise schema.Damaged(str(e)) from e
            raise

    def close(self) -> None:
        self.db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, durable when it ends without an error."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.db.execute("COMMIT")
        finally:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Of a transaction, a part whose changes are undone by an AgentMemError."""
        self.db.execute("SAVEPOINT part")
        try:
            yield
        except AgentMemError:
            self.db.execute("ROLLBACK TO part")
            self.db.execute("RELEASE part")
            raise
        self.db.execute("RELEASE part")

    def truncate_wal(self) -> None:
        """Copy the log into the database and empty it: what was deleted isn't in it any more."""
        self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    # What it is about

    def meta(self) -> dict[str, str]:
        return dict(self.db.execute("SELECT key, value FROM meta"))

    def is_sealed(self) -> bool:
        """Whether it holds keys of encrypted files."""
        return self.db.execute("SELECT 1 FROM block_keys LIMIT 1").fetchone() is not None

    def forget_blocks(self) -> None:
        """And what is made of them. What was said stays."""
        for table in ("block_keys", "branches", "blocks"):
            self.db.execute(f"DELETE FROM {table}")
        self.db.execute("DELETE FROM agents WHERE id NOT IN (SELECT agent_id FROM turns)")

    def set_meta(self, meta: dict[str, str]) -> None:
        """What the blocks are made with."""
        self.db.execute("DELETE FROM meta")
        self.db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())

    def writes(self) -> dict[int, int]:
        """Bytes written to files, by hour since 1970, of the last days."""
        return dict(self.db.execute("SELECT hour, bytes FROM writes ORDER BY hour"))

    def count_writes(self, nbytes: int, hour: int) -> None:
        self.db.execute(
            "INSERT INTO writes VALUES (?, ?) ON CONFLICT DO UPDATE SET bytes = bytes + excluded.bytes",
            (hour, nbytes),
        )
        self.db.execute("DELETE FROM writes WHERE hour < ?", (hour - _HOURS_KEPT,))


def refuse_newer(path: Path) -> None:
    """Raises StoreError: a newer agentmem wrote it; schema.Damaged; sqlite3.Error."""
    if not path.exists():
        return
    try:
        # read-only: closing a writable connection would fold the log into the database
        with closing(sqlite3.connect(path.absolute().as_uri() + "?mode=ro", uri=True)) as db:
            version = schema.newer_format(db)
    except (sqlite3.Error, UnicodeDecodeError) as e:
        if schema.is_damage(e):
            raise schema.Damaged(str(e)) from e
        raise
    if version is not None:
        raise StoreError(
            f"{path} has format {version}, this agentmem knows up to {len(schema.MIGRATIONS)}: it was written by a "
            "newer one; use that, or another --home"
        )
