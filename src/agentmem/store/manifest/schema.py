"""The manifest's tables: numbered migrations, a checksum in every row, and a check of the whole at
open.

SQLite notices damage to its own structure (`integrity_check`) but not to a value. So each row of
agents, branches, blocks and turns carries `sum`, kept by triggers: XXH3 over its other columns. A
row whose sum is wrong is dropped at open.
"""

import sqlite3

import xxhash

_APP = (
    0x61676D << 8
    # "agm": the application_id of format n is _APP + n, which tells a newer format from a flipped bit
)


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


def _v2(db: sqlite3.Connection) -> None:
    """Pins, lifetimes and hits of agents; keys of encrypted files; bytes written by the hour; row
    checksums.
    """
    db.execute("ALTER TABLE agents ADD COLUMN pinned INTEGER NOT NULL DEFAULT 0")
    db.execute("ALTER TABLE agents ADD COLUMN ttl REAL")  # seconds after last_used; NULL: for good
    db.execute("ALTER TABLE agents ADD COLUMN requests INTEGER NOT NULL DEFAULT 0")
    db.execute("ALTER TABLE agents ADD COLUMN hit_tokens INTEGER NOT NULL DEFAULT 0")
    db.execute("ALTER TABLE agents ADD COLUMN data_key BLOB")  # wrapped by the master key
    db.execute(
        "ALTER TABLE branches ADD COLUMN tail_key BLOB"
    )  # of the file, wrapped by the agent's data key
    db.execute(
        "CREATE TABLE block_keys (block BLOB NOT NULL, agent_id INTEGER NOT NULL REFERENCES agents ON DELETE CASCADE,"
        " wrapped BLOB NOT NULL, PRIMARY KEY (block, agent_id))"
    )
    db.execute("CREATE INDEX block_keys_agent ON block_keys (agent_id)")
    db.execute(
        "CREATE TABLE writes (hour INTEGER PRIMARY KEY, bytes INTEGER NOT NULL)"
    )  # hours since 1970
    for table in ("agents", "branches", "blocks"):
        db.execute(f"ALTER TABLE {table} ADD COLUMN sum BLOB")
        _keep_sums(db, table)


def _v3(db: sqlite3.Connection) -> None:
    """Parts of files, as JSON. Earlier files have none and can't be read any more: what names them
    goes, all of it.
    """
    for table in ("block_keys", "branches", "agents", "blocks"):
        db.execute(f"DELETE FROM {table}")
    db.execute("ALTER TABLE blocks ADD COLUMN parts TEXT NOT NULL DEFAULT '{}'")
    db.execute("ALTER TABLE branches ADD COLUMN tail_parts TEXT")
    for table in ("branches", "blocks"):
        db.execute(f"DROP TRIGGER {table}_inserted")
        db.execute(f"DROP TRIGGER {table}_updated")
        _keep_sums(db, table)


def _v4(db: sqlite3.Connection) -> None:
    """Turns: what was said, see turns.py."""
    db.execute(
        "CREATE TABLE turns (id TEXT PRIMARY KEY, agent_id INTEGER NOT NULL REFERENCES agents ON DELETE CASCADE,"
        " parent TEXT, content BLOB NOT NULL, created REAL NOT NULL, sum BLOB)"
    )
    db.execute("CREATE INDEX turns_agent ON turns (agent_id)")
    _keep_sums(db, "turns")


def _keep_sums(db: sqlite3.Connection, table: str) -> None:
    """Over the columns that it has now, of every row there is or will be."""
    columns = ", ".join(_columns(db, table))
    new = f"UPDATE {table} SET sum = rowsum({columns}) WHERE rowid = NEW.rowid"
    db.execute(f"CREATE TRIGGER {table}_inserted AFTER INSERT ON {table} BEGIN {new}; END")
    db.execute(
        f"CREATE TRIGGER {table}_updated AFTER UPDATE OF {columns} ON {table} BEGIN {new}; END"
    )
    db.execute(f"UPDATE {table} SET sum = rowsum({columns})")


MIGRATIONS = [
    _v1,
    _v2,
    _v3,
    _v4,
]  # to change the tables, append a function; never edit one that was released


class Damaged(Exception):
    """The file is no manifest any more: what it says can't be trusted."""


def migrate(db: sqlite3.Connection) -> None:
    """Bring an open database to the newest format; each step all or nothing. Raises Damaged."""
    db.create_function("rowsum", -1, _row_sum, deterministic=True)
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (application,) = db.execute("PRAGMA application_id").fetchone()
    if application != (_APP + version if version > 1 else 0):
        raise Damaged(f"format {version} of application {application:#x}")
    for number, step in enumerate(MIGRATIONS[version:], version + 1):
        db.execute("BEGIN IMMEDIATE")
        step(db)
        db.execute(f"PRAGMA user_version = {number}")
        db.execute(f"PRAGMA application_id = {_APP + number if number > 1 else 0}")
        db.execute("COMMIT")


def newer_format(db: sqlite3.Connection) -> int | None:
    """The format, if a newer agentmem wrote the database."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (application,) = db.execute("PRAGMA application_id").fetchone()
    return version if version > len(MIGRATIONS) and application == _APP + version else None


def is_older(db: sqlite3.Connection) -> bool:
    """Than the format of this agentmem."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    return version < len(MIGRATIONS)


def check(db: sqlite3.Connection) -> None:
    """Raises Damaged unless SQLite finds its structure whole and the tables are those of this
    format.
    """
    found = db.execute("PRAGMA integrity_check(1)").fetchone()
    if found != ("ok",):
        raise Damaged(str(found[0]))
    fresh = sqlite3.connect(":memory:", isolation_level=None)
    migrate(fresh)
    wanted = _tables(fresh)
    fresh.close()
    if _tables(db) != wanted:
        raise Damaged("its tables are not those of the format")


def _tables(db: sqlite3.Connection) -> list[tuple[str, str, str]]:
    rows = db.execute("SELECT type, name, sql FROM sqlite_schema ORDER BY name")
    # str: a damaged row's text may have become bytes
    return [(kind, name, " ".join(str(sql or "").split())) for kind, name, sql in rows]


def damaged_rows(db: sqlite3.Connection) -> dict[str, list[int]]:
    """By table, the row ids of those that don't match their checksum."""
    found = {}
    db.text_factory = lambda data: data.decode(
        errors="surrogateescape"
    )  # damaged text must not stop the search
    for table in ("agents", "branches", "blocks", "turns"):
        rows = db.execute(f"SELECT rowid, sum, {', '.join(_columns(db, table))} FROM {table}")
        found[table] = [rowid for rowid, stored, *values in rows if stored != _row_sum(*values)]
    db.text_factory = str
    return found


def drop_damaged_rows(db: sqlite3.Connection) -> int:
    """How many. Inside a transaction."""
    damaged = damaged_rows(db)
    for table, rows in damaged.items():
        db.executemany(f"DELETE FROM {table} WHERE rowid = ?", [(rowid,) for rowid in rows])
    # a block that is saved again has another key
    db.execute("DELETE FROM block_keys WHERE block NOT IN (SELECT key FROM blocks)")
    return sum(map(len, damaged.values()))


def is_damage(error: sqlite3.Error | UnicodeDecodeError) -> bool:
    """Whether an error while opening says that the file's content is wrong, rather than its disk or
    its lock.
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
