"""One benchmark run: alone on the machine, and nothing left behind however it ends."""

import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ... import locks
from ...config import Settings
from ...errors import StartupError

NOISE = 0.10  # change of the probe's time above which a run counts as disturbed
_ROOM = 10**9  # bytes of disk that a run may take
_COOL_DOWN = 60.0  # s at most, on a Mac, between passes


class Interrupted(KeyboardInterrupt):
    """SIGTERM or SIGHUP, as Ctrl-C."""


class Session:
    """What a benchmark may use.

    It is a directory, processes that don't outlive it, and a measure of the machine's calm.
    """

    def __init__(self, directory: Path, guard: IO[str], say: Callable[[str], None]):
        self.directory = directory
        self.say = say
        self._guard = guard
        self._probes = [probe_ms()]

    def start(self, command: Sequence[str], log: Path, **options: Any) -> "subprocess.Popen[str]":
        """Start a process in a group of its own, which is killed with the session.

        Its output goes to `log`, unless `options` (of Popen) say.
        """
        with log.open("a") as file:
            options = {"stdout": file} | options
            process = subprocess.Popen(
                command, stderr=file, text=True, start_new_session=True, **options
            )
        self._tell("+", process.pid)
        return process

    def ended(self, process: "subprocess.Popen[str]") -> None:
        self._tell("-", process.pid)

    def _tell(self, sign: str, pid: int) -> None:
        self._guard.write(f"{sign}{pid}\n")
        self._guard.flush()

    def cool_down(self) -> None:
        """Wait until a fixed computation takes what it took at first.

        Only on a Mac, which slows down as it heats up.
        """
        until = time.monotonic() + _COOL_DOWN
        while platform.system() == "Darwin" and time.monotonic() < until:
            if probe_ms() <= self._probes[0] * (1 + NOISE / 2):
                return
            time.sleep(5.0)

    def noise(self) -> dict[str, Any]:
        """Time a fixed computation again; `quiet` is false where it moved by more than 10 %."""
        self._probes.append(probe_ms())
        before = self._probes[0]
        after = self._probes[-1]
        change = after / before - 1
        if abs(change) > NOISE:
            self.say(
                f"warning: a fixed computation took {before:.0f} ms before "
                f"and {after:.0f} ms after: not a quiet run"
            )
        return {
            "probe_before_ms": before,
            "probe_after_ms": after,
            "change": change,
            "quiet": abs(change) <= NOISE,
        }


def probe_ms() -> float:
    """Return the median time of the same eight products of 1,024 x 1,024 matrices."""
    import mlx.core as mx  # the session is made when its BLAS is loaded

    a = mx.full((1024, 1024), 1e-3)
    times = []
    for _ in range(5):
        b = a
        began = time.perf_counter()
        for _ in range(8):
            b = a @ b
        mx.eval(b)
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def check_room(settings: Settings) -> None:
    """Raise StartupError where the disk is so full that a store would soon keep nothing."""
    directory = tempfile.gettempdir()
    kept = settings.store_min_free
    disk = shutil.disk_usage(directory)
    need = _ROOM + int(kept if isinstance(kept, int) else kept * disk.total)
    if disk.free < need:
        raise StartupError(
            f"{directory} has {disk.free / 1e9:.1f} GB free, "
            f"a benchmark wants {need / 1e9:,.1f} (store_min_free and 1 GB): "
            "set TMPDIR to a directory on another disk"
        )


def lock_file() -> Path:
    return Path(tempfile.gettempdir()) / f"agentmem-bench-{os.getuid()}.lock"


@contextmanager
def bench_session(say: Callable[[str], None]) -> Iterator[Session]:
    """Hold the machine for one benchmark. Ctrl-C, SIGTERM and SIGHUP end it cleanly.

    `say` shows a line of text to the user. Raises StartupError where another benchmark of this user
    runs.
    """
    try:
        lock = locks.acquire(lock_file())
    except BlockingIOError:
        raise StartupError(
            "another benchmark is running on this machine: two would disturb each other"
        ) from None
    try:
        with _interruptible(), _guarded(lock) as (directory, guard):
            yield Session(directory, guard, say)
    finally:
        locks.release(lock)


@contextmanager
def _guarded(lock: int) -> Iterator[tuple[Path, IO[str]]]:
    """Give a private directory, and the input of a guard that removes it."""
    directory = Path(tempfile.mkdtemp(prefix="agentmem-bench-"))
    guard = subprocess.Popen(
        [sys.executable, "-m", "agentmem.bench.harness.guard", str(directory)],
        stdin=subprocess.PIPE,
        text=True,
        pass_fds=(lock,),
        start_new_session=True,
    )
    assert guard.stdin is not None
    try:
        yield directory, guard.stdin
    finally:
        guard.stdin.close()
        guard.wait()


@contextmanager
def _interruptible() -> Iterator[None]:
    def interrupt(number: int, frame: object) -> None:
        raise Interrupted

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
