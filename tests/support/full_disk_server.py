"""`agentmem serve` on a disk that is full while a file exists.

usage: full_disk_server.py FLAG_FILE [serve's options]
"""

import errno
import os
import sys
from pathlib import Path

from agentmem.cli.main import main
from agentmem.store.files import segment


class FullDisk:
    """The `os` that segment.py writes through."""

    def __init__(self, flag: Path):
        self._flag = flag

    def __getattr__(self, name):
        return getattr(os, name)

    def write(self, fd, data):
        if self._flag.exists():
            os.write(fd, data[: len(data) // 2])  # as much as there was room for
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.write(fd, data)


if __name__ == "__main__":
    flag, sys.argv[1:] = Path(sys.argv[1]), ["serve", *sys.argv[2:]]
    segment.os = FullDisk(flag)
    main()
