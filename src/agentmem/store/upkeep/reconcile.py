"""Bring manifest and files into line when a store is opened.

That is done from names alone: no file's content is read.
"""

import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from ..files.layout import Layout
from ..files.quarantine import trim_quarantine
from ..manifest.database import files_of
from ..manifest.manifest import Manifest
from ..manifest.schema import Damaged
from ..records import IMPORTS

log = logging.getLogger(__name__)


def reconcile(layout: Layout, manifest: Manifest) -> None:
    """Cut branches back to what is whole, drop rows that lead nowhere, remove files without a row.

    A branch root <- A <- B <- C whose file of B is lost becomes root <- A, without a tail; the rows
    of B and C go, and so does C's file if no other branch holds it. An encrypted file without a key
    is as good as lost, where the manifest is unlocked.
    """
    found = {*_files(layout.blocks), *_files(layout.tails)}
    with manifest.transaction():
        manifest.agents.delete_namespace(IMPORTS)
        _trim(layout, manifest, found)
        manifest.delete_empty_branches()
        manifest.agents.delete_bare()
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
    """Open the manifest; one that is damaged is put aside, and a new one takes its place.

    Everything is prefilled again then.
    """
    try:
        manifest = Manifest.open(layout.manifest)
    except Damaged as e:
        log.error("the manifest %s is damaged (%s): put aside, starting empty", layout.manifest, e)
        _put_aside(layout)
        manifest = Manifest.open(layout.manifest)
        manifest.damaged_rows = 1
    if manifest.damaged_rows:
        log.warning("%d damaged rows of %s were dropped", manifest.damaged_rows, layout.manifest)
    return manifest


def _put_aside(layout: Layout) -> None:
    database, write_ahead_log, index = files_of(layout.manifest)
    for path in (database, write_ahead_log):
        if path.exists() and path.stat().st_size:
            path.replace(layout.quarantine / f"{time.time_ns()}-{path.name}")
    for path in (database, write_ahead_log, index):
        path.unlink(missing_ok=True)


def _trim(layout: Layout, manifest: Manifest, found: set[str]) -> None:
    parents, keys = manifest.parents(), manifest.keys
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
    """Yield everything that isn't a directory, at any depth."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(Path(entry.path))
            else:
                yield entry.path
