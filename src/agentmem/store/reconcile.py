"""Bring manifest and files into line when a store is opened, from names alone: no file's content is read."""

import os
from collections.abc import Iterator
from pathlib import Path

from .layout import Layout
from .manifest import Manifest


def reconcile(layout: Layout, manifest: Manifest) -> None:
    """Cut branches back to what is whole, drop rows that lead nowhere, remove files that no row names.

    A branch root <- A <- B <- C whose file of B is lost becomes root <- A, without a tail; the rows of B and C go, and
    so does C's file if no other branch holds it.
    """
    found = {*_files(layout.blocks), *_files(layout.tails)}
    with manifest.transaction():
        _trim(layout, manifest, found)
        manifest.delete_empty_branches()
        manifest.delete_unreachable()
    named = {str(layout.block(key)) for key in manifest.parents()}
    named |= {str(layout.tail(branch_id, ref.generation)) for branch_id, ref in manifest.tail_files().items()}
    for path in found - named:
        os.unlink(path)


def _trim(layout: Layout, manifest: Manifest, found: set[str]) -> None:
    parents = manifest.parents()
    whole: set[bytes | None] = {None}
    for key, parent in parents.items():  # each after its parent
        if parent in whole and str(layout.block(key)) in found:
            whole.add(key)
    tails = manifest.tail_files()
    for branch_id, head in manifest.heads().items():
        kept = head
        while kept not in whole:
            kept = parents.get(kept) if kept is not None else None
        if kept != head:
            manifest.cut_branch(branch_id, kept)
        elif branch_id in tails and str(layout.tail(branch_id, tails[branch_id].generation)) not in found:
            manifest.clear_tail(branch_id)


def _files(directory: Path) -> Iterator[str]:
    """Everything that isn't a directory, at any depth."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(Path(entry.path))
            else:
                yield entry.path
