"""A segment: one block or tail as a safetensors file, written durably and verified when read.

    8 bytes   N, the header's length, little-endian
    N bytes   JSON, padded with spaces to a multiple of 8:
              {"__metadata__": {"format_version": "1"}, "k.codes": {"dtype": "U32", "shape": [30, 3, 256, 8],
              "data_offsets": [0, 737280]}, ...}
    the rest  the tensors back to back, C-contiguous, little-endian, wide items first, so that each is aligned

Written here rather than by the safetensors package, whose `serialize` takes raw pointers since 0.8 and whose
`deserialize` copies and drops the metadata; the tests hold both to the same bytes.
"""

import fcntl
import json
import math
import os
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ..errors import CorruptSegment
from ..tensors import ITEM_BYTES, HostTensor

FORMAT_VERSION = "1"


def encode(tensors: Mapping[str, HostTensor], metadata: Mapping[str, str]) -> bytes:
    """The file's bytes. The tensors are copied once."""
    header: dict[str, Any] = {"__metadata__": {**metadata, "format_version": FORMAT_VERSION}}
    parts: list[bytes | memoryview] = []
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -ITEM_BYTES[item[1].dtype]):
        # memoryview can't cast an empty view
        data = memoryview(tensor.data).cast("B") if tensor.nbytes else b""
        assert len(data) == tensor.nbytes, f"{name}: {len(data)} bytes for {tensor.dtype} {tensor.shape}"
        offsets = [end, end := end + len(data)]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        parts.append(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, *parts])


def decode(buf: bytes | bytearray | memoryview) -> tuple[dict[str, HostTensor], dict[str, str]]:
    """Tensors as views of `buf`, and the metadata. Raises CorruptSegment on anything out of place."""
    view = memoryview(buf).cast("B")
    try:
        (length,) = struct.unpack_from("<Q", view)
        if length > len(view) - 8:
            raise ValueError(f"header of {length} bytes in a file of {len(view)}")
        header = json.loads(bytes(view[8 : 8 + length]))
        metadata = header.pop("__metadata__")
        if metadata["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {metadata['format_version']!r}, expected {FORMAT_VERSION!r}")
        return _tensors(header, view[8 + length :]), metadata
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as e:
        raise CorruptSegment(f"not a segment: {type(e).__name__}: {e}") from None


def _tensors(header: dict[str, Any], body: memoryview) -> dict[str, HostTensor]:
    tensors = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape = tuple(entry["shape"])
        if not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"{name}: shape {shape}")
        start, stop = entry["data_offsets"]
        if start != end or stop - start != math.prod(shape) * ITEM_BYTES[entry["dtype"]] or stop > len(body):
            raise ValueError(f"{name}: bytes {start} to {stop} of {len(body)} don't hold {entry['dtype']} {shape}")
        tensors[name] = HostTensor(entry["dtype"], shape, body[start:stop])
        end = stop
    if end != len(body):
        raise ValueError(f"{len(body) - end} bytes belong to no tensor")
    return tensors


def checksum(buf: bytes | bytearray | memoryview) -> bytes:
    """16 bytes, XXH3-128 over every byte of the file."""
    return xxhash.xxh3_128_digest(buf)


def write_durable(path: Path, buf: bytes) -> None:
    """Write, fsync, rename, fsync the directory: afterwards `path` holds `buf`, whatever happens."""
    write_file(path, buf)
    sync_dir(path.parent)


def write_file(path: Path, buf: bytes | bytearray) -> int:
    """As write_durable, without the directory's fsync: until sync_dir, a power loss may undo the rename.

    Returns the bytes that the file occupies.
    """
    temp = path.with_name(path.name + ".tmp")
    try:
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        try:
            os.fchmod(fd, 0o600)
            rest = memoryview(buf)
            while rest:
                rest = rest[os.write(fd, rest) :]
            _fsync(fd)
            occupied = os.fstat(fd).st_blocks * 512
        finally:
            os.close(fd)
        os.replace(temp, path)
        return occupied
    except OSError:
        remove_file(temp)
        raise


def remove_file(path: Path) -> int | None:
    """Afterwards nothing is there. Bytes that it occupied, 0 if it has other names; None if nothing was there."""
    try:
        stat = os.lstat(path)
        os.unlink(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return stat.st_blocks * 512 if stat.st_nlink == 1 else 0


def read_verified(path: Path, nbytes: int, digest: bytes) -> memoryview:
    """The file's bytes, if they are `nbytes` and have this checksum; CorruptSegment if not, or if unreadable."""
    buf = np.empty(nbytes, np.uint8).data  # not zeroed first, which would hold up other readers
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size != nbytes:
                raise CorruptSegment(f"{path.name}: {size} bytes, {nbytes} were written")
            view = buf
            while view and (n := file.readinto(view)):
                view = view[n:]
    except OSError as e:
        raise CorruptSegment(f"{path.name}: {e.strerror}") from e
    if checksum(buf) != digest:
        raise CorruptSegment(f"{path.name}: checksum mismatch")
    return buf


def make_private_dir(path: Path) -> None:
    """Create `path`, durably and with every missing parent, mode 0700 whatever the umask."""
    if path.is_dir():
        return
    if path.parent != path:
        make_private_dir(path.parent)
    path.mkdir(mode=0o700)
    path.chmod(0o700)
    sync_dir(path.parent)


def sync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _fsync(fd)
    finally:
        os.close(fd)


def _fsync(fd: int) -> None:
    if sys.platform == "darwin":
        try:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # fsync alone leaves the bytes in the drive's cache
            return
        except OSError:  # not every filesystem has it
            pass
    os.fsync(fd)
