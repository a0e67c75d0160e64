"""A segment: one block or tail as a safetensors file, and how it is written durably.

    8 bytes   N, the header's length, little-endian
    N bytes   JSON, padded with spaces to a multiple of 8:
              {"__metadata__": {"format_version": "2",
                                "parts": "{\"0\": [0, 1523712, \"9f..\"], ...}"},
               "k0.packed": {"dtype": "U32", "shape": [30, 3, 256, 8],
                             "data_offsets": [0, 737280]}, ...}
    the rest  the tensors back to back, C-contiguous, little-endian: part by part
              (TensorName.part), and in a part wide items first

`parts` has each part's bytes, from and to, and their XXH3-128 in hex. The checksum of a file is
that of its first 8 + N bytes: it covers the parts' checksums, so a part can be read and verified
alone.

Written here rather than by the safetensors package, whose `serialize` takes raw pointers since 0.8
and whose `deserialize` copies and drops the metadata; the tests hold both to the same bytes.
"""

import fcntl
import json
import math
import os
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ...errors import CorruptSegment
from ...tensors import ITEM_BYTES, HostTensor, is_state, part_of

FORMAT_VERSION = "2"
Segment = tuple[dict[str, HostTensor], dict[str, str]]  # tensors, metadata


@dataclass(frozen=True)
class Part:
    """A part of a file that is read and verified alone: its place and its tensors."""

    start: int  # bytes, from the header's end
    stop: int
    checksum: str
    tensors: dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape, in the order of their bytes

    def decode(self, data: memoryview) -> dict[str, HostTensor]:
        """Return the tensors as views of the part's bytes; copies where one is not aligned."""
        found, end = {}, 0
        at = np.frombuffer(data, np.uint8).__array_interface__["data"][0] if data else 0
        for name, (dtype, shape) in self.tensors.items():
            start, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
            view = data[start:end]
            found[name] = HostTensor(
                dtype, shape, bytes(view) if (at + start) % ITEM_BYTES[dtype] else view
            )
        return found


@dataclass(frozen=True)
class Header:
    """A file's header, taken apart."""

    nbytes: int  # of the file before the first part
    metadata: dict[str, str]
    parts: dict[str, Part]  # in the order of their bytes, which follow one another

    @property
    def part_bytes(self) -> dict[str, int]:
        return {name: part.stop - part.start for name, part in self.parts.items()}


def encode(tensors: Mapping[str, HostTensor], metadata: Mapping[str, str]) -> bytes:
    """Return the file's bytes. The tensors are copied once."""
    assert not metadata.keys() & {"format_version", "parts"}, metadata
    entries: dict[str, Any] = {}
    parts: dict[str, tuple[int, int, str]] = {}
    body: list[bytes | memoryview] = []
    end = 0
    for part, names in by_part(tensors).items():
        digest, start = xxhash.xxh3_128(), end
        for name in names:
            tensor = tensors[name]
            # memoryview can't cast an empty view
            data = memoryview(tensor.data).cast("B") if tensor.nbytes else b""
            assert len(data) == tensor.nbytes, (
                f"{name}: {len(data)} bytes for {tensor.dtype} {tensor.shape}"
            )
            offsets = [end, end := end + len(data)]
            entries[name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": offsets,
            }
            digest.update(data)
            body.append(data)
        parts[part] = start, end, digest.hexdigest()
    own = {"format_version": FORMAT_VERSION, "parts": json.dumps(parts, separators=(",", ":"))}
    text = json.dumps(
        {"__metadata__": {**metadata, **own}, **entries}, separators=(",", ":")
    ).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, *body])


def by_part(tensors: Mapping[str, HostTensor]) -> dict[str, list[str]]:
    """Return the names of tensors by part, in the order of a file.

    What ":" marks comes first, then stacks of layers, then snapshots of state.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(tensors, key=lambda name: -ITEM_BYTES[tensors[name].dtype]):
        found.setdefault(part_of(name), []).append(name)
    return {part: found[part] for part in sorted(found, key=_place)}


def _place(part: str) -> tuple[bool, bool, int, str]:
    """Sort key of a part: by it they lie in a file."""
    return not part.startswith(":"), is_state(part), len(part), part


def decode(buf: bytes | bytearray | memoryview) -> Segment:
    """Return the tensors as views of `buf`, and the metadata.

    Raises CorruptSegment on anything out of place.
    """
    view = memoryview(buf).cast("B")
    header = parse_header(view, len(view))
    body = view[header.nbytes :]
    return decode_parts(
        header, {name: body[part.start : part.stop] for name, part in header.parts.items()}
    )


def parse_header(buf: bytes | bytearray | memoryview, size: int) -> Header:
    """Take the header of a file of `size` bytes apart; `buf` begins with all of it.

    Raises CorruptSegment.
    """
    view = memoryview(buf).cast("B")
    try:
        nbytes = header_bytes(view, size)
        header = json.loads(bytes(view[8:nbytes]))
        metadata = header.pop("__metadata__")
        if (version := metadata.pop("format_version")) != FORMAT_VERSION:
            raise ValueError(f"format version {version!r}, expected {FORMAT_VERSION!r}")
        parts = _parts(json.loads(metadata.pop("parts")), header, size - nbytes)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CorruptSegment(f"not a segment: {type(e).__name__}: {e}") from None
    return Header(nbytes, metadata, parts)


def header_bytes(buf: bytes | bytearray | memoryview, size: int) -> int:
    """Return the length of the header, with the 8 bytes that say so, of a file of `size` bytes.

    Raises CorruptSegment.
    """
    if len(buf) < 8:
        raise CorruptSegment(f"not a segment: {size} bytes")
    (length,) = struct.unpack_from("<Q", buf)
    if length > size - 8:
        raise CorruptSegment(f"not a segment: header of {length} bytes in a file of {size}")
    return 8 + int(length)


def _parts(ranges: dict[str, Any], entries: dict[str, Any], size: int) -> dict[str, Part]:
    names: dict[str, list[str]] = {}
    for name in sorted(entries, key=lambda name: entries[name]["data_offsets"]):
        names.setdefault(part_of(name), []).append(name)
    if names.keys() != ranges.keys():
        raise ValueError(f"parts {list(ranges)}, tensors of {list(names)}")
    parts: dict[str, Part] = {}
    end = 0
    for part, (start, stop, digest) in ranges.items():
        if start != end:
            raise ValueError(f"part {part} starts at {start}, not {end}")
        tensors = {}
        for name in names[part]:
            dtype, shape = entries[name]["dtype"], tuple(entries[name]["shape"])
            if not all(type(n) is int and n >= 0 for n in shape):
                raise ValueError(f"{name}: shape {shape}")
            tensors[name] = dtype, shape
            offsets = [end, end := end + math.prod(shape) * ITEM_BYTES[dtype]]
            if entries[name]["data_offsets"] != offsets:
                raise ValueError(
                    f"{name}: {dtype} {shape} at {entries[name]['data_offsets']}, not {offsets}"
                )
        if stop != end:
            raise ValueError(f"part {part} ends at {stop}, its tensors at {end}")
        parts[part] = Part(int(start), end, str(digest), tensors)
    if end != size:
        raise ValueError(f"{end} bytes of tensors, {size} bytes of file")
    return parts


def decode_parts(header: Header, bodies: Mapping[str, memoryview]) -> Segment:
    """Return the tensors of these parts, and the metadata.

    Raises CorruptSegment if a checksum does not match.
    """
    tensors: dict[str, HostTensor] = {}
    for name, data in bodies.items():
        part = header.parts[name]
        if xxhash.xxh3_128_hexdigest(data) != part.checksum:
            raise CorruptSegment(f"checksum mismatch in part {name!r}")
        tensors |= part.decode(data)
    return tensors, header.metadata


def checksum(buf: bytes | bytearray | memoryview) -> bytes:
    """Return the XXH3-128 of `buf`, 16 bytes."""
    return xxhash.xxh3_128_digest(buf)


def write_durable(path: Path, buf: bytes) -> None:
    """Write, fsync, rename, fsync the directory.

    Afterwards `path` holds `buf`, whatever happens.
    """
    write_file(path, buf)
    sync_dir(path.parent)


def write_file(path: Path, buf: bytes | bytearray) -> int:
    """Write, fsync and rename a file; return the bytes that it occupies.

    The directory is not synced: until sync_dir, a power loss may undo the rename.
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
    """Make sure that nothing is at `path`.

    Returns the bytes that the file occupied, 0 if it has other names; None if nothing was there.
    """
    try:
        stat = os.lstat(path)
        os.unlink(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return stat.st_blocks * 512 if stat.st_nlink == 1 else 0


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
    """Make the names in a directory durable."""
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
