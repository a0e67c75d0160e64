"""`agentmem` in a terminal of its own: what is typed, and what a reader sees."""

import os
import pty
import re
import select
import subprocess
import sys
import time

_IN_TERMINAL = (  # it becomes the process's own, so that Ctrl-C in it is a signal
    "import fcntl, runpy, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "runpy.run_module('agentmem', run_name='__main__')"
)
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"


class Terminal:
    def __init__(self, *arguments: str, environment: dict[str, str]):
        self._main, terminal = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _IN_TERMINAL, *arguments],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=environment | {"TERM": "xterm", "COLUMNS": "200"},
            start_new_session=True,
        )
        os.close(terminal)
        self.raw = b""
        self._seen = 0

    @property
    def text(self) -> str:
        """All that was written, without escape sequences."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", self.raw.decode(errors="replace"))

    def type(self, keys: str) -> None:
        os.write(self._main, keys.encode())

    def line(self, text: str) -> None:
        self.type(f"{text}\n")

    def until(self, pattern: str, timeout: float = 30) -> re.Match[str]:
        """The first match after the last one's end."""
        deadline, is_open = time.monotonic() + timeout, True
        while not (found := re.compile(pattern).search(self.text, self._seen)):
            assert is_open and time.monotonic() < deadline, (
                f"no {pattern!r} in {self.text[self._seen :]!r}"
            )
            is_open = self._read()
        self._seen = found.end()
        return found

    def ends(self) -> int:
        """The exit code."""
        deadline = time.monotonic() + 30
        while self._read():
            assert time.monotonic() < deadline, f"it goes on: {self.text[self._seen :]!r}"
        return self.process.wait(10)

    def _read(self) -> bool:
        """What comes within 0.1 s. False: nothing comes any more."""
        if not select.select([self._main], [], [], 0.1)[0]:
            return True
        try:
            part = os.read(self._main, 65536)
        except OSError:  # Linux says so when the other end is closed
            part = b""
        self.raw += part
        return bool(part)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._main)
