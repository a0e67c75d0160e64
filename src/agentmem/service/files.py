"""What the service keeps in one directory, who runs it, and how it fares.

Only the standard library is imported here: the supervisor stays small, and starts whatever else is
broken. In ~/.agentmem/service there are

    serve.toml       the server's settings
    server.log       what server and supervisor print; server.log.1 to .3 are older
    supervisor.lock  held while the supervisor runs; its pid
    server.lock      held while the server runs; its pid
    state.json       what the supervisor knows of the server

Locks are flock's, which go with their processes: a pid is believed only while its lock is held, so
that one of another process, or of one long gone, does no harm. The server inherits its lock from
the supervisor and outlives it with it.
"""

import contextlib
import json
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from .. import locks
from ..errors import AgentMemError


class ServiceError(AgentMemError):
    """The service did not do what it was told."""


@dataclass(frozen=True)
class ServiceFiles:
    """The files of a service, all in one directory."""

    root: Path

    @property
    def settings(self) -> Path:
        return self.root / "serve.toml"

    @property
    def log(self) -> Path:
        return self.root / "server.log"

    @property
    def supervisor(self) -> Path:
        return self.root / "supervisor.lock"

    @property
    def server(self) -> Path:
        return self.root / "server.lock"

    @property
    def state(self) -> Path:
        return self.root / "state.json"


def service_files() -> ServiceFiles:
    """Return the files of this user's service."""
    return ServiceFiles(Path.home() / ".agentmem" / "service")


@dataclass(frozen=True)
class ServiceState:
    """What the supervisor knows of the server, as state.json has it."""

    phase: Literal["starting", "ready", "waiting", "stopping"]  # waiting: to start it again
    since: float  # Unix seconds: when the server was started
    restarts: int = 0  # times that it ended by itself
    url: str | None = None  # once it answers
    ended: str | None = None  # how it ended, the last time that it did

    @classmethod
    def read(cls, path: Path) -> "ServiceState | None":
        """Return what was written; None if it can't be read.

        No supervisor has written it yet, or one of another version has, or a power cut left half
        of it.
        """
        try:
            return cls(**json.loads(path.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    @property
    def told(self) -> str:
        """How the server fares, in words."""
        if not self.restarts:
            return self.phase
        return f"{self.phase} after {self.restarts} restarts, the last time {self.ended}"

    def write(self, path: Path) -> None:
        new = path.with_suffix(".new")
        new.write_text(json.dumps(asdict(self)))
        new.replace(path)


def open_private(path: str, flags: int) -> int:
    """Open a file that only its owner may read: an `opener` for open()."""
    return os.open(path, flags, 0o600)


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    with open(new, "x", encoding="utf-8", opener=open_private) as file:
        file.write(text)
    new.replace(path)


def acquire(lock: Path, patience: float = 2.0) -> int:
    """Return the open lock file, empty.

    Raise BlockingIOError if another process holds it for longer than `patience` s.
    """
    fd = locks.acquire(lock, patience=patience)
    os.ftruncate(fd, 0)
    return fd


def note_pid(fd: int, pid: int) -> None:
    """Say in a lock which process holds it."""
    locks.write_note(fd, str(pid))


def holder(lock: Path) -> int | None:
    """Return the pid of the process that holds it, 0 if it has not said yet; None: nobody does."""
    note = locks.holder_note(lock)
    return None if note is None else int(note or 0)


def end(lock: Path, patience: float) -> None:
    """End the process that holds a lock, if one does: SIGTERM, and SIGKILL after `patience` s.

    Raise ServiceError if it does not end.
    """
    for number, wait in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
        deadline = time.monotonic() + wait
        told = False
        while (pid := holder(lock)) is not None:
            if pid and not told:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
                told = True
            if time.monotonic() >= deadline:
                break
            time.sleep(0.05)
        else:
            return
    raise ServiceError(f"process {pid} holds {lock} and does not end")
