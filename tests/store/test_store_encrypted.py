"""Encrypted files and their keys: nothing in the clear, nothing lost with another agent or kept of
a deleted one.
"""

import contextlib
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from agentmem.agent_key import AgentKey
from agentmem.errors import CorruptSegment, NotFound, StoreError
from agentmem.store.agent_store import AgentStore
from agentmem.store.files import segment
from agentmem.store.files.crypto import Vault
from agentmem.store.files.layout import Layout
from agentmem.store.manifest import schema
from agentmem.store.records import BlockToSave, BranchHead, TailToSave
from agentmem.tensors import HostTensor
from support.stores import B1, B2, B3, META, files, holds, key, save, save_tail, tail_name, tensors
from support.stores import opened as opened_clear

VAULT = Vault(b"m" * 32)
RUN = np.arange(1_000_000, 1_000_064, dtype=np.uint32)  # token ids, recognisable
TEXT = b"recognisable bytes of a tensor! " * 512


def opened(root: Path, vault: Vault = VAULT):
    return opened_clear(root, unlock=lambda _: vault)


def everything(root: Path) -> bytes:
    return b"".join(path.read_bytes() for path in root.rglob("*") if path.is_file())


def query(root: Path, sql: str, *values):
    with contextlib.closing(
        sqlite3.connect(root / "f0" / "manifest.sqlite", isolation_level=None)
    ) as db:
        return db.execute(sql, values).fetchall()


def readable(root: Path, *names: str, tails: dict[str, str] | None = None) -> bool:
    """Return whether a fresh open has exactly these blocks and tails, as they were saved."""
    with opened(root) as store:
        found = store.index()
        assert {block.key for block in found.blocks} == {key(name) for name in names}
        assert {b.id: tail_name(store, b.id) for b in found.branches if b.tail} == (tails or {})
        return all(holds(store, name) for name in names)


def test_neither_tensors_nor_token_ids_are_in_any_file(tmp_path):
    data = {"k0.packed": HostTensor("U8", (len(TEXT),), TEXT)}

    def write(store):
        store.save_block(
            BlockToSave(
                branch_id=B1,
                agent=AgentKey("ns", "alice"),
                key=key("a"),
                parent=None,
                tokens=RUN,
                tensors=data,
                metadata={"secret": "told in confidence"},
            )
        )
        store.save_tail(
            TailToSave(
                branch_id=B1,
                agent=AgentKey("ns", "alice"),
                head=key("a"),
                tokens=RUN[::-1],
                tensors=data,
                metadata={"secret": "told in confidence"},
            )
        ).result()
        store.quarantine_block(key("zz")).result()

    traces = [
        TEXT[:32],
        RUN[:4].astype("<u4").tobytes(),
        RUN[::-1][:4].astype("<u4").tobytes(),
        b"told in confidence",
        b"packed",
    ]
    with opened_clear(tmp_path / "clear") as store:
        write(store)
        assert all(trace in everything(tmp_path / "clear") for trace in traces)
    with opened(tmp_path / "sealed") as store:
        write(store)
        assert not any(trace in everything(tmp_path / "sealed") for trace in traces)
        assert bytes(store.read_block(key("a"), ["0"]).result()["k0.packed"].data) == TEXT
    assert not any(trace in everything(tmp_path / "sealed") for trace in [*traces, VAULT.master])
    with opened(tmp_path / "sealed") as store:
        (block,), (branch,) = store.index().blocks, store.index().branches
        assert np.array_equal(block.tokens, RUN)
        assert np.array_equal(branch.tail.tokens, RUN[::-1])
        assert bytes(store.read_tail(B1).result()[0]["k0.packed"].data) == TEXT


@pytest.mark.parametrize("unlock", [None, lambda _: Vault(b"x" * 32)])
def test_without_its_master_key_a_store_is_refused_and_not_touched(tmp_path, unlock):
    with opened(tmp_path) as store:
        save(store, B1, "alice", "ab")
        save_tail(store, B1, "alice", "ab", "t").result()
    before = {
        path: path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file() and path.name != "lock"
    }
    with pytest.raises(StoreError, match="encrypted"):
        AgentStore.open(tmp_path, "f0", META, unlock=unlock)
    after = {
        path: path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file() and path.name != "lock"
    }
    assert after == before
    assert readable(tmp_path, "a", "ab", tails={B1: "t"})


def test_a_store_in_the_clear_is_not_opened_with_a_key(tmp_path):
    with opened_clear(tmp_path) as store:
        save(store, B1, "alice", "ab").result()
    with pytest.raises(StoreError, match="in the clear"):
        AgentStore.open(tmp_path, "f0", META, unlock=lambda _: VAULT)
    with opened_clear(tmp_path) as store:
        assert holds(store, "ab")


def test_a_new_master_key_may_be_made_only_for_an_empty_store(tmp_path):
    asked = []

    def unlock(may_create: bool) -> Vault:
        asked.append(may_create)
        return VAULT

    for _ in range(2):
        with opened_clear(tmp_path, unlock=unlock) as store:
            save(store, B1, "alice", "a").result()
    assert asked == [True, False]


def test_a_shared_block_outlives_its_first_owner(tmp_path):
    with opened(tmp_path) as store:
        save(store, B1, "alice", "abc").result()
        save(store, B2, "bob", "abd")
        save_tail(store, B2, "bob", "abd", "t").result()
        store.delete_agent(AgentKey("ns", "alice")).result()
        assert [holds(store, name) for name in ("a", "ab", "abd", "abc")] == [
            True,
            True,
            True,
            False,
        ]
    assert readable(tmp_path, "a", "ab", "abd", tails={B2: "t"})


def test_a_deleted_agents_key_is_in_no_file(tmp_path):
    with opened(tmp_path) as store:
        save(store, B1, "alice", "ab")
        save_tail(store, B1, "alice", "ab", "t")
        save(store, B2, "bob", "abc").result()
        ((data_key, agent_id),) = query(
            tmp_path, "SELECT data_key, id FROM agents WHERE name = 'alice'"
        )
        wrapped = [
            w
            for (w,) in query(
                tmp_path, "SELECT wrapped FROM block_keys WHERE agent_id = ?", agent_id
            )
        ]
        wrapped += [
            w
            for (w,) in query(tmp_path, "SELECT tail_key FROM branches WHERE tail_key IS NOT NULL")
        ]
        assert len(wrapped) == 3
        assert all(secret in everything(tmp_path) for secret in [data_key, *wrapped])
        store.delete_agent(AgentKey("ns", "alice")).result()
        assert not any(secret in everything(tmp_path) for secret in [data_key, *wrapped])
    assert readable(tmp_path, "a", "ab", "abc")


def test_an_agent_that_gets_a_deleted_ones_row_gets_a_key_of_its_own(tmp_path):
    with opened(tmp_path) as store:
        save(store, B1, "alice", "a").result()
        before = query(tmp_path, "SELECT id, data_key FROM agents")
        store.delete_agent(AgentKey("ns", "alice")).result()
        save(store, B2, "bob", "x").result()
        ((agent_id, data_key),) = query(tmp_path, "SELECT id, data_key FROM agents")
        assert agent_id == before[0][0]  # SQLite reuses it
        assert data_key != before[0][1]
        assert VAULT.unwrap(data_key, b"agent") != VAULT.unwrap(before[0][1], b"agent")
        assert query(tmp_path, "SELECT block FROM block_keys") == [(key("x"),)]
    assert readable(tmp_path, "x")


def test_a_forks_tail_is_readable_after_the_source_is_deleted(tmp_path):
    with opened(tmp_path) as store:
        save(store, B1, "alice", "ab")
        save_tail(store, B1, "alice", "ab", "t")
        assert (
            store.fork_branch(B1, BranchHead(B2, AgentKey("ns", "bob"), key("ab"), 1.0)).result()
            > 4096
        )
        store.delete_agent(AgentKey("ns", "alice")).result()
        assert tail_name(store, B2) == "t"
        assert holds(store, "ab")
    assert readable(tmp_path, "a", "ab", tails={B2: "t"})


@pytest.mark.parametrize("target_exists", [False, True])
def test_a_moved_agents_blocks_and_tails_are_readable(tmp_path, target_exists):
    kept = {B1: "t"}
    with opened(tmp_path) as store:
        save(store, B1, "alice", "abc")
        save_tail(store, B1, "alice", "abc", "t")
        if target_exists:
            save(store, B2, "bob", "abx")
            save_tail(store, B2, "bob", "abx", "u")
            kept[B2] = "u"
        target = AgentKey("ns" if target_exists else "other", "bob")
        store.move_agent(AgentKey("ns", "alice"), target).result()
        assert tail_name(store, B1) == "t"
    assert readable(tmp_path, "a", "ab", "abc", *(["abx"] * target_exists), tails=kept)
    with opened(tmp_path) as store:
        assert {agent.key.agent_id for agent in store.index().agents} == {"bob"}
        save(store, B3, "carol", "abc").result()
        assert store.delete_agent(target).result()
    assert readable(tmp_path, "a", "ab", "abc")


def test_a_damaged_file_key_costs_its_block_and_what_is_built_on_it(tmp_path):
    with opened(tmp_path) as store:
        save(store, B1, "alice", "abc")
        save_tail(store, B1, "alice", "abc", "t")
        save(store, B2, "bob", "xy")
        save_tail(store, B2, "bob", "xy", "u").result()
    ((wrapped,),) = query(tmp_path, "SELECT wrapped FROM block_keys WHERE block = ?", key("ab"))
    bad = bytes([*wrapped[:-1], wrapped[-1] ^ 1])
    query(tmp_path, "UPDATE block_keys SET wrapped = ? WHERE block = ?", bad, key("ab"))
    assert readable(tmp_path, "a", "x", "xy", tails={B2: "u"})
    with opened(tmp_path) as store:
        save(store, B1, "alice", "abc").result()
    assert readable(tmp_path, "a", "x", "xy", "ab", "abc", tails={B2: "u"})


def test_a_damaged_key_of_one_holder_costs_nothing_while_another_one_has_it(tmp_path):
    with opened(tmp_path) as store:
        save(store, B1, "alice", "ab").result()
        save(store, B2, "bob", "abc").result()
    query(
        tmp_path,
        "UPDATE block_keys SET wrapped = zeroblob(60) WHERE block = ? AND"
        " agent_id = (SELECT id FROM agents WHERE name = 'bob')",
        key("a"),
    )
    with opened(tmp_path) as store:
        assert holds(store, "a")
        store.delete_agent(AgentKey("ns", "alice")).result()
    assert readable(tmp_path, "a", "ab", "abc")


def test_a_block_saved_again_after_its_row_was_damaged_has_its_new_key(tmp_path):
    with opened(tmp_path) as store:
        save(store, B1, "alice", "ab")
        save(store, B2, "alice", "x").result()
    with contextlib.closing(
        sqlite3.connect(tmp_path / "f0" / "manifest.sqlite", isolation_level=None)
    ) as db:
        db.create_function("rowsum", -1, lambda *_: b"wrong")
        db.execute("UPDATE blocks SET created = 0 WHERE key = ?", (key("ab"),))
    with opened(tmp_path) as store:
        assert store.stats()["damaged_rows"] == 1
        save(store, B1, "alice", "ab").result()
        assert holds(store, "ab")
    assert readable(tmp_path, "a", "ab", "x")


def test_a_swapped_file_does_not_stand_in_for_another(tmp_path):
    """Not even with its own size and checksum in the row: a file's name is sealed into it."""
    with opened(tmp_path) as store:
        save(store, B1, "alice", "a")
        save(store, B2, "alice", "x").result()
    layout = Layout(tmp_path / "f0")
    layout.block(key("a")).write_bytes(layout.block(key("x")).read_bytes())
    with opened(tmp_path) as store:
        assert not holds(store, "a")
        assert holds(store, "x")


def parts_of(root: Path, name: str) -> tuple[bytearray, segment.Header]:
    data = bytearray(Layout(root / "f0").block(key(name)).read_bytes())
    return data, segment.parse_header(data, len(data))


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_part_swapped_with_another_files_is_found_by_who_reads_it(tmp_path, encrypted):
    with (opened if encrypted else opened_clear)(tmp_path) as store:
        for branch, name in ((B1, "a"), (B2, "x")):
            rng = np.random.default_rng(list(name.encode()))
            data = {
                tensor: HostTensor("U32", (250,), rng.bytes(1000))
                for tensor in ("k0.x", "k1.x", "s0.0@8")
            }
            store.save_block(
                BlockToSave(
                    branch_id=branch,
                    agent=AgentKey("ns", "alice"),
                    key=key(name),
                    parent=None,
                    tokens=RUN,
                    tensors=data,
                )
            ).result()
        (one, header), (other, _) = parts_of(tmp_path, "a"), parts_of(tmp_path, "x")
        part = header.parts["1"]
        swapped = slice(header.nbytes + part.start, header.nbytes + part.stop)
        one[swapped] = other[swapped]
        Layout(tmp_path / "f0").block(key("a")).write_bytes(one)
        assert store.read_block(key("a"), ["0", "@8"]).result().keys() == {"k0.x", "s0.0@8"}
        for wanted in (["1"], None):
            with pytest.raises(CorruptSegment):
                store.read_block(key("a"), wanted).result()


def test_no_part_stands_in_for_another_files_even_where_row_and_header_were_made_to_fit(tmp_path):
    with opened(tmp_path) as store:
        for branch, name in ((B1, "a"), (B2, "x")):
            data = {tensor: HostTensor("U32", (250,), TEXT[:1000]) for tensor in ("k0.x", "k1.x")}
            store.save_block(
                BlockToSave(
                    branch_id=branch,
                    agent=AgentKey("ns", "alice"),
                    key=key(name),
                    parent=None,
                    tokens=RUN,
                    tensors=data,
                )
            ).result()
    (one, _), (other, _) = parts_of(tmp_path, "a"), parts_of(tmp_path, "x")
    tensors, others = segment.decode(one)[0], segment.decode(other)[0]
    forged = segment.encode(tensors | {"s1": others["s1"]}, {})
    header = segment.parse_header(forged, len(forged))
    Layout(tmp_path / "f0").block(key("a")).write_bytes(forged)
    with contextlib.closing(
        sqlite3.connect(tmp_path / "f0" / "manifest.sqlite", isolation_level=None)
    ) as db:
        schema.prepare(db)
        checksum = segment.checksum(forged[: header.nbytes])
        db.execute("UPDATE blocks SET checksum = ? WHERE key = ?", (checksum, key("a")))
    with opened(tmp_path) as store:
        assert bytes(store.read_block(key("a"), ["0"]).result()["k0.x"].data) == TEXT[:1000]
        with pytest.raises(CorruptSegment, match="decrypt"):
            store.read_block(key("a"), ["1"]).result()


def test_a_save_that_a_lost_key_makes_impossible_changes_no_row(tmp_path):
    with opened(tmp_path) as store:
        save(store, B1, "alice", "ab").result()
        query(tmp_path, "UPDATE block_keys SET wrapped = zeroblob(60)")
        failed = store.fork_branch(B1, BranchHead(B2, AgentKey("ns", "bob"), key("ab"), 1.0))
        with pytest.raises(CorruptSegment, match="lost"):
            failed.result()
        assert query(tmp_path, "SELECT name FROM agents") == [("alice",)]
        assert query(tmp_path, "SELECT id FROM branches") == [(B1,)]
        missing = store.move_agent(AgentKey("ns", "nobody"), AgentKey("ns", "carol"))
        with pytest.raises(NotFound):
            missing.result()
        assert query(tmp_path, "SELECT name FROM agents") == [("alice",)]


def test_linked_files_carry_their_keys(tmp_path):
    with opened(tmp_path) as store:
        save(store, B1, "alice", "ab")
        save_tail(store, B1, "alice", "ab", "t").result()
        linked = store.link_files([key("a"), key("ab")], [B1]).result()
        store.delete_agent(AgentKey("ns", "alice")).result()
        assert files(tmp_path) == []
        for name, wanted in ((key("a"), "a"), (key("ab"), "ab"), (B1, "t")):
            assert bytes(store.read_linked(linked, name)[0]["k"].data) == tensors(wanted)["k"].data
        store.unlink(linked).result()


@pytest.mark.parametrize("change", ["UPDATE meta SET value = 'x'", "DELETE FROM meta"])
def test_a_damaged_note_of_the_master_key_costs_nothing_that_the_right_key_opens(tmp_path, change):
    with opened(tmp_path) as store:
        save(store, B1, "alice", "ab").result()
    query(tmp_path, f"{change} WHERE key = 'encryption'")
    with pytest.raises(StoreError, match="start with --encrypt"), opened_clear(tmp_path):
        pass
    with pytest.raises(StoreError), opened(tmp_path, Vault(b"n" * 32)):
        pass
    assert readable(tmp_path, "a", "ab")
