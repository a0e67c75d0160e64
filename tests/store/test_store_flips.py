"""A flipped bit in the manifest: what the store still lists is what was saved, and it goes on."""

import fcntl
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from agentmem.agent_key import AgentKey
from agentmem.errors import StoreError
from agentmem.store.agent_store import AgentStore
from agentmem.store.files.crypto import Vault
from agentmem.store.records import BlockToSave, TailToSave
from support.store_child import BRANCHES, key_of, tensors_of

ENCRYPTED = {"unlock": lambda may_be_new: Vault(bytes(range(32)))}  # as AgentStore.open takes it
META = {"calibration": "c"}


@pytest.fixture(autouse=True)
def quick_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here loses its power."""
    real, full = fcntl.fcntl, getattr(fcntl, "F_FULLFSYNC", None)
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(
        fcntl, "fcntl", lambda fd, command, *args: command != full and real(fd, command, *args)
    )


def fill(root: Path, options: dict) -> AgentStore:
    """Two agents of four blocks and a tail, the first two blocks shared; still open."""
    store = AgentStore.open(root, "f0", META, **options)
    for branch in BRANCHES:
        parent = None
        for i in range(4):
            tokens = np.arange(8, dtype=np.uint32) + 100 * i + (int(branch[0]) if i > 1 else 0)
            key = key_of(parent, tokens)
            store.save_block(
                BlockToSave(
                    branch_id=branch,
                    agent=AgentKey("ns", f"agent {branch[0]}"),
                    key=key,
                    parent=parent,
                    tokens=tokens,
                    tensors=tensors_of(key),
                )
            )
            parent = key
        store.save_tail(
            TailToSave(
                branch_id=branch,
                agent=AgentKey("ns", f"agent {branch[0]}"),
                head=parent,
                tokens=tokens[:3],
                tensors=tensors_of(parent),
            )
        ).result()
    return store


def told(store: AgentStore) -> tuple[dict[bytes, tuple], dict[str, tuple]]:
    """Blocks by key, branches by id."""
    index = store.index()
    blocks = {b.key: (b.parent, b.tokens.tobytes()) for b in index.blocks}
    tails = {b.id: b.tail and b.tail.tokens.tobytes() for b in index.branches}
    return blocks, {b.id: (b.agent, b.head, tails[b.id]) for b in index.branches}


def use(store: AgentStore, expected: tuple[dict[bytes, tuple], dict[str, tuple]]) -> None:
    """Check that what is listed was saved, or is an earlier part of it; use all of the store."""
    blocks, branches = told(store)
    assert blocks.items() <= expected[0].items()
    assert [store.read_block(key).exception() for key in blocks] == [None] * len(blocks)
    for branch_id, (*owner, head, tail) in branches.items():
        *owner_before, head_before, tail_before = expected[1][branch_id]
        assert owner == owner_before
        assert (head, tail) == (head_before, tail_before) or tail is None
        assert head is None or head in blocks
    tokens = np.arange(8, dtype=np.uint32) + 1000
    key = key_of(None, tokens)
    store.save_block(
        BlockToSave(
            branch_id="2" * 32,
            agent=AgentKey("ns", "agent 2"),
            key=key,
            parent=None,
            tokens=tokens,
            tensors=tensors_of(key),
        )
    ).result()
    store.save_tail(
        TailToSave(
            branch_id="2" * 32,
            agent=AgentKey("ns", "agent 2"),
            head=key,
            tokens=tokens,
            tensors=tensors_of(key),
        )
    ).result()
    store.delete_agent(AgentKey("ns", "agent 0")).result()
    store.delete_branch(BRANCHES[1]).result()
    assert store.background_error is None
    assert store.read_block(key).exception() is None


@pytest.mark.parametrize("name", ["manifest.sqlite", "manifest.sqlite-wal"])
@pytest.mark.parametrize("options", [{}, ENCRYPTED], ids=["clear", "encrypted"])
def test_a_flipped_bit_of_the_manifest_is_never_believed(tmp_path, name, options):
    store = fill(tmp_path / "stopped", options)
    shutil.copytree(tmp_path / "stopped", tmp_path / "killed")
    store.close()
    source = tmp_path / ("killed" if name.endswith("-wal") else "stopped")
    data = (source / "f0" / name).read_bytes()
    store = AgentStore.open(tmp_path / "stopped", "f0", META, **options)
    expected = told(store)
    store.close()
    rng = random.Random(name)
    opened = 0
    for case in range(100):
        # every other one where the tables are described
        at = (
            rng.randrange(4096)
            if case % 2 and name == "manifest.sqlite"
            else rng.randrange(len(data))
        )
        damaged = tmp_path / str(case)
        shutil.copytree(source, damaged)
        (damaged / "f0" / name).write_bytes(
            data[:at] + bytes([data[at] ^ 1 << case // 2 % 8]) + data[at + 1 :]
        )
        try:
            store = AgentStore.open(damaged, "f0", META, **options)
        except StoreError as e:
            assert "\n" not in str(e)
            continue
        use(store, expected)
        store.close()
        opened += 1
    assert opened > 95
