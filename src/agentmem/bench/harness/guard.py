"""Clean up after a benchmark however it ended, by `kill -9` too.

`python -m agentmem.bench.harness.guard DIRECTORY` reads "+PID" and "-PID", a line each: process
groups that run and that have ended. When its input ends, those still running are killed and the
directory is removed. It holds the benchmark's lock until then (inherited, so that the next
benchmark waits for it).
"""

import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path


def main() -> None:
    running: set[int] = set()
    for line in sys.stdin:
        pid = int(line[1:])
        running.add(pid) if line[0] == "+" else running.discard(pid)
    for pid in running:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    _remove(Path(sys.argv[1]))


def _remove(directory: Path) -> None:
    """Remove it again and again: a process that is being killed may still write a file there."""
    for _ in range(50):
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            return
        time.sleep(0.1)


if __name__ == "__main__":
    main()
