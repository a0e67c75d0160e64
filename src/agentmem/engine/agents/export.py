"""Agents as files: what an export holds, and how an import becomes an agent. On any thread, no MLX.

An imported block gets a random key, and so does what an imported tail grows into: whatever the file
says, they never stand in for a block that this server would compute, so they can't reach another
agent.
"""

import os
import sqlite3
import time
import uuid
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from ...agent_key import AgentKey
from ...errors import AgentMemError, CorruptSegment, InvalidRequest, StoreFailed
from ...kvcache.shapes import Shapes, block_shapes, tail_shapes
from ...kvcache.spec import KVCacheSpec
from ...prefix_cache.restore import foreign_lineage, tail_metadata
from ...store.agent_store import AgentStore
from ...store.files import segment
from ...store.files.archive import Archive, block_name, tail_name, write_archive
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
from ..startup import Core
from .lifecycle import Exported, Imported

_FILE_HEADER = 1 << 16  # bytes, at most
_MAX_BRANCHES = 256
_MAX_STATES = 8  # snapshots in one block


def export_chunks(core: Core, exported: Exported) -> Iterator[bytes]:
    """The archive. CorruptSegment in the middle, if a file turns out damaged."""
    nodes = {node.key: node for path, *_ in exported.branches for node in path}
    index = {key: i for i, key in enumerate(nodes)}
    tails = [
        (i, branch_id)
        for i, (_, tail, branch_id, _) in enumerate(exported.branches)
        if len(tail.tokens)
    ]

    def files() -> Iterator[tuple[str, bytes]]:
        for key, i in index.items():
            yield block_name(i), segment.encode(*core.store.read_linked(exported.files, key))
        for i, branch_id in tails:
            yield tail_name(i), segment.encode(*core.store.read_linked(exported.files, branch_id))

    about = {
        "agent_id": exported.agent.key.agent_id,
        "created": exported.agent.created,
        "model": core.model.name,
        "fingerprint": core.fingerprint,
        "spec": core.runner.spec.identity(),
        "blocks": [
            {
                "file": block_name(i),
                "parent": index.get(nodes[key].parent),
                "tokens": nodes[key].tokens.tolist(),
            }
            for key, i in index.items()
        ],
        "branches": [_branch(core, exported, i, index) for i in range(len(exported.branches))],
    }
    return write_archive(about, files())


def _branch(core: Core, exported: Exported, i: int, index: dict[bytes, int]) -> dict[str, Any]:
    nodes, tail, _, last_used = exported.branches[i]
    tokens = np.concatenate([*(node.tokens for node in nodes), tail.tokens]).tolist()
    return {
        "head": index[nodes[-1].key] if nodes else None,
        "tail": {"file": tail_name(i), "tokens": tail.tokens.tolist()}
        if len(tail.tokens)
        else None,
        "last_used": last_used,
        "text": core.model.tokenizer.decode(tokens),
    }


def read_archive(core: Core, file: IO[bytes]) -> Archive:
    """An archive that this server can use. InvalidRequest says what is wrong with it."""
    archive = Archive.read(file)
    _check_fingerprint(core, archive.about)
    return archive


def import_agent(core: Core, key: AgentKey, archive: Archive) -> Imported:
    """Store what an archive holds as an agent, all of it or nothing. Raises InvalidRequest,
    StoreFailed.
    """
    scratch = AgentKey(IMPORTS, uuid.uuid4().hex)
    try:
        imported = _Import(
            core.store,
            core.runner.spec,
            archive,
            scratch,
            key,
            core.runner.vocab_size,
        ).run()
        core.store.move_agent(scratch, key).result()
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as e:
        core.store.delete_agent(scratch)
        raise InvalidRequest(
            f"agent.json is not as agentmem writes it: {type(e).__name__}: {e}", param="file"
        ) from e
    except (OSError, sqlite3.Error) as e:
        core.store.delete_agent(scratch)
        raise StoreFailed(f"The agent could not be stored: {e}") from e
    except AgentMemError:
        core.store.delete_agent(scratch)
        raise
    return imported


def _check_fingerprint(core: Core, about: dict[str, Any]) -> None:
    if about.get("fingerprint") == core.fingerprint:
        return
    theirs, ours = str(about.get("spec"))[:500], core.runner.spec.identity()
    why = (
        f"its cache layout is {theirs}, this server's is {ours}"
        if theirs != ours
        else f"it was computed by {str(about.get('model'))[:200]!r} with other weights or another calibration than "
        f"this server's {core.model.name!r}"
    )
    raise InvalidRequest(
        f"This agent can't be read by this server: {why}.", param="file", code="other_fingerprint"
    )


class _Import:
    def __init__(
        self,
        store: AgentStore,
        spec: KVCacheSpec,
        archive: Archive,
        scratch: AgentKey,
        target: AgentKey,
        vocab_size: int,
    ):
        self._store, self._spec, self._archive = store, spec, archive
        self._scratch, self._target, self._vocab_size = scratch, target, vocab_size
        self._rows = archive.about["blocks"]
        self._keys = [os.urandom(32) for _ in self._rows]
        self._stored: dict[int, BlockRecord] = {}

    def run(self) -> Imported:
        rows = self._archive.about["branches"]
        if not 1 <= len(rows) <= _MAX_BRANCHES:
            raise ValueError(f"{len(rows)} branches")
        branches = [self._branch(row) for row in rows]
        return Imported(branches, list(self._stored.values()))

    def _branch(self, row: dict[str, Any]) -> BranchRecord:
        branch_id, head = uuid.uuid4().hex, row["head"]
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
        """From the root; a parent comes before what is built on it, so there are no loops."""
        chain = []
        while head is not None:
            chain.append(head)
            parent = self._rows[head]["parent"]
            if parent is not None and not 0 <= parent < head:
                raise ValueError(f"block {head} has the parent {parent}")
            head = parent
        return chain[::-1]

    def _block(self, branch_id: str, i: int) -> BlockRecord:
        row, key = self._rows[i], self._keys[i]
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
        if not at_least <= len(given) <= at_most or not all(
            type(t) is int and 0 <= t < self._vocab_size for t in given
        ):
            raise ValueError(
                f"tokens must be {at_least} to {at_most} token ids, each below {self._vocab_size}"
            )
        return np.array(given, np.uint32)

    def _tensors(self, name: str, shapes: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """Of one file of the archive, if they are what `shapes` says, which gets its metadata and
        parts.
        """
        spec = self._spec
        most = (
            spec.block_size * (spec.dense_bytes + spec.sealed_bytes) * 2
            + _MAX_STATES * spec.state_bytes
        )
        try:
            tensors, metadata = segment.decode(self._archive.content(name, most + _FILE_HEADER))
        except CorruptSegment as e:
            raise ValueError(f"{name}: {e}") from None
        found = {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}
        if found != (wanted := shapes(metadata, {part_of(name) for name in found})):
            raise ValueError(
                f"{name} holds {str(found)[:300]}, and should hold {str(wanted)[:300]}"
            )
        return tensors, metadata
