"""The manifest's tables, a checksum in every row, and a check of the whole when it is opened.

SQLite notices damage to its own structure (`integrity_check`) but not to a value. So each row of
agents, branches, blocks and turns carries `sum`, kept by triggers: XXH3 over its other columns. A
row whose sum is wrong is dropped at open.

Token ids and the parts of a file stand in columns of their own; the last functions pack them.
"""

import json
import sqlite3
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import xxhash

from ..files.crypto import seal, unseal

# Rises with every change of the tables. Formats 1 to 4 were never released: a store of one of them
# starts empty. Once a format is released, what brings it to the next one is a numbered function in
# one list of migrations; that list is empty so far, so there is none.
FORMAT = 5
# "agm": a manifest's application_id is this and its format, which tells a format from a flipped bit
_APPLICATION = 0x61676D << 8

_TABLES = """
CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL
);
CREATE TABLE agents (
    id INTEGER PRIMARY KEY,
    namespace TEXT NOT NULL,
    name TEXT NOT NULL,
    created REAL NOT NULL,              -- Unix seconds
    last_used REAL NOT NULL,
    pinned INTEGER NOT NULL DEFAULT 0,
    ttl REAL,                           -- seconds after last_used, NULL for good
    requests INTEGER NOT NULL DEFAULT 0,
    hit_tokens INTEGER NOT NULL DEFAULT 0,
    data_key BLOB,                      -- wrapped by the master key
    sum BLOB,
    UNIQUE (namespace, name)
);
CREATE TABLE blocks (
    key BLOB PRIMARY KEY,
    parent BLOB,                        -- NULL at the root
    tokens BLOB NOT NULL,
    nbytes INTEGER NOT NULL,
    checksum BLOB NOT NULL,
    created REAL NOT NULL,
    parts TEXT NOT NULL,                -- bytes of each, as JSON
    sum BLOB
);
CREATE INDEX blocks_parent ON blocks (parent);
CREATE TABLE branches (
    id TEXT PRIMARY KEY,
    agent_id INTEGER NOT NULL REFERENCES agents ON DELETE CASCADE,
    head BLOB,                          -- key of a block
    last_used REAL NOT NULL,
    tail_tokens BLOB,                   -- these are NULL where there is no tail
    tail_nbytes INTEGER,
    tail_checksum BLOB,
    tail_parts TEXT,
    tail_generation INTEGER,
    tail_key BLOB,                      -- of its file, wrapped by the agent's data key
    sum BLOB
);
CREATE INDEX branches_agent ON branches (agent_id);
CREATE INDEX branches_head ON branches (head);
CREATE TABLE block_keys (
    block BLOB NOT NULL,
    agent_id INTEGER NOT NULL REFERENCES agents ON DELETE CASCADE,
    wrapped BLOB NOT NULL,              -- key of the block's file, under the agent's data key
    PRIMARY KEY (block, agent_id)
);
CREATE INDEX block_keys_agent ON block_keys (agent_id);
CREATE TABLE turns (
    id TEXT PRIMARY KEY,
    agent_id INTEGER NOT NULL REFERENCES agents ON DELETE CASCADE,
    parent TEXT,                        -- the turn that it follows
    content BLOB NOT NULL,
    created REAL NOT NULL,
    sum BLOB
);
CREATE INDEX turns_agent ON turns (agent_id);
CREATE TABLE writes (
    hour INTEGER PRIMARY KEY,           -- since 1970
    bytes INTEGER NOT NULL
)
"""
_SUMMED = ("agents", "branches", "blocks", "turns")


class Damaged(Exception):
    """The file is no manifest any more: what it says can't be trusted."""


def prepare(db: sqlite3.Connection) -> None:
    """Give a connection the function that the triggers call; no row can be changed without it."""
    db.create_function("rowsum", -1, _row_sum, deterministic=True)


def format_of(db: sqlite3.Connection) -> int:
    """Return the format of a manifest, 0 for an empty database. Raises Damaged, sqlite3.Error."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (application,) = db.execute("PRAGMA application_id").fetchone()
    if application != (_APPLICATION + version if version > 1 else 0):
        raise Damaged(f"format {version} of application {application:#x}")
    return int(version)


def create(db: sqlite3.Connection) -> None:
    """Make the tables of this format in an empty database: all of them, or none."""
    db.execute("BEGIN IMMEDIATE")
    for statement in _TABLES.split(";"):
        db.execute(statement)
    for table in _SUMMED:
        _keep_sums(db, table)
    db.execute(f"PRAGMA user_version = {FORMAT}")
    db.execute(f"PRAGMA application_id = {_APPLICATION + FORMAT}")
    db.execute("COMMIT")


def _keep_sums(db: sqlite3.Connection, table: str) -> None:
    columns = ", ".join(_columns(db, table))
    new = f"UPDATE {table} SET sum = rowsum({columns}) WHERE rowid = NEW.rowid"
    db.execute(f"CREATE TRIGGER {table}_inserted AFTER INSERT ON {table} BEGIN {new}; END")
    db.execute(
        f"CREATE TRIGGER {table}_updated AFTER UPDATE OF {columns} ON {table} BEGIN {new}; END"
    )


def check(db: sqlite3.Connection) -> None:
    """Raise Damaged unless SQLite finds its structure whole and the tables are of this format."""
    found = db.execute("PRAGMA integrity_check(1)").fetchone()
    if found != ("ok",):
        raise Damaged(str(found[0]))
    fresh = sqlite3.connect(":memory:", isolation_level=None)
    prepare(fresh)
    create(fresh)
    wanted = _tables(fresh)
    fresh.close()
    if _tables(db) != wanted:
        raise Damaged("its tables are not those of the format")


def _tables(db: sqlite3.Connection) -> list[tuple[str, str, str]]:
    rows = db.execute("SELECT type, name, sql FROM sqlite_schema ORDER BY name")
    # str: a damaged row's text may have become bytes
    return [(kind, name, " ".join(str(sql or "").split())) for kind, name, sql in rows]


def damaged_rows(db: sqlite3.Connection) -> dict[str, list[int]]:
    """Return, by table, the row ids of the rows that don't match their checksum."""
    found: dict[str, list[int]] = {}
    # damaged text must not stop the search
    db.text_factory = lambda data: data.decode(errors="surrogateescape")
    for table in _SUMMED:
        rows = db.execute(f"SELECT rowid, sum, {', '.join(_columns(db, table))} FROM {table}")
        found[table] = [rowid for rowid, stored, *values in rows if stored != _row_sum(*values)]
    db.text_factory = str
    return found


def drop_damaged_rows(db: sqlite3.Connection) -> int:
    """Delete the rows that don't match their checksum, inside a transaction; return how many."""
    damaged = damaged_rows(db)
    for table, rows in damaged.items():
        db.executemany(f"DELETE FROM {table} WHERE rowid = ?", [(rowid,) for rowid in rows])
    # a block that is saved again has another key
    db.execute("DELETE FROM block_keys WHERE block NOT IN (SELECT key FROM blocks)")
    return sum(map(len, damaged.values()))


def is_damage(error: sqlite3.Error | UnicodeDecodeError) -> bool:
    """Return whether an error while opening says that the file's content is wrong.

    The others speak of its disk or its lock.
    """
    if isinstance(error, UnicodeDecodeError):  # of SQLite's own message, which quotes damaged text
        return True
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    return code in (
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_ERROR,
        sqlite3.SQLITE_READONLY,
    )


def _columns(db: sqlite3.Connection, table: str) -> list[str]:
    return [name for _, name, *_ in db.execute(f"PRAGMA table_info({table})") if name != "sum"]


def _row_sum(*values: object) -> bytes:
    return xxhash.xxh3_64_digest(repr(values).encode())


def pack_tokens(tokens: np.ndarray, file_key: bytes | None) -> bytes:
    """Return token ids as stored: uint32, little-endian, sealed by the key of their file."""
    data = np.ascontiguousarray(tokens, "<u4").tobytes()
    return bytes(seal(file_key, data, b"tokens")) if file_key else data


def unpack_tokens(blob: bytes, file_key: bytes | None) -> np.ndarray:
    """Return token ids from what `pack_tokens` gave. Raises CorruptSegment."""
    return np.frombuffer(unseal(file_key, blob, b"tokens") if file_key else blob, "<u4")


def pack_parts(parts: Mapping[str, int]) -> str:
    """Return the bytes of each part of a file as JSON."""
    return json.dumps(dict(parts), separators=(",", ":"))


@lru_cache(256)
def unpack_parts(text: str) -> Mapping[str, int]:
    """Return the bytes of each part of a file, from JSON.

    It is not to be changed: equal ones, as most of a store's are, are one.
    """
    parts: dict[str, int] = json.loads(text)
    return parts
