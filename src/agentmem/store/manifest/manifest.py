"""The manifest: agents, branches and blocks in a database. It is the truth about the store."""

import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ...agent_key import AgentKey
from ...errors import NotFound
from ..files.crypto import Vault
from ..records import (
    BlockRecord,
    BranchHead,
    BranchRecord,
    FileRef,
    Holding,
    StoreIndex,
    TailRecord,
)
from .agents import AgentRows
from .database import Database
from .file_keys import FileKeys
from .schema import pack_parts, pack_tokens, unpack_parts, unpack_tokens
from .turns import TurnRows

_NO_TAIL = (
    "tail_tokens = NULL, tail_nbytes = NULL, tail_checksum = NULL, tail_parts = NULL,"
    " tail_generation = NULL, tail_key = NULL"
)


@dataclass(frozen=True)
class Contents:
    """All that a manifest names, with the keys of encrypted files."""

    index: StoreIndex
    block_files: dict[bytes, FileRef]  # by block
    tail_files: dict[str, FileRef]  # by branch


class Manifest(Database):
    """Rows of agents, branches, blocks and turns, in the store's words.

    `keys` is None until `unlock`, and where nothing is encrypted.
    """

    def __init__(self, db: sqlite3.Connection):
        super().__init__(db)
        self.agents = AgentRows(db)
        self.turns = TurnRows(db, self.agents)
        self.keys: FileKeys | None = None

    def unlock(self, vault: Vault) -> None:
        """Encrypt from now on what is entered, and decrypt what is looked up."""
        self.keys = self.turns.keys = FileKeys(self.db, vault)

    # What the store holds

    def is_empty(self) -> bool:
        """Return whether no block, tail or turn is stored."""
        return not self.parents() and not self.tail_files() and not self.turns.total_bytes()

    def is_sealed(self) -> bool:
        """Return whether it holds keys of encrypted files."""
        return self.db.execute("SELECT 1 FROM block_keys LIMIT 1").fetchone() is not None

    def contents(self) -> Contents:
        """Return all that is stored."""
        block_keys = self.keys.block_keys() if self.keys else {}
        tail_keys = self.keys.tail_keys() if self.keys else {}
        return Contents(
            StoreIndex(
                agents=self.agents.all(),
                branches=self._branches(tail_keys),
                blocks=self._blocks(block_keys),
            ),
            {k: replace(ref, key=block_keys.get(k)) for k, ref in self.block_files().items()},
            {id: replace(ref, key=tail_keys.get(id)) for id, ref in self.tail_files().items()},
        )

    def _branches(self, tail_keys: Mapping[str, bytes]) -> list[BranchRecord]:
        found = self.db.execute(
            "SELECT b.id, namespace, name, head, b.last_used,"
            " tail_tokens, tail_nbytes, tail_checksum, tail_parts"
            " FROM branches b JOIN agents a ON a.id = agent_id ORDER BY b.rowid"
        )
        branches = []
        for branch_id, namespace, name, head, last_used, tokens, nbytes, checksum, parts in found:
            tail = None
            if tokens is not None:
                tail = TailRecord(
                    tokens=unpack_tokens(tokens, tail_keys.get(branch_id)),
                    nbytes=nbytes,
                    checksum=checksum,
                    parts=unpack_parts(parts),
                )
            branch = BranchRecord(
                id=branch_id,
                agent=AgentKey(namespace, name),
                head=head,
                tail=tail,
                last_used=last_used,
            )
            branches.append(branch)
        return branches

    def _blocks(self, block_keys: Mapping[bytes, bytes]) -> list[BlockRecord]:
        found = self.db.execute(
            "SELECT key, parent, tokens, nbytes, checksum, created, parts FROM blocks"
            " ORDER BY rowid"
        )
        return [
            BlockRecord(
                key=key,
                parent=parent,
                tokens=unpack_tokens(tokens, block_keys.get(key)),
                nbytes=nbytes,
                checksum=checksum,
                created=created,
                parts=unpack_parts(parts),
            )
            for key, parent, tokens, nbytes, checksum, created, parts in found
        ]

    def parent(self, key: bytes) -> bytes | None:
        """Return the key of the block before this one. Raises NotFound: there is no such block."""
        row = self.db.execute("SELECT parent FROM blocks WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise NotFound(f"block {key.hex()} isn't in the store")
        parent: bytes | None = row[0]
        return parent

    def parents(self) -> dict[bytes, bytes | None]:
        """Return parents by key, each after its own parent, which was added before it."""
        return dict(self.db.execute("SELECT key, parent FROM blocks ORDER BY rowid"))

    def heads(self) -> dict[str, bytes | None]:
        """Return the last block of each branch, by branch."""
        return dict(self.db.execute("SELECT id, head FROM branches"))

    def has_block(self, key: bytes) -> bool:
        """Return whether the block is stored."""
        row = self.db.execute("SELECT 1 FROM blocks WHERE key = ?", (key,)).fetchone()
        return row is not None

    def block_file(self, key: bytes) -> FileRef | None:
        """Return a block's file with its key, without its parts; None: it isn't stored."""
        row = self.db.execute(
            "SELECT nbytes, checksum FROM blocks WHERE key = ?", (key,)
        ).fetchone()
        if row is None:
            return None
        nbytes, checksum = row
        return FileRef(nbytes, checksum, key=self.keys.block_key(key) if self.keys else None)

    def block_files(self) -> dict[bytes, FileRef]:
        """Return the files of all blocks, without their keys and parts."""
        found = self.db.execute("SELECT key, nbytes, checksum FROM blocks")
        return {key: FileRef(nbytes, checksum) for key, nbytes, checksum in found}

    def block_parts(self, key: bytes) -> Mapping[str, int]:
        """Return the bytes of each part of a block's file."""
        (text,) = self.db.execute("SELECT parts FROM blocks WHERE key = ?", (key,)).fetchone()
        return unpack_parts(text)

    def tail_file(self, branch_id: str) -> FileRef | None:
        """Return a tail's file with its key, without its parts; None: there is no tail."""
        row = self.db.execute(
            "SELECT tail_nbytes, tail_checksum, tail_generation FROM branches"
            " WHERE id = ? AND tail_generation IS NOT NULL",
            (branch_id,),
        ).fetchone()
        if row is None:
            return None
        nbytes, checksum, generation = row
        file_key = self.keys.tail_key(branch_id) if self.keys else None
        return FileRef(nbytes, checksum, generation, file_key)

    def tail_files(self) -> dict[str, FileRef]:
        """Return the files of all tails by branch, without their keys and parts."""
        found = self.db.execute(
            "SELECT id, tail_nbytes, tail_checksum, tail_generation FROM branches"
            " WHERE tail_generation IS NOT NULL"
        )
        return {
            branch_id: FileRef(nbytes, checksum, generation)
            for branch_id, nbytes, checksum, generation in found
        }

    def holdings(self) -> list[Holding]:
        """Return what each branch holds and when it was used."""
        found = self.db.execute(
            "SELECT b.id, head, tail_nbytes, b.last_used, pinned"
            " FROM branches b JOIN agents a ON a.id = agent_id"
        )
        return [
            Holding(
                branch_id=branch_id,
                head=head,
                tail_bytes=tail_bytes or 0,
                last_used=last_used,
                pinned=bool(pinned),
            )
            for branch_id, head, tail_bytes, last_used, pinned in found
        ]

    def branches_through(self, key: bytes) -> list[str]:
        """Return the branches whose chain contains the block."""
        found = self.db.execute(
            "WITH RECURSIVE below(key) AS"
            " (VALUES (?) UNION SELECT blocks.key FROM blocks JOIN below ON parent = below.key)"
            " SELECT id FROM branches WHERE head IN below",
            (key,),
        )
        return [branch_id for (branch_id,) in found]

    def counts(self) -> tuple[int, int]:
        """Return how many agents and branches there are."""
        agents, branches = self.db.execute(
            "SELECT (SELECT count(*) FROM agents), (SELECT count(*) FROM branches)"
        ).fetchone()
        return int(agents), int(branches)

    # Changes of blocks, each inside a transaction

    def require_block(self, key: bytes | None) -> None:
        """Raise NotFound unless `key` is a block or None (no block at all)."""
        if key is not None and not self.has_block(key):
            raise NotFound(
                f"block {key.hex()} isn't in the store; save it, from the root on, before what "
                "follows it"
            )

    def add_block(self, block: BlockRecord, file_key: bytes | None) -> None:
        """Enter a block, whose file is written, and encrypted if it has a key."""
        self.require_block(block.parent)
        self.db.execute(
            "INSERT INTO blocks (key, parent, tokens, nbytes, checksum, created, parts)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                block.key,
                block.parent,
                pack_tokens(block.tokens, file_key),
                block.nbytes,
                block.checksum,
                block.created,
                pack_parts(block.parts),
            ),
        )

    def delete_block(self, key: bytes) -> None:
        """Delete a block; branches that end in it end in its parent then, without a tail."""
        self.db.execute(
            f"UPDATE branches SET head = ?, {_NO_TAIL} WHERE head = ?", (self.parent(key), key)
        )
        self._delete_blocks([key])

    def delete_unreachable(self) -> list[bytes]:
        """Delete every block that is in no branch's chain; return their keys."""
        found = self.db.execute(
            "WITH RECURSIVE live(key) AS (SELECT head FROM branches WHERE head IS NOT NULL"
            " UNION SELECT parent FROM blocks JOIN live USING (key) WHERE parent IS NOT NULL)"
            " SELECT key FROM blocks WHERE key NOT IN live"
        ).fetchall()
        keys = [key for (key,) in found]
        self._delete_blocks(keys)
        return keys

    def _delete_blocks(self, keys: Iterable[bytes]) -> None:
        rows = [(key,) for key in keys]
        self.db.executemany("DELETE FROM blocks WHERE key = ?", rows)
        self.db.executemany("DELETE FROM block_keys WHERE block = ?", rows)

    def forget_blocks(self) -> None:
        """Delete all blocks and what is made of them. What was said stays."""
        for table in ("block_keys", "branches", "blocks"):
            self.db.execute(f"DELETE FROM {table}")
        self.agents.delete_bare()

    # Changes of branches, each inside a transaction

    def put_branch(self, branch: BranchHead, new_keys: Mapping[bytes, bytes] | None = None) -> None:
        """Add the branch (and agent) or move it to its head; a tail that doesn't follow that goes.

        `new_keys`: keys, by block, of encrypted files that no agent holds yet. Raises NotFound: the
        head isn't stored; CorruptSegment: its key, or that of a block before it, is lost.
        """
        self.require_block(branch.head)
        agent_id = self.agents.enter(branch.agent, branch.last_used)
        self.db.execute(
            f"UPDATE branches SET {_NO_TAIL} WHERE id = ? AND head IS NOT ?",
            (branch.branch_id, branch.head),
        )
        self.db.execute(
            "INSERT INTO branches (id, agent_id, head, last_used) VALUES (?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET"
            " head = excluded.head, last_used = max(last_used, excluded.last_used)",
            (branch.branch_id, agent_id, branch.head, branch.last_used),
        )
        if self.keys:
            self.keys.cover(agent_id, branch.head, new_keys or {})

    def touch_branch(self, branch_id: str, last_used: float) -> None:
        """Note when a branch was used, in Unix seconds; its last use never goes back."""
        self.db.execute(
            "UPDATE branches SET last_used = max(last_used, ?) WHERE id = ?", (last_used, branch_id)
        )

    def set_tail(
        self, branch_id: str, tail: TailRecord, generation: int, file_key: bytes | None
    ) -> None:
        """Give a branch a tail, whose file is written, and encrypted if it has a key."""
        self.db.execute(
            "UPDATE branches SET tail_tokens = ?, tail_nbytes = ?, tail_checksum = ?,"
            " tail_parts = ?, tail_generation = ?, tail_key = ? WHERE id = ?",
            (
                pack_tokens(tail.tokens, file_key),
                tail.nbytes,
                tail.checksum,
                pack_parts(tail.parts),
                generation,
                self._wrapped(file_key, branch_id),
                branch_id,
            ),
        )

    def copy_tail(self, source: str, branch_id: str, generation: int) -> None:
        """Give a branch the tail of another one, `source`, with the same head.

        Its file has a second name, under `generation`.
        """
        file_key = self.keys.tail_key(source) if self.keys else None
        self.db.execute(
            "UPDATE branches SET (tail_tokens, tail_nbytes, tail_checksum, tail_parts) ="
            " (SELECT tail_tokens, tail_nbytes, tail_checksum, tail_parts"
            " FROM branches WHERE id = ?),"
            " tail_generation = ?, tail_key = ? WHERE id = ?",
            (source, generation, self._wrapped(file_key, branch_id), branch_id),
        )

    def _wrapped(self, file_key: bytes | None, branch_id: str) -> bytes | None:
        """Return a file's key under that of the branch's agent."""
        if file_key is None or self.keys is None:
            return None
        (agent_id,) = self.db.execute(
            "SELECT agent_id FROM branches WHERE id = ?", (branch_id,)
        ).fetchone()
        return self.keys.wrap(file_key, agent_id)

    def clear_tail(self, branch_id: str) -> None:
        """Let a branch end with its head."""
        self.db.execute(f"UPDATE branches SET {_NO_TAIL} WHERE id = ?", (branch_id,))

    def cut_branch(self, branch_id: str, head: bytes | None) -> None:
        """Let a branch end with an earlier block, without a tail."""
        self.db.execute(f"UPDATE branches SET head = ?, {_NO_TAIL} WHERE id = ?", (head, branch_id))

    def delete_branch(self, branch_id: str) -> None:
        """Delete a branch, and its agent if that has neither branches nor turns any more."""
        found = self.db.execute(
            "DELETE FROM branches WHERE id = ? RETURNING agent_id", (branch_id,)
        ).fetchall()
        self.agents.delete_if_bare(agent_id for (agent_id,) in found)

    def delete_empty_branches(self) -> None:
        """Delete the branches that have no block and no tail, each as `delete_branch` does."""
        found = self.db.execute(
            "DELETE FROM branches WHERE head IS NULL AND tail_generation IS NULL RETURNING agent_id"
        ).fetchall()
        self.agents.delete_if_bare(agent_id for (agent_id,) in found)

    # Changes of agents with all that they have, each inside a transaction

    def move_agent(self, source: AgentKey, target: AgentKey) -> None:
        """Rename an agent.

        Where the name is taken, its branches and turns go to the agent that has it, whose pin and
        lifetime stay. Raises NotFound: there is no such agent.
        """
        source_id, target_id = self.agents.id_of(source), self.agents.id_of(target)
        if source_id is None:
            raise NotFound(f"there is no agent {source.agent_id!r} to be moved")
        if target_id is None:
            self.agents.rename(source_id, target)
        elif target_id != source_id:
            if self.keys:
                self.keys.rewrap(source_id, target_id)
            self.db.execute(
                "UPDATE branches SET agent_id = ? WHERE agent_id = ?", (target_id, source_id)
            )
            self.turns.move(source_id, target_id)
            self.agents.note_use_of(target_id, source_id)
            self.agents.delete(source_id)

    def delete_agent(self, agent: AgentKey) -> list[str] | None:
        """Delete an agent with its key, its branches and its turns.

        Returns the ids of its branches; None: there is no such agent.
        """
        agent_id = self.agents.id_of(agent)
        if agent_id is None:
            return None
        found = self.db.execute("SELECT id FROM branches WHERE agent_id = ?", (agent_id,))
        branches = [branch_id for (branch_id,) in found]
        self.agents.delete(agent_id)
        return branches
