"""Trace: what the engine did when, as Chrome trace events.

`--trace FILE` writes them; open it in https://ui.perfetto.dev. One event a line, times in us:

    {"name": "decode", "ph": "X", "ts": 1204.1, "dur": 48.0, "pid": 71, "tid": 0,
     "args": {"agents": ["alice", "bob"]}}

Rows (tid): 0 forward passes, 1 sealing and handing over to the writer, 2 to 17 restores.
"""

import json
import os
import time
from pathlib import Path
from typing import Any, TextIO

from ..errors import StartupError

_ROWS = {"prefill": 0, "decode": 0, "seal": 1}


class Trace:
    """A file of events. Engine thread only. Without a path, nothing is kept."""

    def __init__(self, path: Path | None):
        """Begin the file. Raises StartupError where it can't be written."""
        self._file: TextIO | None = None
        self._count = 0
        if path is not None:
            try:
                self._file = path.open("w", buffering=1 << 20)
                path.chmod(0o600)
            except OSError as e:
                raise StartupError(f"trace: can't write {path}: {e}") from None
            self._file.write("[\n")

    def span(self, name: str, began: float, ended: float | None = None, **args: Any) -> None:
        """Note what took from `began` to `ended` (time.perf_counter()), by default until now."""
        if self._file is None:
            return
        ended = ended or time.perf_counter()
        self._count += 1
        row = _ROWS.get(name, 2 + self._count % 16)
        event = {
            "name": name,
            "ph": "X",
            "ts": began * 1e6,
            "dur": (ended - began) * 1e6,
            "pid": os.getpid(),
            "tid": row,
        }
        self._file.write(json.dumps(event | {"args": args}) + ",\n")

    def close(self) -> None:
        """End the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
