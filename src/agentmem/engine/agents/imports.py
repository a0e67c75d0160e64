"""How an archive becomes an agent in the store. On any thread that may wait for the disk; no MLX.

An imported block gets a random key, and so does what an imported tail grows into: whatever the file
says, they never stand in for a block that this server would compute, so they can't reach another
agent.
"""

import os
import sqlite3
import time
import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...agent_key import AgentKey
from ...errors import AgentMemError, CorruptSegment, InvalidRequest, StoreFailed
from ...kvcache.shapes import Shapes, block_shapes, tail_shapes
from ...kvcache.spec import KVCacheSpec
from ...prefix_cache.lineage import foreign_lineage, tail_metadata
from ...store.agent_store import AgentStore
from ...store.files import segment
from ...store.files.archive import Archive
from ...store.records import (
    IMPORTS,
    BlockRecord,
    BlockToSave,
    BranchHead,
    BranchRecord,
    TailRecord,
    TailToSave,
)
from ...tensors import part_of

_FILE_HEADER = 1 << 16  # bytes, at most
_MAX_BRANCHES = 256
_MAX_STATES = 8  # snapshots in one block


@dataclass(frozen=True)
class ArchivedModel:
    """The model that an archive is of: what it tells of it, and what it must fit."""

    name: str
    tokenizer: Any
    fingerprint: str  # of what gives a stored byte its meaning
    spec: KVCacheSpec
    vocab_size: int  # ids that the model has embeddings for


@dataclass(frozen=True)
class Imported:
    """What an import stored, to be entered among the agents."""

    branches: list[BranchRecord]
    blocks: list[BlockRecord]


def check_model(about: dict[str, Any], model: ArchivedModel) -> None:
    """Raise InvalidRequest, which says why, where an archive can't be read by this model."""
    if about.get("fingerprint") == model.fingerprint:
        return
    theirs = str(about.get("spec"))[:500]
    ours = model.spec.identity()
    if theirs != ours:
        why = f"its cache layout is {theirs}, this server's is {ours}"
    else:
        why = (
            f"it was computed by {str(about.get('model'))[:200]!r} with other weights or another "
            f"calibration than this server's {model.name!r}"
        )
    raise InvalidRequest(
        f"This agent can't be read by this server: {why}.", param="file", code="other_fingerprint"
    )


def import_agent(
    store: AgentStore, model: ArchivedModel, key: AgentKey, archive: Archive
) -> Imported:
    """Store what an archive holds as an agent, all of it or nothing.

    Raises InvalidRequest, StoreFailed.
    """
    scratch = AgentKey(IMPORTS, uuid.uuid4().hex)
    try:
        work = _Import(store=store, model=model, archive=archive, scratch=scratch, target=key)
        imported = work.run()
        store.move_agent(scratch, key).result()
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as e:
        store.delete_agent(scratch)
        raise InvalidRequest(
            f"agent.json is not as agentmem writes it: {type(e).__name__}: {e}", param="file"
        ) from e
    except (OSError, sqlite3.Error) as e:
        store.delete_agent(scratch)
        raise StoreFailed(f"The agent could not be stored: {e}") from e
    except AgentMemError:
        store.delete_agent(scratch)
        raise
    return imported


class _Import:
    """Stores an archive's blocks, tails and branches under a scratch agent, each checked before."""

    def __init__(
        self,
        *,
        store: AgentStore,
        model: ArchivedModel,
        archive: Archive,
        scratch: AgentKey,
        target: AgentKey,
    ):
        self._store = store
        self._spec = model.spec
        self._vocab_size = model.vocab_size
        self._archive = archive
        self._scratch = scratch
        self._target = target
        self._rows = archive.about["blocks"]
        self._keys = [os.urandom(32) for _ in self._rows]
        self._stored: dict[int, BlockRecord] = {}

    def run(self) -> Imported:
        """Store all of it; return what to enter among the agents. Raises ValueError and such."""
        rows = self._archive.about["branches"]
        if not 1 <= len(rows) <= _MAX_BRANCHES:
            raise ValueError(f"{len(rows)} branches")
        branches = [self._branch(row) for row in rows]
        return Imported(branches, list(self._stored.values()))

    def _branch(self, row: dict[str, Any]) -> BranchRecord:
        """Store a branch, and the blocks of it that are not stored yet."""
        branch_id = uuid.uuid4().hex
        head = row["head"]
        for i in self._chain(head):
            if i not in self._stored:
                self._stored[i] = self._block(branch_id, i)
        now = min(time.time(), float(row["last_used"]))
        if not row["last_used"] >= 0:
            raise ValueError(f"last_used {row['last_used']}")
        key = None if head is None else self._keys[head]
        self._store.save_branch(BranchHead(branch_id, self._scratch, key, now)).result()
        tail = self._tail(branch_id, key, row["tail"]) if row["tail"] else None
        return BranchRecord(branch_id, self._target, key, tail, now)

    def _chain(self, head: int | None) -> list[int]:
        """Return the blocks up to `head`, from the root on, by their places in the archive.

        A parent comes before what is built on it, so there are no loops.
        """
        chain = []
        while head is not None:
            chain.append(head)
            parent = self._rows[head]["parent"]
            if parent is not None and not 0 <= parent < head:
                raise ValueError(f"block {head} has the parent {parent}")
            head = parent
        return chain[::-1]

    def _block(self, branch_id: str, i: int) -> BlockRecord:
        """Store the `i`th block of the archive."""
        row = self._rows[i]
        key = self._keys[i]
        parent = None if row["parent"] is None else self._keys[row["parent"]]
        tokens = self._tokens(row["tokens"], self._spec.block_size, self._spec.block_size)

        def shapes(_: dict[str, str], parts: set[str]) -> Shapes:
            return block_shapes(self._spec, len(tokens), parts, first=parent is None)

        tensors, _ = self._tensors(row["file"], shapes)
        block = BlockToSave(
            branch_id=branch_id,
            agent=self._scratch,
            key=key,
            parent=parent,
            tokens=tokens,
            tensors=tensors,
        )
        ref = self._store.save_block(block).result()
        return BlockRecord(key, parent, tokens, ref.nbytes, ref.checksum, time.time(), ref.parts)

    def _tail(self, branch_id: str, head: bytes | None, row: dict[str, Any]) -> TailRecord:
        """Store a branch's tail."""
        tokens = self._tokens(row["tokens"], 1, self._spec.block_size - 1)

        def shapes(metadata: dict[str, str], parts: set[str]) -> Shapes:
            prefix_len = int(metadata["prefix_len"])
            if not 0 <= prefix_len <= len(tokens):
                raise ValueError(f"prefix_len {prefix_len}")
            return tail_shapes(self._spec, len(tokens), prefix_len, parts, first=head is None)

        tensors, found = self._tensors(row["file"], shapes)
        prefix_len = int(found["prefix_len"])
        tail = TailToSave(
            branch_id=branch_id,
            agent=self._scratch,
            head=head,
            tokens=tokens,
            tensors=tensors,
            metadata=tail_metadata(head, tokens, foreign_lineage(prefix_len), prefix_len),
        )
        ref = self._store.save_tail(tail).result()
        return TailRecord(tokens, ref.nbytes, ref.checksum, ref.parts)

    def _tokens(self, given: list[int], at_least: int, at_most: int) -> np.ndarray:
        """Return token ids as an array [n], uint32, if they are that many and all known."""
        known = all(type(t) is int and 0 <= t < self._vocab_size for t in given)
        if not known or not at_least <= len(given) <= at_most:
            raise ValueError(
                f"tokens must be {at_least} to {at_most} token ids, each below {self._vocab_size}"
            )
        return np.array(given, np.uint32)

    def _tensors(self, name: str, shapes: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the tensors and the metadata of one file of the archive.

        They must be what `shapes` says, which is given the metadata and the names of the parts.
        """
        spec = self._spec
        most = spec.block_size * (spec.dense_bytes + spec.sealed_bytes) * 2
        most += _MAX_STATES * spec.state_bytes + _FILE_HEADER
        try:
            tensors, metadata = segment.decode(self._archive.content(name, most))
        except CorruptSegment as e:
            raise ValueError(f"{name}: {e}") from None
        found = {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}
        wanted = shapes(metadata, {part_of(name) for name in found})
        if found != wanted:
            raise ValueError(
                f"{name} holds {str(found)[:300]}, and should hold {str(wanted)[:300]}"
            )
        return tensors, metadata
