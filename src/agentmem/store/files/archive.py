"""An agent in one file: a tar of safetensors files, and what they mean.

    blocks/000000.safetensors    sealed blocks, each after its parent
    tails/000.safetensors        unfinished blocks, one for each branch that has any
    agent.json                   format, model, fingerprint, tokens and text; which block follows
                                 which
    checksum                     XXH3-128, in hex, of every byte of the file before this member

The last member is known when the rest was written, so an archive can be written to a stream.
"""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

import xxhash

from ...errors import InvalidRequest

FORMAT, VERSION = "agentmem agent", 1
_CHUNK = 1 << 20
_MAX_JSON = 1 << 30


def block_name(index: int) -> str:
    return f"blocks/{index:06}.safetensors"


def tail_name(index: int) -> str:
    return f"tails/{index:03}.safetensors"


class _Sink:
    """A file for tarfile to write to, which hashes what is written and hands it out."""

    def __init__(self) -> None:
        self.digest = xxhash.xxh3_128()
        self.size = 0
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        self._parts.append(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def take(self) -> bytes:
        data = b"".join(self._parts)
        self._parts.clear()
        return data


def write_archive(about: dict[str, Any], files: Iterable[tuple[str, bytes]]) -> Iterator[bytes]:
    """Yield the archive's bytes, piece by piece.

    They are `files` by name, then agent.json, which is `about` with format and version added.
    """
    sink = _Sink()
    file = cast(IO[bytes], sink)  # tarfile calls `write` and `tell` alone
    tar = tarfile.TarFile(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)
    for name, data in files:
        _add(tar, name, data)
        yield sink.take()
    _add(tar, "agent.json", json.dumps({"format": FORMAT, "version": VERSION, **about}).encode())
    _add(tar, "checksum", sink.digest.hexdigest().encode())
    tar.close()
    yield sink.take()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o600
    tar.addfile(info, io.BytesIO(data))


@dataclass(frozen=True)
class Archive:
    """An archive that was checked; its file must stay open."""

    about: dict[str, Any]  # agent.json
    _tar: tarfile.TarFile
    _members: dict[str, tarfile.TarInfo]

    @classmethod
    def read(cls, file: IO[bytes]) -> "Archive":
        """Check every byte, and read what the archive is about.

        Raises InvalidRequest: it is no archive, damaged, or of a newer format.
        """
        try:
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (its file is the caller's)
            members = tar.getmembers()
            if not members or members[-1].name != "checksum":
                raise _wrong("it has no checksum at its end")
            expected = _content(tar, members[-1], 64)
            if _digest(file, members[-1].offset) != expected:
                raise _wrong("its checksum does not match")
            by_name = {member.name: member for member in members}
            about = json.loads(_content(tar, by_name["agent.json"], _MAX_JSON))
        except (
            tarfile.TarError,
            KeyError,
            ValueError,
            EOFError,
            OverflowError,
            RecursionError,
        ) as e:
            raise _wrong(f"{type(e).__name__}: {e}") from None
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise _wrong("agent.json does not say that it is one")
        if about.get("version") != VERSION:
            raise _wrong(f"it has version {about.get('version')!r}, this agentmem reads {VERSION}")
        return cls(about, tar, by_name)

    def content(self, name: str, at_most: int) -> bytes:
        """Return a file's bytes. Raises InvalidRequest: there is none, or it is larger."""
        if name not in self._members:
            raise _wrong(f"{name} is missing")
        return _content(self._tar, self._members[name], at_most)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, at_most: int) -> bytes:
    # others hold bytes that are not in the archive
    plain = member.isreg() and not member.issparse()
    file = tar.extractfile(member) if plain and member.size <= at_most else None
    if file is None:
        raise _wrong(f"{member.name[:100]} is no file of at most {at_most} bytes")
    return file.read()


def _digest(file: IO[bytes], end: int) -> bytes:
    digest, at = xxhash.xxh3_128(), 0
    file.seek(0)
    while at < end and (data := file.read(min(_CHUNK, end - at))):
        digest.update(data)
        at += len(data)
    return digest.hexdigest().encode()


def _wrong(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"This is not an agent as agentmem exports it: {why}.", param="file", code="bad_archive"
    )
