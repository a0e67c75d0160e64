"""Opening the directory of a store: lock it, bring manifest and files into line, make it fit."""

import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...errors import StoreError
from ...locks import release
from ..files.crypto import Vault
from ..files.layout import Layout
from ..files.segment import make_private_dir
from ..manifest.manifest import Manifest
from ..manifest.schema import Damaged
from .locks import acquire
from .quota import Limits, Quota
from .reconcile import open_manifest, reconcile
from .trim import trim

_PATIENCE = 1.0  # s; `agentmem store stats` holds the lock for a moment, to see whether anyone does
_ENCRYPTION = "encryption"  # in the manifest's meta: a value that only the same master key gives


@dataclass(frozen=True)
class StoreFiles:
    """A store's directory, locked and in order."""

    layout: Layout
    manifest: Manifest
    lock: int  # file descriptor
    quota: Quota
    address_secret: bytes


@contextmanager
def opened(
    root: Path,
    fingerprint: str,
    meta: dict[str, str],
    limits: Limits,
    unlock: Callable[[bool], Vault] | None,
) -> Iterator[StoreFiles]:
    """Open the directory of a store, as AgentStore.open says.

    What it gives is closed at the end only if the block raises; disk errors become StoreError.
    """
    assert re.fullmatch(r"[0-9A-Za-z][0-9A-Za-z._-]*", fingerprint), fingerprint
    layout = Layout(Path(root) / fingerprint)
    with ExitStack() as undo:
        try:
            make_private_dir(layout.root)
            lock = acquire(layout, patience=_PATIENCE)
            undo.callback(release, lock)
            for directory in (layout.blocks, layout.tails, layout.quarantine):
                make_private_dir(directory)
            manifest = open_manifest(layout)
            undo.callback(manifest.close)
            vault = _unlock(layout, manifest, unlock)
            with manifest.transaction():
                if manifest.meta() | {_ENCRYPTION: ""} != meta | {_ENCRYPTION: ""}:
                    manifest.forget_blocks()
                manifest.set_meta(meta | _encryption(vault))
            reconcile(layout, manifest)
            quota = _fit(layout, manifest, limits)
            secret = vault.derive(b"content addresses") if vault else b""
            yield StoreFiles(
                layout=layout, manifest=manifest, lock=lock, quota=quota, address_secret=secret
            )
        except (OSError, sqlite3.Error, Damaged) as e:
            raise StoreError(
                f"can't open the store at {layout.root}: {e}; to start empty, move it away"
            ) from e
        undo.pop_all()


def _unlock(
    layout: Layout, manifest: Manifest, unlock: Callable[[bool], Vault] | None
) -> Vault | None:
    """Unlock the manifest of a store that is encrypted; return the master key's vault, if any.

    Raises StoreError if what is stored can't be read that way.
    """
    stored = manifest.meta().get(_ENCRYPTION)
    empty = manifest.is_empty()
    if unlock is None:
        if manifest.is_sealed() or (stored and not empty):
            raise StoreError(f"the store at {layout.root} is encrypted: start with --encrypt")
        return None
    vault = unlock(empty or not stored)
    manifest.unlock(vault)
    if stored != vault.check.hex() and manifest.keys and manifest.keys.block_keys():
        return vault  # it opens what is there: the note of it is damaged
    if not empty and stored is None:
        raise StoreError(
            f"the store at {layout.root} holds caches in the clear: delete that directory, or use "
            "another --home, and start with --encrypt again"
        )
    if not empty and stored != vault.check.hex():
        raise StoreError(
            f"the store at {layout.root} is encrypted with another master key: give the right one"
        )
    return vault


def _fit(layout: Layout, manifest: Manifest, limits: Limits) -> Quota:
    """Let go of what is over a quota that was lowered; return the store's use of its quota."""
    quota = Quota(layout.root, layout.manifest, limits)
    if quota.over_quota == 0:
        return quota
    with manifest.transaction():
        trim(manifest, quota.over_quota)
    reconcile(layout, manifest)
    return Quota(layout.root, layout.manifest, limits)


def _encryption(vault: Vault | None) -> dict[str, str]:
    return {_ENCRYPTION: vault.check.hex()} if vault else {}
