"""One process at a time has a store open: it holds the lock file, which says who and where it is.

12345 http://127.0.0.1:8000
"""

import os
from dataclasses import dataclass

from ... import locks
from ...errors import StoreError
from ..files.layout import Layout


@dataclass(frozen=True)
class Holder:
    """The process that has a store open."""

    pid: str
    url: str | None  # None: not a server, or one that isn't ready yet


class InUse(StoreError):
    """Another process has the store open."""

    def __init__(self, layout: Layout, holder: Holder):
        super().__init__(
            f"the store at {layout.root} is in use by process {holder.pid}; stop it, or use "
            "another --home"
        )
        self.holder = holder


def acquire(layout: Layout, *, patience: float = 0.0) -> int:
    """Lock the store and return the open lock file; closing it, or the process's end, lets go.

    Raises InUse where it is held for longer than `patience` s.
    """
    try:
        fd = locks.acquire(layout.lock, patience=patience)
    except BlockingIOError:
        raise InUse(layout, holder(layout) or Holder("unknown", None)) from None
    locks.write_note(fd, str(os.getpid()))
    return fd


def announce(fd: int, url: str) -> None:
    """Say in the lock file where the server that holds it can be reached."""
    locks.write_note(fd, f"{os.getpid()} {url}")


def holder(layout: Layout) -> Holder | None:
    """Return the process that has the store open, if any."""
    note = locks.holder_note(layout.lock)
    if note is None:
        return None
    pid, _, url = note.partition(" ")
    return Holder(pid or "unknown", url or None)
