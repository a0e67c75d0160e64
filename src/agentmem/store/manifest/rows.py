"""What is in the manifest's columns: token ids and parts as stored, and rows as records."""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from ...agent_key import AgentKey
from ..files.crypto import seal, unseal
from ..records import BlockRecord, BranchRecord, TailRecord


def pack_tokens(tokens: np.ndarray, file_key: bytes | None) -> bytes:
    data = np.ascontiguousarray(tokens, "<u4").tobytes()
    return bytes(seal(file_key, data, b"tokens")) if file_key else data


def unpack_tokens(blob: bytes, file_key: bytes | None) -> np.ndarray:
    """Raises CorruptSegment."""
    return np.frombuffer(unseal(file_key, blob, b"tokens") if file_key else blob, "<u4")


def pack_parts(parts: Mapping[str, int]) -> str:
    return json.dumps(dict(parts), separators=(",", ":"))


@lru_cache(256)
def unpack_parts(text: str) -> Mapping[str, int]:
    """Not to be changed: equal ones, as most of a store's are, are one."""
    parts: dict[str, int] = json.loads(text)
    return parts


def branch(
    file_key: bytes | None,
    branch_id: str,
    namespace: str,
    agent: str,
    head: bytes | None,
    last_used: float,
    *tail: Any,
) -> BranchRecord:
    tokens, nbytes, checksum, parts = tail
    found = None
    if tokens is not None:
        found = TailRecord(unpack_tokens(tokens, file_key), nbytes, checksum, unpack_parts(parts))
    return BranchRecord(branch_id, AgentKey(namespace, agent), head, found, last_used)


def block(
    file_key: bytes | None, key: bytes, parent: bytes | None, tokens: bytes, *rest: Any
) -> BlockRecord:
    nbytes, checksum, created, parts = rest
    return BlockRecord(
        key, parent, unpack_tokens(tokens, file_key), nbytes, checksum, created, unpack_parts(parts)
    )
