"""A server of others for a benchmark: a process of its own that listens on a port of our choice."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from .server import BenchError, connect, last_line
from .session import Session

_PATIENCE = 30.0  # s that a server may take to stop


class Process:
    """A server that is started at once; its /health says 200 when the constructor returns.

    Its model may still be loading: the first request waits.
    """

    def __init__(self, session: Session, command: Sequence[str], log: Path):
        self._session = session
        port = free_port()
        listen = ["--host", "127.0.0.1", "--port", str(port)]
        self.process = session.start([*command, *listen], log)
        self.client = connect(f"http://127.0.0.1:{port}/v1")
        while not self._is_healthy():
            if self.process.poll() is not None:
                ended = self.process.returncode
                raise BenchError(f"{command[0]} ended with {ended}: {last_line(log)}")
            time.sleep(0.05)

    def _is_healthy(self) -> bool:
        try:
            return self.client.get(self.client.base_url.join("/health")).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        self.client.close()
        self.process.terminate()
        try:
            self.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._session.ended(self.process)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
