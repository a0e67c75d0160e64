"""Keys of encrypted files: each file has its own, wrapped by the key of every agent that holds it.

An agent's data key is wrapped by the master key. Delete the agent, and what only it held can't be
read any more; what another agent shares is under that one's key as well.
"""

import sqlite3
from collections.abc import Iterator, Mapping
from typing import Any

from ...errors import CorruptSegment
from ..files.crypto import Vault, new_key, seal, unseal


class FileKeys:
    """The keys in a manifest's rows, opened by a vault; changes are inside its transaction."""

    def __init__(self, db: sqlite3.Connection, vault: Vault):
        self._db, self._vault = db, vault

    def block_key(self, block: bytes) -> bytes | None:
        """Return the key of a block's file; None: there is none, or it can't be unwrapped."""
        return self.block_keys(block).get(block)

    def block_keys(self, block: bytes | None = None) -> dict[bytes, bytes]:
        """Return the key of every block's file, or of one's alone.

        A key that can't be unwrapped is left out, and so its block can't be read.
        """
        return {name: key for name, _, key in self._unwrap(self._block_rows(block)) if key}

    def _block_rows(self, block: bytes | None = None) -> list[tuple[bytes, int, bytes]]:
        return self._db.execute(
            "SELECT block, agent_id, wrapped FROM block_keys WHERE ?1 IS NULL OR block = ?1",
            (block,),
        ).fetchall()

    def tail_key(self, branch_id: str) -> bytes | None:
        """Return the key of a tail's file; None: there is none, or it can't be unwrapped."""
        return self.tail_keys(branch_id).get(branch_id)

    def tail_keys(self, branch_id: str | None = None) -> dict[str, bytes]:
        """Return the key of every tail's file by branch, or of one's alone, as `block_keys`."""
        rows = self._db.execute(
            "SELECT id, agent_id, tail_key FROM branches"
            " WHERE tail_key IS NOT NULL AND (?1 IS NULL OR id = ?1)",
            (branch_id,),
        )
        return {name: key for name, _, key in self._unwrap(rows.fetchall()) if key}

    def wrap(self, file_key: bytes, agent_id: int) -> bytes:
        """Return a file's key under the agent's, which is made where it has none yet."""
        return bytes(seal(self._data_key(agent_id), file_key, b"file"))

    def cover(self, agent_id: int, head: bytes | None, new: Mapping[bytes, bytes]) -> None:
        """Let the agent read the chain of blocks that ends in `head`.

        `new`: keys, by block, of files that no agent holds yet. Raises CorruptSegment where a
        block's key is lost.
        """
        while head is not None and not self._covers(agent_id, head):
            file_key = new.get(head) or self.block_key(head)
            if file_key is None:
                raise CorruptSegment(f"the key of block {head.hex()} is lost")
            self._db.execute(
                "INSERT INTO block_keys (block, agent_id, wrapped) VALUES (?, ?, ?)",
                (head, agent_id, self.wrap(file_key, agent_id)),
            )
            (head,) = self._db.execute(
                "SELECT parent FROM blocks WHERE key = ?", (head,)
            ).fetchone()

    def mend(self) -> dict[bytes, bytes]:
        """Give holders whose copy of a block's key is damaged a new one, from another holder's.

        Returns all keys of blocks.
        """
        rows = list(self._unwrap(self._block_rows()))
        found = {block: file_key for block, _, file_key in rows if file_key}
        for block, agent_id, file_key in rows:
            if file_key is None and block in found:
                self._db.execute(
                    "UPDATE block_keys SET wrapped = ? WHERE block = ? AND agent_id = ?",
                    (self.wrap(found[block], agent_id), block, agent_id),
                )
        return found

    def rewrap(self, agent_id: int, to_agent_id: int) -> None:
        """Put all files that an agent holds under another one's key, before its branches move."""
        tails = self._db.execute(
            "SELECT id, agent_id, tail_key FROM branches"
            " WHERE tail_key IS NOT NULL AND agent_id = ?",
            (agent_id,),
        ).fetchall()
        for branch_id, _, file_key in self._unwrap(tails):
            if file_key:
                wrapped = self.wrap(file_key, to_agent_id)
                self._db.execute(
                    "UPDATE branches SET tail_key = ? WHERE id = ?", (wrapped, branch_id)
                )
        heads = self._db.execute(
            "SELECT head FROM branches WHERE agent_id = ?", (agent_id,)
        ).fetchall()
        for (head,) in heads:
            self.cover(to_agent_id, head, {})

    def seal_turn(self, content: bytes, turn_id: str, agent_id: int) -> bytes:
        """Encrypt a turn under its agent's key."""
        return bytes(seal(self._data_key(agent_id), content, b"turn:" + turn_id.encode()))

    def unseal_turn(self, sealed: bytes, turn_id: str, agent_id: int) -> bytes | None:
        """Decrypt a turn; None: it can't be decrypted."""
        data_key = self._stored_data_key(agent_id)
        try:
            return unseal(data_key, sealed, b"turn:" + turn_id.encode()) if data_key else None
        except CorruptSegment:
            return None

    def _covers(self, agent_id: int, block: bytes) -> bool:
        row = self._db.execute(
            "SELECT 1 FROM block_keys WHERE block = ? AND agent_id = ?", (block, agent_id)
        )
        return row.fetchone() is not None

    def _unwrap(
        self, rows: list[tuple[Any, int, bytes]]
    ) -> Iterator[tuple[Any, int, bytes | None]]:
        """Yield names, agents and file keys; None: it can't be unwrapped."""
        data_keys: dict[int, bytes | None] = {}
        for name, agent_id, wrapped in rows:
            if agent_id not in data_keys:
                data_keys[agent_id] = self._stored_data_key(agent_id)
            yield name, agent_id, _unseal_key(data_keys[agent_id], wrapped)

    def _stored_data_key(self, agent_id: int) -> bytes | None:
        row = self._db.execute("SELECT data_key FROM agents WHERE id = ?", (agent_id,)).fetchone()
        if row is None or row[0] is None:
            return None
        try:
            return self._vault.unwrap(row[0], b"agent")
        except CorruptSegment:
            return None

    def _data_key(self, agent_id: int) -> bytes:
        """Return the agent's data key, made when it is first needed.

        It is not kept in RAM: a rolled back transaction takes it along.
        """
        data_key = self._stored_data_key(agent_id)
        if data_key is None:
            data_key = new_key()
            wrapped = self._vault.wrap(data_key, b"agent")
            self._db.execute("UPDATE agents SET data_key = ? WHERE id = ?", (wrapped, agent_id))
        return data_key


def _unseal_key(data_key: bytes | None, wrapped: bytes) -> bytes | None:
    try:
        return unseal(data_key, wrapped, b"file") if data_key else None
    except CorruptSegment:
        return None
