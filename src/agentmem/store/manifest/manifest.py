"""The manifest: agents, branches and blocks in a database. It is the truth about the store."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ...agent_key import AgentKey
from ...errors import NotFound
from ..records import AgentRecord, BlockRecord, BranchHead, FileRef, Holding, StoreIndex, TailRecord
from . import rows
from .database import Database

if TYPE_CHECKING:
    from ..keys import FileKeys

_NO_TAIL = (
    "tail_tokens = NULL, tail_nbytes = NULL, tail_checksum = NULL, tail_parts = NULL, tail_generation = NULL,"
    " tail_key = NULL"
)


class Manifest(Database):
    # What the store holds

    def agents(self) -> list[AgentRecord]:
        found = self.db.execute(
            "SELECT namespace, name, created, last_used, pinned, ttl, requests, hit_tokens FROM agents ORDER BY id"
        )
        return [
            AgentRecord(AgentKey(space, name), made, used, bool(pinned), *rest)
            for space, name, made, used, pinned, *rest in found
        ]

    def index(
        self, block_keys: Mapping[bytes, bytes], tail_keys: Mapping[str, bytes]
    ) -> StoreIndex:
        """`block_keys`, `tail_keys`: of encrypted files, by block and by branch."""
        branches = self.db.execute(
            "SELECT b.id, namespace, name, head, b.last_used, tail_tokens, tail_nbytes, tail_checksum, tail_parts"
            " FROM branches b JOIN agents a ON a.id = agent_id ORDER BY b.rowid"
        )
        blocks = self.db.execute(
            "SELECT key, parent, tokens, nbytes, checksum, created, parts FROM blocks ORDER BY rowid"
        )
        return StoreIndex(
            self.agents(),
            [rows.branch(tail_keys.get(row[0]), *row) for row in branches],
            [rows.block(block_keys.get(row[0]), *row) for row in blocks],
        )

    def parent(self, key: bytes) -> bytes | None:
        """NotFound: there is no such block."""
        row = self.db.execute("SELECT parent FROM blocks WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise NotFound(f"block {key.hex()} isn't in the store")
        return row[0]

    def block_file(self, key: bytes) -> FileRef | None:
        return self.block_files("WHERE key = ?", key).get(key)

    def block_files(self, where: str = "", *values: Any) -> dict[bytes, FileRef]:
        """Without their parts, which only `block_parts` and `index` tell."""
        found = self.db.execute(f"SELECT key, nbytes, checksum FROM blocks {where}", values)
        return {key: FileRef(*ref) for key, *ref in found}

    def block_parts(self, key: bytes) -> Mapping[str, int]:
        (text,) = self.db.execute("SELECT parts FROM blocks WHERE key = ?", (key,)).fetchone()
        return rows.unpack_parts(text)

    def tail_file(self, branch_id: str) -> FileRef | None:
        return self.tail_files("AND id = ?", branch_id).get(branch_id)

    def tail_files(self, where: str = "", *values: Any) -> dict[str, FileRef]:
        """Without their parts."""
        found = self.db.execute(
            "SELECT id, tail_nbytes, tail_checksum, tail_generation FROM branches"
            f" WHERE tail_generation IS NOT NULL {where}",
            values,
        )
        return {branch_id: FileRef(*ref) for branch_id, *ref in found}

    def parents(self) -> dict[bytes, bytes | None]:
        """Parent by key, each after its parent (which had to be there when it was added)."""
        return dict(self.db.execute("SELECT key, parent FROM blocks ORDER BY rowid"))

    def holdings(self) -> list[Holding]:
        """What each branch holds, and how long ago it was used: for choosing what leaves a full
        store.
        """
        found = self.db.execute(
            "SELECT b.id, head, tail_nbytes, b.last_used, pinned FROM branches b JOIN agents a ON a.id = agent_id"
        )
        return [
            Holding(id, head, tail or 0, last_used, bool(pinned))
            for id, head, tail, last_used, pinned in found
        ]

    def expired(self, now: float) -> list[AgentKey]:
        """Return the agents whose time is over."""
        found = self.db.execute(
            "SELECT namespace, name FROM agents"
            " WHERE ttl IS NOT NULL AND NOT pinned AND last_used + ttl < ?",
            (now,),
        )
        return [AgentKey(namespace, name) for namespace, name in found]

    def heads(self) -> dict[str, bytes | None]:
        return dict(self.db.execute("SELECT id, head FROM branches"))

    def turn_bytes(self) -> int:
        (nbytes,) = self.db.execute(
            "SELECT coalesce(sum(length(content)), 0) FROM turns"
        ).fetchone()
        return int(nbytes)

    def counts(self) -> tuple[int, int]:
        """Agents, branches."""
        return self.db.execute(
            "SELECT (SELECT count(*) FROM agents), (SELECT count(*) FROM branches)"
        ).fetchone()

    # Changes, each inside a transaction

    def require_block(self, key: bytes | None) -> None:
        """NotFound unless `key` is a block or None (no block at all)."""
        if key is not None and self.block_file(key) is None:
            raise NotFound(
                f"block {key.hex()} isn't in the store; save it, from the root on, before what follows it"
            )

    def add_block(self, block: BlockRecord, file_key: bytes | None) -> None:
        tokens, parts = rows.pack_tokens(block.tokens, file_key), rows.pack_parts(block.parts)
        self.db.execute(
            "INSERT INTO blocks (key, parent, tokens, nbytes, checksum, created, parts) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (block.key, block.parent, tokens, block.nbytes, block.checksum, block.created, parts),
        )

    def delete_block(self, key: bytes) -> None:
        """Branches that end in it end in its parent then, without a tail."""
        self.db.execute(
            f"UPDATE branches SET head = ?, {_NO_TAIL} WHERE head = ?", (self.parent(key), key)
        )
        self._delete_blocks([(key,)])

    def _delete_blocks(self, keys: Iterable[tuple[bytes]]) -> None:
        keys = list(keys)
        self.db.executemany("DELETE FROM blocks WHERE key = ?", keys)
        self.db.executemany("DELETE FROM block_keys WHERE block = ?", keys)

    def put_agent(self, agent: AgentRecord) -> int:
        """Add or change it; its id. What was counted and its last use never go back."""
        (agent_id,) = self.db.execute(
            "INSERT INTO agents (namespace, name, created, last_used, pinned, ttl, requests, hit_tokens)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
            " last_used = max(last_used, excluded.last_used), pinned = excluded.pinned, ttl = excluded.ttl,"
            " requests = max(requests, excluded.requests), hit_tokens = max(hit_tokens, excluded.hit_tokens)"
            " RETURNING id",
            (
                agent.key.namespace,
                agent.key.agent_id,
                agent.created,
                agent.last_used,
                int(agent.pinned),
                agent.ttl,
                agent.requests,
                agent.hit_tokens,
            ),
        ).fetchone()
        return agent_id

    def enter_agent(self, agent: AgentKey, last_used: float) -> int:
        """Add it if need be; its id."""
        (agent_id,) = self.db.execute(
            "INSERT INTO agents (namespace, name, created, last_used) VALUES (?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET last_used = max(last_used, excluded.last_used) RETURNING id",
            (agent.namespace, agent.agent_id, last_used, last_used),
        ).fetchone()
        return int(agent_id)

    def put_branch(self, branch: BranchHead) -> int:
        """Add the branch (and agent) or move it to its head; a tail that doesn't follow that goes.

        Returns the agent's row id.
        """
        agent_id = self.enter_agent(branch.agent, branch.last_used)
        self.db.execute(
            f"UPDATE branches SET {_NO_TAIL} WHERE id = ? AND head IS NOT ?",
            (branch.branch_id, branch.head),
        )
        self.db.execute(
            "INSERT INTO branches (id, agent_id, head, last_used) VALUES (?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET head = excluded.head, last_used = max(last_used, excluded.last_used)",
            (branch.branch_id, agent_id, branch.head, branch.last_used),
        )
        return agent_id

    def set_tail(
        self,
        branch_id: str,
        tail: TailRecord,
        generation: int,
        file_key: bytes | None,
        wrapped: bytes | None,
    ):
        """`wrapped`: the file's key under the agent's."""
        self.db.execute(
            "UPDATE branches SET tail_tokens = ?, tail_nbytes = ?, tail_checksum = ?, tail_parts = ?,"
            " tail_generation = ?, tail_key = ? WHERE id = ?",
            (
                *(
                    rows.pack_tokens(tail.tokens, file_key),
                    tail.nbytes,
                    tail.checksum,
                    rows.pack_parts(tail.parts),
                ),
                *(generation, wrapped, branch_id),
            ),
        )

    def copy_tail(
        self, source: str, branch_id: str, generation: int, wrapped: bytes | None
    ) -> None:
        """Of a branch with the same head; the file has another name."""
        self.db.execute(
            "UPDATE branches SET (tail_tokens, tail_nbytes, tail_checksum, tail_parts) ="
            " (SELECT tail_tokens, tail_nbytes, tail_checksum, tail_parts FROM branches WHERE id = ?),"
            " tail_generation = ?, tail_key = ? WHERE id = ?",
            (source, generation, wrapped, branch_id),
        )

    def clear_tail(self, branch_id: str) -> None:
        self.db.execute(f"UPDATE branches SET {_NO_TAIL} WHERE id = ?", (branch_id,))

    def cut_branch(self, branch_id: str, head: bytes | None) -> None:
        self.db.execute(f"UPDATE branches SET head = ?, {_NO_TAIL} WHERE id = ?", (head, branch_id))

    def touch_branch(self, branch_id: str, last_used: float) -> None:
        self.db.execute(
            "UPDATE branches SET last_used = max(last_used, ?) WHERE id = ?", (last_used, branch_id)
        )

    def move_agent(self, source: AgentKey, target: AgentKey, keys: "FileKeys | None") -> None:
        """Rename an agent; where the name is taken, give its branches to that one, whose pin and
        lifetime stay.

        NotFound: there is no such agent.
        """
        source_id, target_id = self._agent_id(source), self._agent_id(target)
        if source_id is None:
            raise NotFound(f"there is no agent {source.agent_id!r} to be moved")
        if target_id is None:
            self.db.execute(
                "UPDATE agents SET namespace = ?, name = ? WHERE id = ?",
                (target.namespace, target.agent_id, source_id),
            )
        elif target_id != source_id:
            if keys:
                keys.rewrap(source_id, target_id)
                keys.reseal_turns(source_id, target_id)
            for table in ("branches", "turns"):
                self.db.execute(
                    f"UPDATE {table} SET agent_id = ? WHERE agent_id = ?", (target_id, source_id)
                )
            self.db.execute(
                "UPDATE agents SET last_used = max(last_used, (SELECT last_used FROM agents WHERE id = ?))"
                " WHERE id = ?",
                (source_id, target_id),
            )
            self.db.execute("DELETE FROM agents WHERE id = ?", (source_id,))

    def _agent_id(self, agent: AgentKey) -> int | None:
        row = self.db.execute(
            "SELECT id FROM agents WHERE namespace = ? AND name = ?", agent
        ).fetchone()
        return row and row[0]

    def delete_branch(self, branch_id: str) -> None:
        """And its agent, if it was the last, and has no turns."""
        self._delete_branches("id = ?", branch_id)

    def delete_empty_branches(self) -> list[str]:
        """And agents that have none left; their ids."""
        return self._delete_branches("head IS NULL AND tail_generation IS NULL")

    def _delete_branches(self, where: str, *values: Any) -> list[str]:
        found = self.db.execute(
            f"DELETE FROM branches WHERE {where} RETURNING id, agent_id", values
        ).fetchall()
        self.db.executemany(
            "DELETE FROM agents WHERE id = ?1 AND NOT EXISTS (SELECT 1 FROM branches WHERE agent_id = ?1)"
            " AND NOT EXISTS (SELECT 1 FROM turns WHERE agent_id = ?1)",
            [(agent_id,) for _, agent_id in found],
        )
        return [branch_id for branch_id, _ in found]

    def delete_bare_agents(self) -> None:
        """Those that hold nothing."""
        self.db.execute(
            "DELETE FROM agents WHERE id NOT IN (SELECT agent_id FROM branches UNION SELECT agent_id FROM turns)"
        )

    def delete_agent(self, agent: AgentKey) -> list[str] | None:
        """With its key. The ids of the branches that went with it; None if there is no such agent."""
        agent_id = self._agent_id(agent)
        if agent_id is None:
            return None
        branches = [
            b for (b,) in self.db.execute("SELECT id FROM branches WHERE agent_id = ?", (agent_id,))
        ]
        self.db.execute("DELETE FROM agents WHERE id = ?", (agent_id,))
        return branches

    def delete_namespace(self, namespace: str) -> None:
        self.db.execute("DELETE FROM agents WHERE namespace = ?", (namespace,))

    def branches_through(self, key: bytes) -> list[str]:
        """The branches whose chain contains the block."""
        found = self.db.execute(
            "WITH RECURSIVE below(key) AS"
            " (VALUES (?) UNION SELECT blocks.key FROM blocks JOIN below ON parent = below.key)"
            " SELECT id FROM branches WHERE head IN below",
            (key,),
        )
        return [branch_id for (branch_id,) in found]

    def delete_unreachable(self) -> list[bytes]:
        """Delete every block in no branch's chain; their keys."""
        found = self.db.execute(
            "WITH RECURSIVE live(key) AS (SELECT head FROM branches WHERE head IS NOT NULL"
            " UNION SELECT parent FROM blocks JOIN live USING (key) WHERE parent IS NOT NULL)"
            " SELECT key FROM blocks WHERE key NOT IN live"
        ).fetchall()
        self._delete_blocks(found)
        return [key for (key,) in found]
