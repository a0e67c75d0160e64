"""What is in the manifest's columns: token ids and parts as stored."""

import json
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from ..files.crypto import seal, unseal


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
