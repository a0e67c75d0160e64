"""What tests of the store save in it and read back."""

import contextlib
import hashlib
import sqlite3
from pathlib import Path

import numpy as np

from agentmem.agent_key import AgentKey
from agentmem.errors import CorruptSegment
from agentmem.store.agent_store import AgentStore
from agentmem.store.files.layout import Layout
from agentmem.store.records import BlockToSave, TailToSave
from agentmem.tensors import HostTensor

META = {"calibration": "c1"}


B1, B2, B3 = "1" * 32, "2" * 32, "3" * 32


@contextlib.contextmanager
def opened(root: Path, meta=META, **options):
    store = AgentStore.open(root, "f0", meta, **options)
    try:
        yield store
    finally:
        store.close()


def make_older(store: Path, version: int) -> None:
    """Let the store in this directory be of an earlier format, with the same rows."""
    path = store / "manifest.sqlite"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(f"PRAGMA user_version = {version}")
        db.execute(f"PRAGMA application_id = {(0x61676D << 8) + version if version > 1 else 0}")


def key(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()[:16]


def tokens(name: str) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(name.encode()).digest(), np.uint32)


def tensors(name: str, nbytes: int = 4096) -> dict[str, HostTensor]:
    return {
        "k": HostTensor(
            "U32", (nbytes // 4,), np.random.default_rng(list(name.encode())).bytes(nbytes)
        )
    }


def save(store: AgentStore, branch: str, agent: str, chain: str, **options):
    """Save the blocks root, root+1, ... named by the prefixes of `chain`; the last future."""
    for i in range(1, len(chain) + 1):
        name, parent = chain[:i], key(chain[: i - 1]) if i > 1 else None
        future = store.save_block(
            BlockToSave(
                branch_id=branch,
                agent=AgentKey("ns", agent),
                key=key(name),
                parent=parent,
                tokens=tokens(name),
                tensors=tensors(name, **options),
            )
        )
    return future


def save_tail(store: AgentStore, branch: str, agent: str, chain: str, name: str):
    return store.save_tail(
        TailToSave(
            branch_id=branch,
            agent=AgentKey("ns", agent),
            head=key(chain),
            tokens=tokens(name),
            tensors=tensors(name),
            metadata={"name": name},
        )
    )


def tail_name(store: AgentStore, branch: str) -> str | None:
    """Return the name under which `save_tail` stored it, if it can be read."""
    try:
        got, metadata = store.read_tail(branch).result()
    except CorruptSegment:
        return None
    assert bytes(got["k"].data) == tensors(metadata["name"])["k"].data
    return metadata["name"]


def holds(store: AgentStore, name: str) -> bool:
    try:
        got = store.read_block(key(name)).result()
    except CorruptSegment:
        return False
    assert bytes(got["k"].data) == tensors(name)["k"].data
    return True


def files(root: Path) -> list[str]:
    layout = Layout(root / "f0")
    found = [*layout.blocks.rglob("*"), *layout.tails.rglob("*"), *layout.quarantine.rglob("*")]
    return sorted(str(path.relative_to(layout.root)) for path in found if path.is_file())


def index(root: Path):
    """What a fresh open would find: branches by id, and the blocks' keys."""
    with opened(root) as store:
        found = store.index()
    return {b.id: b for b in found.branches}, {b.key for b in found.blocks}
