"""Content addresses of blocks, and lineages: how a block came about.

A block that was cut and then filled up again holds codes where a fresh block of the same tokens saw
full precision, so that the two must not stand in for each other. A lineage is FRESH, or says where
the block was cut:

    key of the block it was cut from (or 32 random bytes, where it came from outside)
    position of the cut in that block (tokens, 4 bytes, little-endian)
"""

import hashlib
import os

import numpy as np

ROOT = b""  # the parent of a first block
FRESH = b""  # the lineage of a block that was never cut
_POSITION = 4  # bytes


def block_key(scope: bytes, parent: bytes, tokens: np.ndarray, lineage: bytes) -> bytes:
    """Return the content address of a block, 32 bytes.

    It is a hash of who may share the block, what came before, its tokens, and how it came about.
    `scope` holds namespace (or agent) and the fingerprint of model, quantization and calibration.
    """
    digest = hashlib.blake2b(digest_size=32)
    for part in (scope, parent, lineage, np.ascontiguousarray(tokens, dtype="<u4").tobytes()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def cut_lineage(key: bytes, num_tokens: int) -> bytes:
    """Return the lineage of the block that goes on from the first `num_tokens` of block `key`."""
    return key + num_tokens.to_bytes(_POSITION, "little")


def cut_again(lineage: bytes, num_tokens: int) -> bytes:
    """Return the lineage of what is cut once more, before the position of its first cut."""
    return lineage[:-_POSITION] + num_tokens.to_bytes(_POSITION, "little")


def foreign_lineage(prefix_len: int) -> bytes:
    """Return a lineage for an open block that came from outside.

    The block that it grows into never stands in for another.
    """
    return os.urandom(32) + prefix_len.to_bytes(_POSITION, "little")


def tail_metadata(
    head: bytes | None, tokens: np.ndarray, lineage: bytes, prefix_len: int
) -> dict[str, str]:
    """Return what a tail's file says beside its tensors; `head`: the block that it follows."""
    return {
        "lineage": lineage.hex(),
        "prefix_len": str(prefix_len),
        "identity": tail_identity(head or ROOT, tokens),
    }


def tail_identity(head: bytes, tokens: np.ndarray) -> str:
    """Return what says which tail a file holds: the file is replaced as its branch moves on."""
    content = head + np.ascontiguousarray(tokens, "<u4").tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()
