"""One process at a time has a store open: it holds the lock file, which says who that is and where
it can be reached.

    12345 http://127.0.0.1:8000

The lock is flock's, which goes with its process; the text is only a word to others.
"""

import fcntl
import os
import time
from dataclasses import dataclass

from ...errors import StoreError
from ..files.layout import Layout


@dataclass(frozen=True)
class Holder:
    pid: str
    url: str | None  # None: not a server, or one that isn't ready yet


class InUse(StoreError):
    def __init__(self, layout: Layout, holder: Holder):
        super().__init__(
            f"the store at {layout.root} is in use by process {holder.pid}; stop it, or use another --home"
        )
        self.holder = holder


def acquire(layout: Layout, *, patience: float = 0.0) -> int:
    """The open lock file; closing it, or the process's end, lets go. InUse: it is held for longer
    than `patience` s.
    """
    fd = os.open(layout.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        os.fchmod(fd, 0o600)
        _flock(fd, time.monotonic() + patience)
        _write(fd, str(os.getpid()))
    except BlockingIOError:
        pid, _, url = os.pread(fd, 1024, 0).decode(errors="replace").partition(" ")
        os.close(fd)
        raise InUse(layout, Holder(pid or "unknown", url or None)) from None
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
        time.sleep(0.01)


def release(fd: int) -> None:
    os.close(fd)


def announce(fd: int, url: str) -> None:
    _write(fd, f"{os.getpid()} {url}")


def _write(fd: int, text: str) -> None:
    # in this order: whoever reads it meanwhile finds a pid
    os.ftruncate(fd, os.pwrite(fd, text.encode(), 0))
