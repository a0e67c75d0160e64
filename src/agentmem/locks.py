"""Locks between processes: files that one process at a time holds, with a note of who that is.

The lock is flock's. It goes with its process, and a child that inherits the open file holds it too.
The note is only a word to others, believed while the lock is held: a pid of a process that is long
gone does no harm. Only the standard library is imported here, as the service's supervisor does.
"""

import fcntl
import os
import time
from pathlib import Path

_PAUSE = 0.01  # s between two tries
_MAX_NOTE = 1024  # bytes that are read of a note


def acquire(path: Path, *, patience: float = 0.0) -> int:
    """Lock the file, made if need be, and return its descriptor; the last holder's note stays.

    Closing it, or the end of the process, lets go. Raises BlockingIOError where it is held for
    longer than `patience` s: who looks for its holder has it for a moment.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        os.fchmod(fd, 0o600)
        _flock(fd, time.monotonic() + patience)
    except OSError:
        os.close(fd)
        raise
    return fd


def _flock(fd: int, deadline: float) -> None:
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_PAUSE)


def release(fd: int) -> None:
    """Let go of a lock, unless a child process holds it too."""
    os.close(fd)


def write_note(fd: int, text: str) -> None:
    """Say in a lock that is held who holds it."""
    # in this order: whoever reads it meanwhile finds the beginning of a note
    os.ftruncate(fd, os.pwrite(fd, text.encode(), 0))


def holder_note(path: Path) -> str | None:
    """Return the note of whoever holds the lock, "" before there is one; None: nobody does."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return os.pread(fd, _MAX_NOTE, 0).decode(errors="replace")
    finally:
        os.close(fd)
