"""An encrypted segment: its tensors are bytes, each one part of another segment, sealed.

    s:header     a segment without tensors, which has the metadata
    s0, s@137    segments with the tensors of part "0" and part "@137"

All are sealed with the file's one key, each with a nonce and for a place of its own, so that a part
can be read alone, and stands in for no other part, block or file. Sizes and checksums are of what
is sealed: they are checked without a key.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from ...tensors import HostTensor, part_of
from . import segment
from .crypto import seal, unseal
from .segment import Segment
from .segment_file import read_file

HEADER = ":header"


def encode_sealed(
    tensors: Mapping[str, HostTensor], metadata: Mapping[str, str], key: bytes, context: bytes
) -> bytes:
    """Return the file's bytes, sealed by `key`, which must be a new one.

    `context` says what this is. It is not stored, but needed to read it.
    """
    plain = {HEADER: segment.encode({}, metadata)}
    for part, names in segment.by_part(tensors).items():
        plain[part] = segment.encode({name: tensors[name] for name in names}, {})
    sealed = {part: seal(key, data, _context(context, part)) for part, data in plain.items()}
    sealed_tensors = {
        _name(part): HostTensor("U8", (len(data),), memoryview(data))
        for part, data in sealed.items()
    }
    return segment.encode(sealed_tensors, {})


def read_sealed(
    path: Path,
    nbytes: int,
    digest: bytes,
    key: bytes,
    context: bytes,
    parts: Collection[str] | None = None,
) -> Segment:
    """Return the tensors of these parts and the metadata, as `read_file` does, decrypted.

    Raises CorruptSegment, too, if it was sealed for another context or by another key.
    """
    sealed, _ = read_file(path, nbytes, digest, None if parts is None else {HEADER, *parts})
    tensors: dict[str, HostTensor] = {}
    metadata: dict[str, str] = {}
    for name, tensor in sealed.items():
        found, about = segment.decode(unseal(key, tensor.data, _context(context, part_of(name))))
        tensors |= found
        metadata |= about
    return tensors, metadata


def _name(part: str) -> str:
    """Name a tensor that is all of `part`."""
    return f"s{part}"


def _context(context: bytes, part: str) -> bytes:
    return context + b":" + part.encode()
