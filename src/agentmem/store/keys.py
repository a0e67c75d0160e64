"""Keys of encrypted files: each file has one of its own, wrapped by the data key of every agent
that holds the file.

An agent's data key is wrapped by the master key. Delete the agent, and what only it held can't be
read any more; what another agent shares is under that one's key as well.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import CorruptSegment
from .files.crypto import Vault, new_key, seal, unseal
from .manifest.manifest import Manifest


class FileKeys:
    """On the thread that has the manifest; changes are made inside its transaction."""

    def __init__(self, vault: Vault, manifest: Manifest):
        self._vault, self._db = vault, manifest.db

    def block_key(self, block: bytes) -> bytes | None:
        return self.block_keys(block).get(block)

    def block_keys(self, block: bytes | None = None) -> dict[bytes, bytes]:
        """Of one block, or of all. A key that can't be unwrapped is left out, and so its block
        can't be read.
        """
        return {name: key for name, _, key in self._unwrap(self._block_rows(block)) if key}

    def _block_rows(self, block: bytes | None = None) -> list[tuple[bytes, int, bytes]]:
        return self._db.execute(
            "SELECT block, agent_id, wrapped FROM block_keys WHERE ?1 IS NULL OR block = ?1",
            (block,),
        ).fetchall()

    def tail_key(self, branch_id: str) -> bytes | None:
        return self.tail_keys(branch_id).get(branch_id)

    def tail_keys(self, branch_id: str | None = None) -> dict[str, bytes]:
        rows = self._db.execute(
            "SELECT id, agent_id, tail_key FROM branches WHERE tail_key IS NOT NULL AND (?1 IS NULL OR id = ?1)",
            (branch_id,),
        )
        return {name: key for name, _, key in self._unwrap(rows.fetchall()) if key}

    def wrap(self, file_key: bytes, agent_id: int) -> bytes:
        return bytes(seal(self._data_key(agent_id), file_key, b"file"))

    def cover(self, agent_id: int, head: bytes | None, new: Mapping[bytes, bytes]) -> None:
        """Let the agent read the chain of blocks that ends in `head`; `new`: keys of files that no
        agent holds yet.
        """
        while head is not None and not self._covers(agent_id, head):
            file_key = new.get(head) or self.block_key(head)
            if file_key is None:
                raise CorruptSegment(f"the key of block {head.hex()} is lost")
            row = (head, agent_id, self.wrap(file_key, agent_id))
            self._db.execute(
                "INSERT INTO block_keys (block, agent_id, wrapped) VALUES (?, ?, ?)", row
            )
            (head,) = self._db.execute(
                "SELECT parent FROM blocks WHERE key = ?", (head,)
            ).fetchone()

    def mend(self) -> dict[bytes, bytes]:
        """Give a holder whose copy of a block's key is damaged a new one, from another holder's;
        all block keys.
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
        """Put all that an agent holds under another one's key, before its branches move there."""
        tails = self._db.execute(
            "SELECT id, agent_id, tail_key FROM branches WHERE tail_key IS NOT NULL AND agent_id = ?",
            (agent_id,),
        ).fetchall()
        for branch_id, _, file_key in self._unwrap(tails):
            if file_key:
                wrapped = self.wrap(file_key, to_agent_id)
                self._db.execute(
                    "UPDATE branches SET tail_key = ? WHERE id = ?", (wrapped, branch_id)
                )
        for (head,) in self._db.execute(
            "SELECT head FROM branches WHERE agent_id = ?", (agent_id,)
        ).fetchall():
            self.cover(to_agent_id, head, {})

    def seal_turn(self, content: bytes, turn_id: str, agent_id: int) -> bytes:
        return bytes(seal(self._data_key(agent_id), content, b"turn:" + turn_id.encode()))

    def unseal_turn(self, sealed: bytes, turn_id: str, agent_id: int) -> bytes | None:
        """None: it can't be decrypted."""
        data_key = self._stored_data_key(agent_id)
        try:
            return unseal(data_key, sealed, b"turn:" + turn_id.encode()) if data_key else None
        except CorruptSegment:
            return None

    def reseal_turns(self, agent_id: int, to_agent_id: int) -> None:
        """Put an agent's turns under another one's key, before they move there. One that can't be
        read goes.
        """
        rows = self._db.execute(
            "SELECT id, content FROM turns WHERE agent_id = ?", (agent_id,)
        ).fetchall()
        for turn_id, sealed in rows:
            content = self.unseal_turn(sealed, turn_id, agent_id)
            if content is None:
                self._db.execute("DELETE FROM turns WHERE id = ?", (turn_id,))
            else:
                resealed = self.seal_turn(content, turn_id, to_agent_id)
                self._db.execute("UPDATE turns SET content = ? WHERE id = ?", (resealed, turn_id))

    def _covers(self, agent_id: int, block: bytes) -> bool:
        row = self._db.execute(
            "SELECT 1 FROM block_keys WHERE block = ? AND agent_id = ?", (block, agent_id)
        )
        return row.fetchone() is not None

    def _unwrap(
        self, rows: list[tuple[Any, int, bytes]]
    ) -> Iterator[tuple[Any, int, bytes | None]]:
        """Names, agents and file keys; None: it can't be unwrapped."""
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
        """Made when the agent first needs it. Not kept in RAM: a rolled back transaction takes it
        along.
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
