"""Records what this process does to the files below a directory, and says what a power loss would
leave of it.

    log = FileLog(root)
    log.install(monkeypatch)
    ...                               # os.open, os.write, os.fsync, ..., and SQLite's commits
    for cut in range(len(log.ops) + 1):
        for state in log.states(cut): # what may be on disk if the power fails after `cut` of them
            state.write(somewhere)

Only fsync makes anything last: of a file its content, of a directory its names. What has not been
synced may be there, may be gone, or half there; a rename inside a directory is atomic. SQLite is
taken at its word: a commit that returned lasts, one that was under way may have happened, or left a
torn log.
"""

import fcntl
import os
import random
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

_OWN_FILES = (
    "lock",
    "manifest.sqlite",
    "manifest.sqlite-wal",
    "manifest.sqlite-shm",
)  # not by way of this log


@dataclass(frozen=True)
class Op:
    # open, write, sync, sync_dir, rename, link, unlink, mkdir; commit, committed; or a note of the
    # test's own
    kind: str
    path: str = ""  # relative to the root
    target: str = ""  # of a rename or link
    handle: int = 0  # of open, write and sync: which opening of the file
    data: bytes = b""
    label: int = 0  # of a note
    snapshot: Mapping[str, bytes] = field(
        default_factory=dict
    )  # committed: the manifest's files, relative names


@dataclass(frozen=True)
class Change:
    """Names in `directory`: a file (by inode) or directory (None) appears, or something is gone."""

    directory: str
    gone: str = ""
    new: str = ""
    inode: int | None = None

    def apply(self, names: dict[str, int | None]) -> None:
        names.pop(self.gone, None)
        if self.new:
            names[self.new] = self.inode


class Disk:
    """The files as the process sees them, and as much of that as is known to last."""

    def __init__(self) -> None:
        self._names: dict[str, int | None] = {}
        self._lasting: dict[str, int | None] = {}
        self._pending: list[Change] = []
        self._content: dict[int, bytes] = {}
        self._synced: dict[int, bytes] = {}
        self._inodes: dict[int, int] = {}  # by handle

    def apply(self, op: Op) -> None:
        if op.kind == "open":
            self._open(op)
        elif op.kind == "write":
            self._content[self._inodes[op.handle]] += op.data
        elif op.kind == "sync":
            inode = self._inodes[op.handle]
            self._synced[inode] = self._content[inode]
        elif op.kind == "sync_dir":
            self._sync_dir(op.path)
        elif op.kind == "mkdir":
            self._change(Change(_parent(op.path), new=op.path))
        elif op.kind == "rename":
            # between directories it is not known to last before the new one is synced
            self._change(Change(_parent(op.target), op.path, op.target, self._names[op.path]))
        elif op.kind == "link":
            self._change(Change(_parent(op.target), new=op.target, inode=self._names[op.path]))
        elif op.kind == "unlink":
            self._change(Change(_parent(op.path), op.path))

    def _open(self, op: Op) -> None:
        inode = self._names.get(op.path)
        if inode is None:
            inode = op.handle
            self._change(Change(_parent(op.path), new=op.path, inode=inode))
        self._inodes[op.handle] = inode
        self._content[inode] = b""

    def _change(self, change: Change) -> None:
        change.apply(self._names)
        self._pending.append(change)

    def _sync_dir(self, directory: str) -> None:
        for change in self._pending:
            if change.directory == directory:
                change.apply(self._lasting)
        self._pending = [change for change in self._pending if change.directory != directory]

    def after_power_loss(
        self, happened: Callable[[], bool], written: Callable[[], float]
    ) -> dict[str, bytes | None]:
        """Files, and directories (None), by path.

        `happened` is asked of each change of names that isn't synced, and `written` for the part, 0
        to 1, that is there of each file's content that isn't.
        """
        names = dict(self._lasting)
        for change in self._pending:
            if happened():
                change.apply(names)
        found = {
            path: inode for path, inode in names.items() if all(p in names for p in _parents(path))
        }
        return {
            path: None if inode is None else self._left(inode, written())
            for path, inode in found.items()
        }

    def _left(self, inode: int, part: float) -> bytes:
        written, synced = self._content[inode], self._synced.get(inode, b"")
        return written[: len(synced) + int(part * (len(written) - len(synced)))] if part else synced


@dataclass(frozen=True)
class State:
    """What may be on disk after a power loss."""

    files: Mapping[str, bytes | None]  # None: a directory
    manifest: Mapping[str, bytes]

    def write(self, root: Path) -> None:
        for path, data in sorted(self.files.items()):
            if data is None:
                (root / path).mkdir()
            else:
                (root / path).write_bytes(data)
        for path, data in self.manifest.items():
            (root / path).parent.mkdir(exist_ok=True)
            (root / path).write_bytes(data)

    def key(self) -> tuple[object, ...]:
        return tuple(
            sorted(
                (path, hash(data))
                for part in (self.files, self.manifest)
                for path, data in part.items()
            )
        )


class FileLog:
    def __init__(self, root: Path, *, believe: Callable[[Op], bool] = lambda op: True):
        """`believe`: False of an operation that is done and said to be done, and has no effect that
        lasts.
        """
        self.ops: list[Op] = []
        self._root, self._believe = root, believe
        self._lock = threading.RLock()  # an operation and its place in the log are one
        self._handles: dict[int, Op] = {}  # by file descriptor: its open, or a directory's sync_dir
        self._opened = 0

    def note(self, kind: str, label: int) -> None:
        self._add(Op(kind, label=label))

    # Recording

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("open", "write", "fsync", "close"):
            patch.setattr(os, name, self._wrapped(getattr(self, "_" + name), getattr(os, name)))
        for name in ("unlink", "mkdir"):
            patch.setattr(os, name, self._wrapped(partial(self._one_name, name), getattr(os, name)))
        for name, kind in (("replace", "rename"), ("rename", "rename"), ("link", "link")):
            patch.setattr(
                os, name, self._wrapped(partial(self._two_names, kind), getattr(os, name))
            )
        patch.setattr(fcntl, "fcntl", self._wrapped(self._fcntl, fcntl.fcntl))
        patch.setattr(sqlite3, "connect", self._wrapped(self._connect, sqlite3.connect))

    def _wrapped(
        self, function: Callable[..., Any], real: Callable[..., Any]
    ) -> Callable[..., Any]:
        def wrapper(*args: Any, **options: Any) -> Any:
            with self._lock:
                return function(real, *args, **options)

        return wrapper

    def _add(self, op: Op) -> None:
        with self._lock:
            self.ops.append(op)

    def _path(self, path: Any) -> str | None:
        """Relative to the root; None for what isn't watched."""
        if not isinstance(path, str | os.PathLike):
            return None
        whole = Path(path)
        return str(whole.relative_to(self._root)) if self._watches(whole) else None

    def _watches(self, path: Path) -> bool:
        return path.is_relative_to(self._root) and path.name not in _OWN_FILES

    def _open(
        self, real: Callable, path: Any, flags: int, mode: int = 0o777, **options: Any
    ) -> int:
        fd, name = real(path, flags, mode, **options), self._path(path)
        if name is not None and flags & os.O_DIRECTORY:
            self._handles[fd] = Op("sync_dir", name)
        elif name is not None and flags & os.O_TRUNC:
            self._opened += 1
            self._handles[fd] = Op("open", name, handle=self._opened)
            self._add(self._handles[fd])
        return fd

    def _write(self, real: Callable, fd: int, data: Any) -> int:
        n = real(fd, data)
        if fd in self._handles:
            self._add(
                Op(
                    "write",
                    self._handles[fd].path,
                    handle=self._handles[fd].handle,
                    data=bytes(data[:n]),
                )
            )
        return n

    def _fsync(self, real: Callable, fd: int) -> None:
        op = self._handles.get(fd)
        if op is None:
            real(fd)
        else:  # the power loss is made up, so the real thing would only take time
            self._add(op if op.kind == "sync_dir" else Op("sync", op.path, handle=op.handle))

    def _fcntl(self, real: Callable, fd: int, command: int, *args: Any) -> Any:
        if command == getattr(fcntl, "F_FULLFSYNC", None) and fd in self._handles:
            return self._fsync(real, fd)
        return real(fd, command, *args)

    def _close(self, real: Callable, fd: int) -> None:
        self._handles.pop(fd, None)
        real(fd)

    def _one_name(self, kind: str, real: Callable, path: Any, *args: Any, **options: Any) -> None:
        real(path, *args, **options)
        if (name := self._path(path)) is not None:
            self._add(Op(kind, name))

    def _two_names(
        self, kind: str, real: Callable, source: Any, target: Any, **options: Any
    ) -> None:
        real(source, target, **options)
        if (name := self._path(source)) is not None:
            self._add(Op(kind, name, str(Path(target).relative_to(self._root))))

    def _connect(
        self, real: Callable, database: Any, *args: Any, **options: Any
    ) -> sqlite3.Connection:
        if options.get("uri") or not Path(database).is_relative_to(self._root):
            return real(database, *args, **options)
        log, path = self, Path(database)

        class Logged(sqlite3.Connection):
            def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
                verb = sql.split()[0]
                if verb != "COMMIT" and (
                    self.in_transaction or verb in ("BEGIN", "SELECT", "WITH")
                ):
                    return super().execute(sql, *values)
                log._add(Op("commit"))
                cursor = super().execute(sql, *values)
                log._add(Op("committed", snapshot=log._snapshot(path)))
                return cursor

            def close(self) -> None:
                log._add(Op("commit"))
                super().close()  # folds SQLite's log into the database
                log._add(Op("committed", snapshot=log._snapshot(path)))

        return real(database, *args, factory=Logged, **options)

    def _snapshot(self, database: Path) -> dict[str, bytes]:
        paths = (database, database.with_name(database.name + "-wal"))
        return {
            str(path.relative_to(self._root)): path.read_bytes() for path in paths if path.exists()
        }

    # Replay

    def states(self, cut: int, rng: random.Random) -> Iterator[State]:
        """What may be there if the power failed after the first `cut` operations; the same state
        may come twice.
        """
        disk = Disk()
        for op in filter(self._believe, self.ops[:cut]):
            disk.apply(op)
        for manifest in self._manifests(cut, rng):
            for happened in (False, True):
                for part in (0.0, 0.5, 1.0):
                    yield State(
                        disk.after_power_loss(lambda h=happened: h, lambda p=part: p), manifest
                    )
            for _ in range(4):
                files = disk.after_power_loss(
                    lambda: rng.random() < 0.5, lambda: rng.choice((0.0, rng.random(), 1.0))
                )
                yield State(files, manifest)

    def _manifests(self, cut: int, rng: random.Random) -> Iterator[Mapping[str, bytes]]:
        """That of the last commit; where one was under way, also a torn one, and the one it would
        have become.
        """
        commits = ("commit", "committed")
        before = [op for op in self.ops[:cut] if op.kind in commits and self._believe(op)]
        last = next((op.snapshot for op in reversed(before) if op.kind == "committed"), {})
        yield last
        if before and before[-1].kind == "commit" and self.ops[cut:]:
            after = next(op.snapshot for op in self.ops[cut:] if op.kind == "committed")
            yield after
            yield from _torn(last, after, rng)


def _torn(
    last: Mapping[str, bytes], after: Mapping[str, bytes], rng: random.Random
) -> Iterator[Mapping[str, bytes]]:
    """Yield, where a commit only appended to a file, one in which a part of that is missing."""
    changed = [name for name in after if after[name] != last.get(name, b"")]
    if (
        len(changed) == 1
        and set(last) <= set(after)
        and after[changed[0]].startswith(last.get(changed[0], b""))
    ):
        [name] = changed
        yield {
            **after,
            name: after[name][: rng.randrange(len(last.get(name, b"")), len(after[name]))],
        }


def _parent(path: str) -> str:
    return str(Path(path).parent)


def _parents(path: str) -> list[str]:
    return [str(p) for p in Path(path).parents][:-1]
