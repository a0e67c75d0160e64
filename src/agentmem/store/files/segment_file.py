"""Reads of a segment's file, as a whole or in parts.

Every byte that is read is verified before anyone sees it.
"""

import os
from collections.abc import Collection, Iterator
from io import FileIO
from pathlib import Path

import numpy as np

from ...errors import CorruptSegment
from . import segment
from .segment import Header, Segment

_HEADER_GUESS = 16 << 10  # bytes read at first: nearly every header is shorter


def read_file(
    path: Path, nbytes: int, digest: bytes, parts: Collection[str] | None = None
) -> Segment:
    """Return the tensors of these parts (None: of all) and the metadata; no other part is read.

    Parts that the file has not are left out. Raises CorruptSegment unless the file has `nbytes`,
    its header this checksum, and the parts those that the header says; or if it can't be read.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size != nbytes:
                raise CorruptSegment(f"{size} bytes, {nbytes} were written")
            header = _read_header(file, size, digest)
            return segment.decode_parts(header, _read_parts(file, header, parts))
    except OSError as e:
        raise CorruptSegment(f"{path.name}: {e.strerror}") from e
    except CorruptSegment as e:
        raise CorruptSegment(f"{path.name}: {e.message}") from None


def _read_header(file: FileIO, size: int, digest: bytes) -> Header:
    head = _read_at(file, 0, min(size, _HEADER_GUESS))
    nbytes = segment.header_bytes(head, size)
    if nbytes > len(head):
        head = _read_at(file, 0, nbytes)
    if segment.checksum(head[:nbytes]) != digest:
        raise CorruptSegment("checksum mismatch in the header")
    return segment.parse_header(head, size)


def _read_parts(
    file: FileIO, header: Header, wanted: Collection[str] | None
) -> dict[str, memoryview]:
    bodies = {}
    for run in _runs(header, wanted):
        start, stop = header.parts[run[0]].start, header.parts[run[-1]].stop
        data = _read_at(file, header.nbytes + start, stop - start)
        for name in run:
            part = header.parts[name]
            bodies[name] = data[part.start - start : part.stop - start]
    return bodies


def _runs(header: Header, wanted: Collection[str] | None) -> Iterator[list[str]]:
    """Yield the wanted parts, those together that follow one another."""
    run: list[str] = []
    for part in header.parts:
        if wanted is None or part in wanted:
            run.append(part)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _read_at(file: FileIO, offset: int, nbytes: int) -> memoryview:
    buf = np.empty(nbytes, np.uint8).data  # not zeroed first, which would hold up other readers
    file.seek(offset)
    view = buf
    while view:
        if not (n := file.readinto(view)):
            raise CorruptSegment("it became shorter while it was read")
        view = view[n:]
    return buf
