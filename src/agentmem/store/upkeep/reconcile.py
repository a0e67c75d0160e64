"""Bring manifest and files into line when a store is opened, from names alone: no file's content is
read.
"""

import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from ..files.layout import Layout
from ..files.segment import remove_file
from ..keys import FileKeys
from ..manifest.manifest import Manifest
from ..manifest.schema import Damaged
from ..records import IMPORTS

log = logging.getLogger(__name__)
MAX_QUARANTINE = 64 << 20  # bytes; the oldest go


def reconcile(layout: Layout, manifest: Manifest, keys: FileKeys | None = None) -> None:
    """Cut branches back to what is whole, drop rows that lead nowhere, remove files that no row
    names.

    A branch root <- A <- B <- C whose file of B is lost becomes root <- A, without a tail; the rows
    of B and C go, and so does C's file if no other branch holds it. `keys`: of encrypted files; one
    without a key is as good as lost.
    """
    found = {*_files(layout.blocks), *_files(layout.tails)}
    with manifest.transaction():
        manifest.delete_namespace(IMPORTS)
        _trim(layout, manifest, found, keys)
        manifest.delete_empty_branches()
        manifest.delete_bare_agents()
        manifest.delete_unreachable()
    named = {str(layout.block(key)) for key in manifest.parents()}
    named |= {
        str(layout.tail(branch_id, ref.generation))
        for branch_id, ref in manifest.tail_files().items()
    }
    for path in found - named:
        os.unlink(path)
    shutil.rmtree(layout.exports, ignore_errors=True)
    trim_quarantine(layout)


def open_manifest(layout: Layout) -> Manifest:
    """The manifest; one that is damaged is put aside, and a new one takes its place: everything is
    prefilled again.
    """
    try:
        manifest = Manifest.open(layout.manifest)
    except Damaged as e:
        log.error("the manifest %s is damaged (%s): put aside, starting empty", layout.manifest, e)
        for suffix in ("", "-wal", "-shm"):
            path = layout.manifest.with_name(layout.manifest.name + suffix)
            if path.exists():
                path.replace(layout.quarantine / f"{time.time_ns()}-{path.name}")
        manifest = Manifest.open(layout.manifest)
        manifest.damaged_rows = 1
    if manifest.damaged_rows:
        log.warning("%d damaged rows of %s were dropped", manifest.damaged_rows, layout.manifest)
    return manifest


def trim_quarantine(layout: Layout, limit: int = MAX_QUARANTINE) -> int:
    """Delete the oldest files until `limit` bytes are left; bytes that became free."""
    files = sorted(
        ((path, path.stat()) for path in layout.quarantine.iterdir()),
        key=lambda file: -file[1].st_mtime,
    )
    kept = freed = 0
    for path, stat in files:
        kept += stat.st_size
        if kept > limit:
            freed += remove_file(path) or 0
    return freed


def empty_quarantine(layout: Layout) -> int:
    return trim_quarantine(layout, -1)


def _trim(layout: Layout, manifest: Manifest, found: set[str], keys: FileKeys | None) -> None:
    parents = manifest.parents()
    block_keys = keys.mend() if keys else parents
    whole: set[bytes | None] = {None}
    for key, parent in parents.items():  # each after its parent
        if parent in whole and str(layout.block(key)) in found and key in block_keys:
            whole.add(key)
    tails = manifest.tail_files()
    tail_keys = keys.tail_keys() if keys else tails
    for branch_id, head in manifest.heads().items():
        kept = head
        while kept not in whole:
            kept = parents.get(kept) if kept is not None else None
        if kept != head:
            manifest.cut_branch(branch_id, kept)
        elif (tail := tails.get(branch_id)) and (
            str(layout.tail(branch_id, tail.generation)) not in found or branch_id not in tail_keys
        ):
            manifest.clear_tail(branch_id)


def _files(directory: Path) -> Iterator[str]:
    """Everything that isn't a directory, at any depth."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(Path(entry.path))
            else:
                yield entry.path
