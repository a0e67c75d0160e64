"""Keeps the server running and its log within bounds.

    python -m agentmem.service.supervisor

launchd and systemd start it, and `agentmem service start` does where there is neither.

It starts `agentmem serve`, and again whenever that ends, after 0.5 s, then twice as long each time,
60 s at most. What the server prints goes through a pipe into the log, so that crashes of native
code are in it too. SIGTERM goes on to the server, and the supervisor ends when that has.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from logging.handlers import RotatingFileHandler

from .files import ServiceFiles, ServiceState, acquire, end, note_pid, service_files

LOG_BYTES = 10 << 20  # after which a log becomes server.log.1
OLD_LOGS = 3
STARTED = "agentmem service: starting the server"
_READY = b"Ready: "  # what `agentmem serve` prints once it answers, and its URL
_FIRST_DELAY = 0.5  # s
_LONGEST_DELAY = 60.0  # s
_LONGEST_LINE = 1 << 16  # bytes
_STEADY = 60.0  # s of answering, after which an end is no longer counted with those before
_ORPHAN_PATIENCE = 30.0  # s that a server without supervisor gets to end


def main() -> int:
    os.umask(0o077)
    files = service_files()
    log = _open_log(files)
    try:
        lock = acquire(files.supervisor)
    except BlockingIOError:
        log.info("agentmem service: another supervisor runs already")
        return 1
    note_pid(lock, os.getpid())
    end(files.server, _ORPHAN_PATIENCE)  # of a supervisor that was killed
    asyncio.run(_Supervisor(files, log).run())
    return 0


def _open_log(files: ServiceFiles) -> logging.Logger:
    handler = RotatingFileHandler(
        files.log, maxBytes=LOG_BYTES, backupCount=OLD_LOGS, encoding="utf-8"
    )
    log = logging.Logger("service")
    log.addHandler(handler)
    return log


class _Supervisor:
    def __init__(self, files: ServiceFiles, log: logging.Logger):
        self._files = files
        self._log = log
        self._stop = asyncio.Event()
        self._state = ServiceState("starting", time.time())
        self._ready_at: float | None = None

    async def run(self) -> None:
        """Keep the server running until SIGTERM or SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop.set)
        delay = _FIRST_DELAY
        while True:
            await self._run_server()
            if self._stop.is_set():
                return
            if self._ready_at is not None and time.monotonic() - self._ready_at >= _STEADY:
                delay = _FIRST_DELAY
            self._say(f"the server ended ({self._state.ended}); again in {delay:g} s")
            try:
                await asyncio.wait_for(self._stop.wait(), delay)
                return
            except TimeoutError:
                delay = min(2 * delay, _LONGEST_DELAY)

    async def _run_server(self) -> None:
        self._ready_at = None
        self._note(phase="starting", since=time.time(), url=None)
        self._log.info(STARTED)
        try:
            process = await self._spawn()
        except OSError as e:  # no memory for another process, say
            return self._note_end(str(e))
        stopping = asyncio.create_task(self._terminate_when_told(process))
        assert process.stdout is not None
        async for line in _lines(process.stdout):
            self._log.info(line.decode(errors="replace"))
            if line.startswith(_READY) and self._state.url is None:
                self._ready_at = time.monotonic()
                self._note(phase="ready", url=line.split()[1].decode().removesuffix("/v1"))
        code = await process.wait()
        stopping.cancel()
        if not self._stop.is_set():
            ended = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            self._note_end(ended)

    async def _spawn(self) -> asyncio.subprocess.Process:
        lock = acquire(self._files.server)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "agentmem",
                "serve",
                "--config",
                str(self._files.settings),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                pass_fds=(lock,),
                env=_environment(),
            )
            note_pid(lock, process.pid)
        finally:
            os.close(lock)
        return process

    async def _terminate_when_told(self, process: asyncio.subprocess.Process) -> None:
        await self._stop.wait()
        self._note(phase="stopping")
        self._say("stopping the server")
        with contextlib.suppress(ProcessLookupError):
            process.terminate()

    def _note_end(self, ended: str) -> None:
        self._note(phase="waiting", url=None, ended=ended, restarts=self._state.restarts + 1)

    def _note(self, **changes: object) -> None:
        self._state = replace(self._state, **changes)  # type: ignore[arg-type]
        # on a full disk the server goes on, and so it is supervised
        with contextlib.suppress(OSError):
            self._state.write(self._files.state)

    def _say(self, text: str) -> None:
        self._log.info(f"agentmem service: {time.strftime('%Y-%m-%d %H:%M:%S')} {text}")


def _environment() -> dict[str, str]:
    """Return the server's environment: without settings, which the file has.

    A progress bar is a line of the log every 10 s.
    """
    settings = {name for name in os.environ if name.startswith("AGENTMEM_")} - {"AGENTMEM_BLAS"}
    kept = {name: value for name, value in os.environ.items() if name not in settings}
    return kept | {"TQDM_MININTERVAL": "10"}


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Yield lines without their ends, those of progress bars too.

    What is longer than _LONGEST_LINE comes in parts.
    """
    rest = b""
    while chunk := await stream.read(1 << 16):
        *lines, rest = (rest + chunk).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            yield line
        if len(rest) > _LONGEST_LINE:
            yield rest
            rest = b""
    if rest:
        yield rest


if __name__ == "__main__":
    raise SystemExit(main())
