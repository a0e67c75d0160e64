"""The manifest's SQLite database (WAL): how it is opened, and changed in transactions."""

import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Self

from ...errors import AgentMemError, StoreError
from . import schema

log = logging.getLogger(__name__)
_HOURS_KEPT = 48
_PRAGMAS = (
    "journal_mode = WAL",
    "journal_size_limit = 1048576",
    "wal_autocheckpoint = 200",
    "synchronous = FULL",
    # macOS: see segment._fsync
    "fullfsync = ON",
    "checkpoint_fullfsync = ON",
    "foreign_keys = ON",
    # a deleted agent's tokens don't stay in free pages
    "secure_delete = ON",
)


class Database:
    """One connection, used by one thread at a time: by whoever opens the store, then the writer."""

    damaged_rows = 0  # found and dropped when it was opened

    def __init__(self, db: sqlite3.Connection):
        self.db = db

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open or create the manifest at `path`, without the rows that are damaged.

        A store of an older format starts empty, and the log says so in one line. A newer format
        raises StoreError and leaves every byte as it was. Raises schema.Damaged where the file is
        no manifest any more, and sqlite3.Error.
        """
        if 0 < stored_format(path) < schema.FORMAT:
            _start_empty(path)
        # SQLite gives -wal and -shm the database's mode
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        os.fchmod(fd, 0o600)
        os.close(fd)
        # nobody else should hold a lock on it; where someone does, saves fail rather than pile up
        # behind it
        db = sqlite3.connect(path, timeout=1.0, isolation_level=None, check_same_thread=False)
        try:
            for pragma in _PRAGMAS:
                db.execute(f"PRAGMA {pragma}")
            schema.prepare(db)
            if schema.format_of(db) == 0:
                schema.create(db)
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

    @classmethod
    def open_read_only(cls, path: Path) -> Self:
        """Open the manifest at `path` to look at it, beside a server too; nothing is changed.

        One of an older format is empty, as the next open will find it. Raises as `open` does.
        """
        if stored_format(path) == schema.FORMAT:
            return cls(_connect_read_only(path))
        empty = sqlite3.connect(":memory:", isolation_level=None)
        schema.prepare(empty)
        schema.create(empty)
        return cls(empty)

    def close(self) -> None:
        """Close the connection; SQLite folds the log into the database."""
        self.db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make changes all or nothing, durable when the block ends without an error."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.db.execute("COMMIT")
        finally:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Undo the changes of one part of a transaction where it raises an AgentMemError."""
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

    def shrink(self) -> None:
        """Give the pages of deleted rows back to the disk."""
        self.db.execute("VACUUM")
        self.truncate_wal()

    def count_damaged_rows(self) -> int:
        """Return how many rows don't match their checksum, and leave them."""
        return sum(len(rows) for rows in schema.damaged_rows(self.db).values())

    # What it is about

    def meta(self) -> dict[str, str]:
        """Return what the blocks were made with."""
        return dict(self.db.execute("SELECT key, value FROM meta"))

    def set_meta(self, meta: dict[str, str]) -> None:
        """Note what the blocks are made with."""
        self.db.execute("DELETE FROM meta")
        self.db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())

    def writes(self) -> dict[int, int]:
        """Return the bytes written to files in the last days, by hour since 1970."""
        return dict(self.db.execute("SELECT hour, bytes FROM writes ORDER BY hour"))

    def count_writes(self, nbytes: int, hour: int) -> None:
        """Add `nbytes` to what was written in an hour since 1970."""
        self.db.execute(
            "INSERT INTO writes VALUES (?, ?)"
            " ON CONFLICT DO UPDATE SET bytes = bytes + excluded.bytes",
            (hour, nbytes),
        )
        self.db.execute("DELETE FROM writes WHERE hour < ?", (hour - _HOURS_KEPT,))


def stored_format(path: Path) -> int:
    """Return the format of the manifest at `path`, 0 where there is none yet.

    Raises StoreError where a newer agentmem wrote it; schema.Damaged; sqlite3.Error.
    """
    if not path.exists():
        return 0
    try:
        with closing(_connect_read_only(path)) as db:
            found = schema.format_of(db)
    except (sqlite3.Error, UnicodeDecodeError) as e:
        if schema.is_damage(e):
            raise schema.Damaged(str(e)) from e
        raise
    if found > schema.FORMAT:
        raise StoreError(
            f"{path} has format {found}, this agentmem knows up to {schema.FORMAT}: it was written "
            "by a newer one; use that, or another --home"
        )
    return found


def files_of(path: Path) -> list[Path]:
    """Return the files that make up the manifest at `path`: the database, its log, and its index.

    The database comes first: SQLite drops the log of a database that is missing.
    """
    return [path.with_name(path.name + suffix) for suffix in ("", "-wal", "-shm")]


def _connect_read_only(path: Path) -> sqlite3.Connection:
    # read-only: closing a writable connection would fold the log into the database
    return sqlite3.connect(path.absolute().as_uri() + "?mode=ro", uri=True)


def _start_empty(path: Path) -> None:
    """Remove a manifest of an older format; its files, which no row names then, go at open."""
    log.warning(
        "the store at %s has format %d, this agentmem keeps format %d: starting empty",
        path.parent,
        stored_format(path),
        schema.FORMAT,
    )
    for file in files_of(path):
        file.unlink(missing_ok=True)
