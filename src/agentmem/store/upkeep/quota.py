"""The disk that the store takes, by what its files really occupy, and how much more it may."""

import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import StoreFailed
from ..manifest.database import files_of

_PAGE = 4096  # bytes: what file systems round a file up to
_SLACK = 0.01  # of the quota, freed in addition: not every write should have to make room


class StoreFull(StoreFailed):
    """There is no room under the quota or on the disk, and nothing that may leave.

    The save isn't made.
    """

    code = "store_full"


class LeastRecentlyUsed(StoreFailed):
    """The store is full of what was used more recently.

    The save isn't made, and the store is well.
    """


@dataclass(frozen=True)
class Limits:
    """The bounds that a store keeps."""

    quota: int | None = None  # bytes that the store's directory may take
    min_free: int = 0  # bytes that the disk keeps free for others


class Quota:
    """The bytes of disk in use, and the bounds; on the writer's thread, after it was opened."""

    def __init__(self, root: Path, manifest: Path, limits: Limits):
        self._root, self._limits = root, limits
        self._manifest = files_of(manifest)
        self.used = disk_usage(root)
        self._counted = {path: _occupied(path) for path in (*self._manifest, *_directories(root))}

    def count_manifest(self) -> None:
        """Look again at what the manifest occupies."""
        self.recount(*self._manifest)

    def recount(self, *paths: Path) -> None:
        """Look again at directories and the manifest's files, which change without being told."""
        for path in paths:
            before, self._counted[path] = self._counted.get(path, 0), _occupied(path)
            self.used += self._counted[path] - before

    def grew(self, nbytes: int) -> None:
        """Count what a new file occupies."""
        self.used += nbytes

    def shrank(self, nbytes: int) -> None:
        """Count what a file that is gone occupied."""
        self.used -= nbytes

    @property
    def over_quota(self) -> int:
        """Return the bytes that are in use over the quota."""
        return max(0, self.used - self._limits.quota) if self._limits.quota is not None else 0

    def short_by(self, nbytes: int) -> int:
        """Return the bytes that must go before files of `nbytes` fit; 0: none."""
        short = 0
        if self._limits.quota is not None:
            short = self.used + rounded(nbytes) - self._limits.quota
        if self._limits.min_free:
            short = max(
                short, rounded(nbytes) + self._limits.min_free - shutil.disk_usage(self._root).free
            )
        return max(0, short)

    @property
    def most(self) -> int:
        """Return the most bytes that the store may ever take."""
        free = shutil.disk_usage(self._root).free + self.used - self._limits.min_free
        return free if self._limits.quota is None else min(free, self._limits.quota)

    @property
    def slack(self) -> int:
        """Return the bytes that are freed in addition, when something must go."""
        return int(self._limits.quota * _SLACK) if self._limits.quota else 0

    def full(self) -> StoreFull:
        """Return the error that says how full the store is."""
        quota, free = self._limits.quota, self._limits.min_free
        return StoreFull(
            f"the store is full: it takes {self.used:,} bytes (store_quota {quota or 0:,}, "
            f"store_min_free {free:,}), and what is left is pinned or in use"
        )


def rounded(nbytes: int) -> int:
    """Return what a file of `nbytes` occupies."""
    return -(-nbytes // _PAGE) * _PAGE


def disk_usage(root: Path) -> int:
    """Return the bytes that a directory occupies, as `du` counts them.

    Each file counts once, whatever its names.
    """
    return sum(
        {(found.st_dev, found.st_ino): found.st_blocks * 512 for found in _stats(root)}.values()
    )


def _stats(path: Path) -> Iterator[os.stat_result]:
    try:
        found = os.lstat(path)
        below = os.listdir(path) if stat.S_ISDIR(found.st_mode) else []
    except FileNotFoundError:  # a store in use changes
        return
    yield found
    for name in below:
        yield from _stats(path / name)


def _directories(root: Path) -> Iterator[Path]:
    yield root
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _directories(Path(entry.path))


def _occupied(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except (FileNotFoundError, NotADirectoryError):
        return 0
