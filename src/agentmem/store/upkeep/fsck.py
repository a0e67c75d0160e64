"""What `agentmem store` does: look at every model's store, check every byte, delete what may go.

Looking and checking need no lock, so they also work beside a server. Changing needs it, so beside a
server the server is asked to.
"""

import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ...errors import CorruptSegment, StoreError
from ...locks import release
from ..files.layout import Layout
from ..files.quarantine import empty_quarantine
from ..files.segment import make_private_dir
from ..files.segment_file import read_file
from ..manifest.manifest import Manifest
from ..manifest.schema import Damaged
from ..records import FileRef
from .locks import Holder, acquire, holder
from .quota import disk_usage
from .reconcile import open_manifest, reconcile
from .trim import trim


@dataclass(frozen=True)
class StoreStats:
    """The size of one store, and who has it open."""

    fingerprint: str
    path: str
    agents: int
    branches: int
    blocks: int
    block_bytes: int
    tail_bytes: int
    disk_bytes: int  # with the manifest and what is in quarantine
    pinned: int
    encrypted: bool
    last_used: float | None  # Unix seconds
    bytes_written_by_hour: dict[int, int]  # hours since 1970, of the last two days
    holder: Holder | None  # the process that has it open


@dataclass
class Verified:
    """The findings of a check of one store."""

    fingerprint: str
    files: int = 0
    nbytes: int = 0
    damaged_rows: int = 0
    bad: list[str] = field(default_factory=list)  # files that are missing or don't match, and why
    quarantined: int = 0

    @property
    def ok(self) -> bool:
        return not self.bad and not self.damaged_rows


def stores(root: Path) -> list[Layout]:
    """Return one layout for each fingerprint under `root`, the most recently used first."""
    found = [Layout(path.parent) for path in root.glob("*/manifest.sqlite")]
    return sorted(found, key=lambda layout: -layout.manifest.stat().st_mtime)


def store_stats(layout: Layout) -> StoreStats:
    """Look at a store. Raises StoreError (of a newer format), sqlite3.Error, Damaged."""
    with closing(Manifest.open_read_only(layout.manifest)) as manifest:
        agents = manifest.agents.all()
        _, branches = manifest.counts()
        blocks, tails = manifest.block_files(), manifest.tail_files()
        return StoreStats(
            fingerprint=layout.root.name,
            path=str(layout.root),
            agents=len(agents),
            branches=branches,
            blocks=len(blocks),
            block_bytes=sum(ref.nbytes for ref in blocks.values()),
            tail_bytes=sum(ref.nbytes for ref in tails.values()),
            disk_bytes=disk_usage(layout.root),
            pinned=sum(agent.pinned for agent in agents),
            encrypted="encryption" in manifest.meta(),
            last_used=max((agent.last_used for agent in agents), default=None),
            bytes_written_by_hour=manifest.writes(),
            holder=holder(layout),
        )


def verify(layout: Layout, progress: Callable[[int], object], *, repair: bool = False) -> Verified:
    """Read every file and compare it with its row. `progress` gets bytes as they are read.

    `repair`: put aside what is bad, and what is built on it; raises InUse beside a server, which
    does that by itself when it comes across it. Raises as `store_stats` does.
    """
    report = Verified(layout.root.name)
    bad: list[Path] = []
    with closing(Manifest.open_read_only(layout.manifest)) as manifest:
        report.damaged_rows = manifest.count_damaged_rows()
        for path, find in _files(layout, manifest):
            ref = find()
            if ref is None:
                continue
            report.files += 1
            report.nbytes += ref.nbytes
            problem = _problem(path, ref)
            if problem and find() == ref:  # a running server may have replaced it meanwhile
                report.bad.append(problem)
                bad.append(path)
            progress(ref.nbytes)
    if repair and not report.ok:
        with _changing(layout) as manifest:
            for path in bad:
                if path.exists():
                    path.replace(layout.quarantine / path.name)
                    report.quarantined += 1
            reconcile(layout, manifest)
    return report


def collect_garbage(root: Path, limit: int, *, keep: str | None = None) -> int:
    """Let the least recently used stores but `keep` shrink until all of them take `limit` bytes.

    Returns what they take then. One that can't be changed (a server has it open, its format is
    newer, its disk fails) stays as it is, and counts.
    """
    others = (
        [layout for layout in stores(root) if layout.root.name != keep] if root.is_dir() else []
    )
    sizes = {layout: disk_usage(layout.root) for layout in others}
    for layout in reversed(others):
        if sum(sizes.values()) > limit:
            try:
                sizes[layout] = shrink(layout, sum(sizes.values()) - limit)
            except (StoreError, OSError, sqlite3.Error, Damaged):
                continue
    return sum(sizes.values())


def shrink(layout: Layout, nbytes: int) -> int:
    """Delete what has expired and what is in quarantine; if need be, what was used longest ago.

    It ends when `nbytes` are free, and returns the bytes that the store takes then. An empty store
    goes altogether. Raises InUse, Damaged.
    """
    before = disk_usage(layout.root)
    with _changing(layout, Manifest.open) as manifest:
        with manifest.transaction():
            for agent in manifest.agents.expired(time.time()):
                manifest.delete_agent(agent)
        empty_quarantine(layout)
        reconcile(layout, manifest)
        if (short := nbytes - (before - disk_usage(layout.root))) > 0:
            with manifest.transaction():
                trim(manifest, short)
            reconcile(layout, manifest)
        if not manifest.agents.all():
            shutil.rmtree(layout.root)
            return 0
        manifest.shrink()
    return disk_usage(layout.root)


def _files(
    layout: Layout, manifest: Manifest
) -> Iterator[tuple[Path, Callable[[], FileRef | None]]]:
    """Yield each file with how to look up, again, what its row says."""
    for key in manifest.block_files():
        yield layout.block(key), partial(manifest.block_file, key)
    for branch_id, ref in manifest.tail_files().items():
        yield layout.tail(branch_id, ref.generation), partial(manifest.tail_file, branch_id)


def _problem(path: Path, ref: FileRef) -> str | None:
    try:
        read_file(path, ref.nbytes, ref.checksum)
    except CorruptSegment as e:
        return e.message
    return None


@contextmanager
def _changing(
    layout: Layout, opened: Callable[[Path], Manifest] | None = None
) -> Iterator[Manifest]:
    """Lock a store and give its manifest, opened by `opened`.

    By default one that is damaged is put aside.
    """
    lock = acquire(layout)
    try:
        for directory in (layout.blocks, layout.tails, layout.quarantine):
            make_private_dir(directory)
        with closing(opened(layout.manifest) if opened else open_manifest(layout)) as manifest:
            yield manifest
    finally:
        release(lock)
