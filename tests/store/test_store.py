import contextlib
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from agentmem.agent_key import AgentKey
from agentmem.errors import CorruptSegment, InvalidRequest, NotFound, ShuttingDown, StoreError
from agentmem.store.agent_store import AgentStore
from agentmem.store.files import segment
from agentmem.store.files.layout import Layout
from agentmem.store.files.reader import Catalog, Reader
from agentmem.store.records import AgentRecord, BlockToSave, BranchHead, FileRef, TailToSave
from agentmem.store.upkeep import fsck
from agentmem.store.writer.writer import StoreWriteSkipped
from agentmem.tensors import HostTensor, part_of
from support.stores import (
    B1,
    B2,
    B3,
    META,
    files,
    holds,
    index,
    key,
    make_older,
    opened,
    save,
    save_tail,
    tensors,
    tokens,
)


@pytest.fixture
def store(tmp_path):
    with opened(tmp_path) as store:
        yield store


def test_what_was_saved_is_there_after_reopening(tmp_path):
    with opened(tmp_path) as store:
        record = save(store, B1, "alice", "abc").result()
        save_tail(store, B1, "alice", "abc", "t").result()
        assert record.nbytes == Layout(tmp_path / "f0").block(key("abc")).stat().st_size
        assert holds(store, "a")
    with opened(tmp_path) as store:
        found = store.index()
        (branch,) = found.branches
        assert [a.key.agent_id for a in found.agents] == ["alice"]
        assert [(b.key, b.parent) for b in found.blocks] == [
            (key("a"), None),
            (key("ab"), key("a")),
            (key("abc"), key("ab")),
        ]
        assert (branch.agent, branch.head) == (AgentKey("ns", "alice"), key("abc"))
        assert np.array_equal(branch.tail.tokens, tokens("t"))
        assert all(
            np.array_equal(b.tokens, tokens(n))
            for b, n in zip(found.blocks, ["a", "ab", "abc"], strict=True)
        )
        assert all(holds(store, n) for n in ("a", "ab", "abc"))
        got, metadata = store.read_tail(B1).result()
        assert bytes(got["k"].data) == tensors("t")["k"].data
        assert metadata["name"] == "t"
        stats = store.stats()
        assert (stats["agents"], stats["branches"], stats["blocks"], stats["writes"]) == (
            1,
            1,
            3,
            0,
        )
        assert stats["block_bytes"] + stats["tail_bytes"] == sum(
            (tmp_path / "f0" / f).stat().st_size for f in files(tmp_path)
        )


def test_every_file_and_directory_is_private_under_umask_0(tmp_path):
    before = os.umask(0)
    try:
        with opened(tmp_path / "home" / "store") as store:
            save(store, B1, "alice", "ab")
            save_tail(store, B1, "alice", "ab", "t").result()
            found = list((tmp_path / "home").rglob("*"))
            assert {p.name for p in found} >= {
                "manifest.sqlite",
                "manifest.sqlite-wal",
                "manifest.sqlite-shm",
                "lock",
            }
            for path in [tmp_path / "home", *found]:
                assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), (
                    path
                )
    finally:
        os.umask(before)


def test_a_key_that_is_stored_keeps_its_first_bytes_and_costs_no_write(store):
    first = save(store, B1, "alice", "a").result()
    other = store.save_block(
        BlockToSave(
            branch_id=B2,
            agent=AgentKey("ns", "bob"),
            key=key("a"),
            parent=None,
            tokens=tokens("a"),
            tensors=tensors("other"),
        )
    ).result()
    assert other.checksum == first.checksum
    assert store.stats()["writes"] == 1
    assert holds(store, "a")


def test_a_shared_block_lives_until_its_last_agent_is_deleted(tmp_path):
    with opened(tmp_path) as store:
        save(store, B1, "alice", "abc")
        save(store, B2, "bob", "abd")
        save_tail(store, B2, "bob", "abd", "t").result()
        assert store.delete_agent(AgentKey("ns", "alice")).result() is True
        assert [holds(store, n) for n in ("a", "ab", "abd", "abc")] == [True, True, True, False]
        assert store.delete_agent(AgentKey("other", "bob")).result() is False
        assert len(files(tmp_path)) == 4
        assert store.delete_agent(AgentKey("ns", "bob")).result() is True
        assert files(tmp_path) == []
        assert store.delete_agent(AgentKey("ns", "bob")).result() is False
        assert {
            store.stats()[n] for n in ("agents", "branches", "blocks", "block_bytes", "tail_bytes")
        } == {0}


def test_a_deleted_agents_bytes_and_token_ids_are_nowhere_on_disk(tmp_path):
    with opened(tmp_path) as store:
        save(store, B1, "alice", "ab")
        save_tail(store, B1, "alice", "ab", "t")
        store.quarantine_block(key("ab")).result()
        save_tail(store, B1, "alice", "a", "u").result()

        def everything():
            return b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())

        traces = [tokens(n).tobytes() for n in ("a", "u")] + [
            tensors(n)["k"].data for n in ("a", "ab", "u")
        ]
        assert all(trace in everything() for trace in [*traces, b"alice"])
        store.delete_agent(AgentKey("ns", "alice")).result()
        assert not any(trace in everything() for trace in [*traces, b"alice"])


def test_deleting_one_branch_leaves_the_other(tmp_path):
    with opened(tmp_path) as store:
        save(store, B1, "alice", "abc")
        save_tail(store, B1, "alice", "abc", "t")
        store.save_branch(BranchHead(B2, AgentKey("ns", "alice"), key("ab"), last_used=5.0))
        store.delete_branch(B1).result()
        assert len(files(tmp_path)) == 2
    branches, blocks = index(tmp_path)
    assert branches.keys() == {B2}
    assert blocks == {key("a"), key("ab")}


def test_a_tail_that_no_longer_follows_its_head_is_gone(tmp_path):
    with opened(tmp_path) as store:
        save(store, B1, "alice", "ab")
        save_tail(store, B1, "alice", "ab", "t").result()
        store.save_branch(
            BranchHead(B1, AgentKey("ns", "alice"), key("ab"), last_used=1.0)
        ).result()
        assert store.read_tail(B1).result()[1]["name"] == "t"
        save_tail(store, B1, "alice", "ab", "u").result()
        assert store.read_tail(B1).result()[1]["name"] == "u"
        save(store, B1, "alice", "abc").result()
        with pytest.raises(CorruptSegment):
            store.read_tail(B1).result()
        assert len(files(tmp_path)) == 3


def test_a_corrupt_block_is_refused_and_quarantine_cuts_every_branch_before_it(tmp_path):
    with opened(tmp_path) as store:
        save(store, B1, "alice", "abcd")
        save(store, B2, "bob", "abx")
        save(store, B3, "carol", "a")
        for branch, agent, chain in ((B1, "alice", "abcd"), (B2, "bob", "abx"), (B3, "carol", "a")):
            save_tail(store, branch, agent, chain, "t" + chain).result()
        path = Layout(tmp_path / "f0").block(key("ab"))
        bad = bytearray(path.read_bytes())
        bad[-1] ^= 1
        path.write_bytes(bad)
        with pytest.raises(CorruptSegment, match="checksum"):
            store.read_block(key("ab")).result()
        store.quarantine_block(key("ab")).result()
        store.quarantine_block(key("ab")).result()
        assert store.stats()["quarantined"] == 1
        assert [f for f in files(tmp_path) if f.startswith("quarantine")] == [
            f"quarantine/{key('ab').hex()}.safetensors"
        ]
        assert not holds(store, "abcd")
        save(store, B2, "bob", "ab").result()
        assert holds(store, "ab")
    branches, blocks = index(tmp_path)
    assert [branches[b].head for b in (B1, B2, B3)] == [key("a"), key("ab"), key("a")]
    assert [branches[b].tail is None for b in (B1, B2, B3)] == [True, True, False]
    assert blocks == {key("a"), key("ab")}


def test_a_corrupt_tail_is_quarantined_and_its_blocks_stay(tmp_path):
    with opened(tmp_path) as store:
        save(store, B1, "alice", "ab")
        save_tail(store, B1, "alice", "ab", "t").result()
        (path,) = Layout(tmp_path / "f0").tails.iterdir()
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(CorruptSegment):
            store.read_tail(B1).result()
        store.quarantine_tail(B1).result()
        assert [Path(f).name for f in files(tmp_path) if f.startswith("quarantine")] == [path.name]
    assert index(tmp_path)[0][B1].head == key("ab")


def test_lost_files_trim_branches_to_what_is_whole_and_strays_go(tmp_path):
    layout = Layout(tmp_path / "f0")
    with opened(tmp_path) as store:
        save(store, B1, "alice", "abcd")
        save_tail(store, B1, "alice", "abcd", "t")
        save(store, B2, "bob", "abx")
        save_tail(store, B2, "bob", "abx", "u")
        save(store, B3, "carol", "z").result()
    layout.block(key("abc")).unlink()
    next(layout.tails.glob(B2 + "*")).unlink()
    layout.block(key("z")).unlink()
    for stray in (
        layout.blocks / "ab" / "x.tmp",
        layout.blocks / "x",
        layout.tails / f"{B2}-99.safetensors",
    ):
        stray.parent.mkdir(exist_ok=True)
        stray.write_bytes(b"x")
    branches, blocks = index(tmp_path)
    assert {b.id: (b.head, b.tail) for b in branches.values()} == {
        B1: (key("ab"), None),
        B2: (key("abx"), None),
    }
    assert blocks == {key("a"), key("ab"), key("abx")}
    assert len(files(tmp_path)) == 3


def test_other_meta_drops_every_block(tmp_path):
    with opened(tmp_path) as store:
        save(store, B1, "alice", "ab")
        save_tail(store, B1, "alice", "ab", "t").result()
    with opened(tmp_path, meta={"calibration": "c2"}) as store:
        assert (store.index().agents, store.index().branches, store.index().blocks) == ([], [], [])
    assert files(tmp_path) == []


def test_a_second_open_names_the_process_that_holds_the_store(tmp_path):
    with opened(tmp_path):
        code = (
            "from agentmem.store.agent_store import AgentStore as S;"
            f" S.open({str(tmp_path)!r}, 'f0', {META!r})"
        )
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (
            f"InUse: the store at {tmp_path / 'f0'} is in use by process {os.getpid()}"
            in child.stderr
        )
        with pytest.raises(StoreError, match=f"process {os.getpid()}"):
            AgentStore.open(tmp_path, "f0", META)
    with opened(tmp_path):
        pass


@pytest.mark.parametrize("in_log", [False, True])
def test_a_newer_format_is_refused_and_left_as_it_is(tmp_path, in_log):
    with opened(tmp_path) as store:
        save(store, B1, "alice", "ab").result()
    with contextlib.ExitStack() as stack:
        db = stack.enter_context(
            contextlib.closing(sqlite3.connect(tmp_path / "f0" / "manifest.sqlite"))
        )
        db.execute("PRAGMA user_version = 99")
        db.execute(f"PRAGMA application_id = {(0x61676D << 8) + 99}")
        if not in_log:
            stack.close()  # folds the log into the database
        snapshot = {
            p: p.read_bytes()
            for p in tmp_path.rglob("*")
            if p.is_file() and p.suffix != ".sqlite-shm"
        }
        with pytest.raises(StoreError, match="format 99"):
            AgentStore.open(tmp_path, "f0", META)
        assert {p: p.read_bytes() for p in snapshot} == snapshot


@pytest.mark.parametrize("damage", [b"no database" * 1000, b"", "format"])
def test_a_damaged_manifest_is_put_aside_and_the_store_starts_empty(tmp_path, damage):
    with opened(tmp_path) as store:
        save(store, B1, "alice", "ab").result()
    path = tmp_path / "f0" / "manifest.sqlite"
    if damage == "format":
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA user_version = 6")  # a flipped bit
    else:
        path.write_bytes(damage)
    with opened(tmp_path) as store:
        assert store.index().blocks == []
        assert [f for f in files(tmp_path) if "quarantine" not in f] == []
        assert damage == b"" or len(list((tmp_path / "f0" / "quarantine").iterdir())) == 1
        save(store, B1, "alice", "ab").result()


@pytest.mark.parametrize("table", ["agents", "branches", "blocks"])
def test_a_changed_value_in_a_row_costs_that_row_and_what_is_built_on_it(tmp_path, table):
    with opened(tmp_path) as store:
        save(store, B1, "alice", "abc").result()
        save(store, B2, "bob", "x").result()
    change = {
        "agents": "UPDATE agents SET name = 'bliss' WHERE name = 'alice'",
        "branches": f"UPDATE branches SET head = x'{key('ab').hex()}' WHERE id = '{B1}'",
        "blocks": "UPDATE blocks SET tokens = x'00' || x'ff' || substr(tokens, 3)"
        f" WHERE key = x'{key('ab').hex()}'",
    }[table]
    with contextlib.closing(
        sqlite3.connect(tmp_path / "f0" / "manifest.sqlite", isolation_level=None)
    ) as db:
        for (name,) in db.execute(
            "SELECT name FROM sqlite_schema WHERE type = 'trigger'"
        ).fetchall():
            trigger = db.execute("SELECT sql FROM sqlite_schema WHERE name = ?", (name,)).fetchone()
            db.execute(f"DROP TRIGGER {name}")
            if name.startswith(table):
                db.execute(change) if name.endswith("updated") else None
            db.execute(*trigger)
    branches, blocks = index(tmp_path)
    assert branches[B2].head == key("x")
    assert branches.keys() == {B2}  # nobody knows any more what came before a lost block
    assert blocks == {key("x")}


@pytest.mark.parametrize("version", [1, 4])
def test_a_store_of_an_older_format_starts_empty_and_one_line_says_so(tmp_path, version, caplog):
    with opened(tmp_path) as store:
        save(store, B1, "alice", "ab").result()
        save_tail(store, B1, "alice", "ab", "t").result()
    layout = Layout(tmp_path / "f0")
    make_older(layout.root, version)
    before = layout.manifest.read_bytes()
    stats, report = fsck.store_stats(layout), fsck.verify(layout, lambda _: None)
    assert (stats.agents, stats.blocks, report.files, report.ok) == (0, 0, 0, True)
    assert stats.disk_bytes > len(before)
    assert layout.manifest.read_bytes() == before
    assert caplog.messages == []
    with opened(tmp_path) as store:
        (line,) = caplog.messages
        assert str(layout.root) in line and f"format {version}" in line and "empty" in line
        assert (store.index().agents, store.index().branches, store.index().blocks) == ([], [], [])
        assert store.stats()["damaged_rows"] == 0
        assert files(tmp_path) == []
        save(store, B1, "alice", "ab").result()
        assert holds(store, "ab")
    with opened(tmp_path) as store:
        assert holds(store, "ab")
    assert len(caplog.messages) == 1
    make_older(layout.root, version)
    assert fsck.shrink(layout, 0) == 0
    assert not layout.root.exists()


@pytest.mark.parametrize("log", [b"", b"left over" * 1000])
def test_a_store_that_was_killed_while_an_older_manifest_was_removed_starts_empty(tmp_path, log):
    """The database goes before its log, which may be left."""
    with opened(tmp_path) as store:
        save(store, B1, "alice", "ab").result()
        left = layout_log(tmp_path).read_bytes()
    layout = Layout(tmp_path / "f0")
    layout.manifest.unlink()
    layout_log(tmp_path).write_bytes(log or left)
    with opened(tmp_path) as store:
        assert (store.index().agents, files(tmp_path)) == ([], [])
        save(store, B1, "alice", "ab").result()
        assert holds(store, "ab")
    assert index(tmp_path)[1] == {key("a"), key("ab")}


def layout_log(root: Path) -> Path:
    manifest = Layout(root / "f0").manifest
    return manifest.with_name(manifest.name + "-wal")


def in_parts(name: str) -> dict[str, HostTensor]:
    """Tensors of the parts "0", "1" and "@8"."""
    rng = np.random.default_rng(list(name.encode()))
    return {
        tensor: HostTensor("U32", (250,), rng.bytes(1000))
        for tensor in ("k0.x", "v0.x", "k1.x", "s0.0@8")
    }


def test_parts_of_blocks_and_snapshots_of_tails_are_told_when_saved_and_after_reopening(tmp_path):
    with opened(tmp_path) as store:
        saved = store.save_block(
            BlockToSave(
                branch_id=B1,
                agent=AgentKey("ns", "alice"),
                key=key("a"),
                parent=None,
                tokens=tokens("a"),
                tensors=in_parts("a"),
            )
        ).result()
        again = store.save_block(
            BlockToSave(
                branch_id=B2,
                agent=AgentKey("ns", "bob"),
                key=key("a"),
                parent=None,
                tokens=tokens("a"),
                tensors=in_parts("other"),
            )
        ).result()
        tail = store.save_tail(
            TailToSave(
                branch_id=B1,
                agent=AgentKey("ns", "alice"),
                head=key("a"),
                tokens=tokens("t"),
                tensors=in_parts("t"),
            )
        ).result()
        store.save_block(
            BlockToSave(
                branch_id=B3,
                agent=AgentKey("ns", "carol"),
                key=key("x"),
                parent=None,
                tokens=tokens("x"),
                tensors={},
            )
        ).result()
        store.fork_branch(B1, BranchHead("4" * 32, AgentKey("ns", "dave"), key("a"), 1.0)).result()
    assert (
        list(saved.parts.items())
        == list(again.parts.items())
        == [("0", 2000), ("1", 1000), ("@8", 1000)]
    )
    assert tail.parts == {"@8": 1000}
    branches, _ = index(tmp_path)
    with opened(tmp_path) as store:
        assert {b.key: b.parts for b in store.index().blocks} == {
            key("a"): saved.parts,
            key("x"): {},
        }
        assert store.read_block(key("x")).result() == {}
    assert {b.id: b.tail and b.tail.parts for b in branches.values()} == {
        B1: {"@8": 1000},
        B2: None,
        B3: None,
        "4" * 32: {"@8": 1000},
    }


def test_only_the_parts_asked_for_are_read_and_damage_elsewhere_does_not_matter_to_them(tmp_path):
    with opened(tmp_path) as store:
        store.save_block(
            BlockToSave(
                branch_id=B1,
                agent=AgentKey("ns", "alice"),
                key=key("a"),
                parent=None,
                tokens=tokens("a"),
                tensors=in_parts("a"),
            )
        ).result()
        path = Layout(tmp_path / "f0").block(key("a"))
        bad = bytearray(path.read_bytes())
        at = bad.index(in_parts("a")["k1.x"].data)
        bad[at + 500] ^= 1
        path.write_bytes(bad)
        for parts in (["0"], ["@8"], {"@8", "0"}, ["0", "@9"], []):
            expected = {n: bytes(t.data) for n, t in in_parts("a").items() if part_of(n) in parts}
            found = store.read_block(key("a"), parts).result()
            assert {name: bytes(tensor.data) for name, tensor in found.items()} == expected
        for parts in (["1"], ["0", "1"], None):
            with pytest.raises(CorruptSegment, match="checksum"):
                store.read_block(key("a"), parts).result()
        linked = store.link_files([key("a")], []).result()
        with pytest.raises(CorruptSegment, match="checksum"):
            store.read_linked(linked, key("a"))
        assert not fsck.verify(Layout(tmp_path / "f0"), lambda _: None).ok


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/passwd", "a\0b", "🦊" * 20, "n" * 200, "", "' OR 1=1 --"]
)
def test_an_agents_name_is_never_a_path(tmp_path, name):
    with opened(tmp_path) as store:
        save(store, B1, name, "a")
        save_tail(store, B1, name, "a", "t").result()
        hexes = {key("a").hex()[:2], key("a").hex() + ".safetensors", f"{B1}-1.safetensors"}
        own = {"f0", "blocks", "tails", "quarantine", "lock"}
        assert {
            p.name for p in tmp_path.rglob("*") if not p.name.startswith("manifest.sqlite")
        } == hexes | own
    with opened(tmp_path) as store:
        assert [a.key.agent_id for a in store.index().agents] == [name]
        assert store.delete_agent(AgentKey("ns", name)).result() is True


def test_a_name_that_isnt_unicode_is_refused_and_the_writer_lives(store):
    with pytest.raises(InvalidRequest):
        save(store, B1, "\ud83d", "a")
    with pytest.raises(AssertionError):
        save(store, "../" + "1" * 29, "alice", "a")
    save(store, B1, "alice", "a").result()


def test_a_block_needs_its_parent_and_a_branch_its_head(tmp_path):
    with opened(tmp_path) as store:
        for future in (
            store.save_block(
                BlockToSave(
                    branch_id=B1,
                    agent=AgentKey("ns", "alice"),
                    key=key("ab"),
                    parent=key("a"),
                    tokens=tokens("ab"),
                    tensors=tensors("ab"),
                )
            ),
            save_tail(store, B1, "alice", "a", "t"),
            store.save_branch(BranchHead(B1, AgentKey("ns", "alice"), key("a"), last_used=1.0)),
        ):
            with pytest.raises(NotFound, match=key("a").hex()):
                future.result()
        assert store.background_error is None
        assert files(tmp_path) == []
        assert store.stats()["agents"] == 0


def test_a_write_failure_latches_and_clears_when_the_disk_recovers(tmp_path):
    with opened(tmp_path) as store:
        save(store, B1, "alice", "a").result()
        blocks, away = tmp_path / "f0" / "blocks", tmp_path / "away"
        blocks.rename(away)
        blocks.write_bytes(b"")
        failed = save(store, B1, "alice", "ab")
        with pytest.raises(FileExistsError):
            failed.result()
        assert "FileExistsError" in store.background_error
        blocks.unlink()
        away.rename(blocks)
        save(store, B1, "alice", "ab").result()
        assert store.background_error is None
        assert holds(store, "ab")
        assert store.stats()["backlog_bytes"] == 0


def test_a_full_disk_costs_the_block_and_nothing_else(tmp_path):
    """RLIMIT_FSIZE stands in for it: a write stops half-way with an error."""
    code = f"""
import resource
from support import stores as t
from pathlib import Path
with t.opened(Path({str(tmp_path)!r})) as store:
    t.save(store, t.B1, "alice", "a").result()
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
    try:
        t.save(store, t.B1, "alice", "ab", nbytes=400_000).result()
    except OSError as e:
        assert str(e) in store.background_error, store.background_error
        assert len(t.files(Path({str(tmp_path)!r}))) == 1
        t.save(store, t.B1, "alice", "ac").result()
        assert store.background_error is None
        print("survived")
"""
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert child.stdout == "survived\n", child.stderr
    branches, blocks = index(tmp_path)
    assert branches[B1].head == key("ac")
    assert blocks == {key("a"), key("ac")}


def test_a_locked_database_fails_the_write_and_leaves_no_file(tmp_path):
    with opened(tmp_path) as store:
        save(store, B1, "alice", "a").result()
        with contextlib.closing(
            sqlite3.connect(tmp_path / "f0" / "manifest.sqlite", isolation_level=None)
        ) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(sqlite3.OperationalError):
                save(store, B1, "alice", "ab").result()
        assert "locked" in store.background_error
        assert len(files(tmp_path)) == 1
        save(store, B1, "alice", "ab").result()
        assert store.background_error is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_the_writer_latches_for_good_and_hangs_nobody(tmp_path):
    with opened(tmp_path) as store:
        wrong = {"k": HostTensor("U32", (5,), b"too short")}
        first = store.save_block(
            BlockToSave(
                branch_id=B1,
                agent=AgentKey("ns", "alice"),
                key=key("a"),
                parent=None,
                tokens=tokens("a"),
                tensors=wrong,
            )
        )
        assert "AssertionError" in str(first.exception(timeout=5))
        later = save(store, B1, "alice", "a")
        assert "AssertionError" in str(later.exception(timeout=5))
        assert "AssertionError" in store.background_error


def test_a_full_backlog_refuses_a_save_at_once_and_recovers(tmp_path):
    gate = threading.Event()
    with opened(tmp_path, max_backlog=10_000) as store:
        store.flush().add_done_callback(
            lambda _: gate.wait(5)
        )  # callbacks run on the writer's thread: it is busy
        time.sleep(0.05)
        first = save(store, B1, "alice", "a", nbytes=8_000)
        assert store.stats()["backlog_bytes"] == 8_000
        refused = store.save_block(
            BlockToSave(
                branch_id=B2,
                agent=AgentKey("ns", "bob"),
                key=key("b"),
                parent=None,
                tokens=tokens("b"),
                tensors=tensors("b"),
            )
        )
        assert isinstance(refused.exception(timeout=0), StoreWriteSkipped)
        touched = store.touch(AgentRecord(AgentKey("ns", "alice"), 1.0, 9e9))
        gate.set()
        first.result()
        touched.result()
        assert store.stats()["backlog_bytes"] == 0
        assert store.stats()["skipped"] == 1
        save(store, B3, "carol", "c", nbytes=80_000).result()  # alone, one of any size is taken
        assert store.background_error is None


def test_close_does_what_is_queued_and_refuses_what_comes_after(tmp_path):
    store = AgentStore.open(tmp_path, "f0", META)
    futures = [save(store, f"{i:032x}", f"agent{i}", f"{i:03}") for i in range(50)]
    futures[7].cancel()  # whoever waited has gone: no harm
    store.close()
    store.close()
    assert all(future.result() for future in futures)
    for future in (save(store, B1, "alice", "a"), store.read_block(key("000")), store.flush()):
        with pytest.raises(ShuttingDown):
            future.result()
    branches, blocks = index(tmp_path)
    assert len(branches) == 50
    assert len(blocks) == len(
        {name[:n] for i in range(50) for name in [f"{i:03}"] for n in (1, 2, 3)}
    )


def test_reads_never_see_a_torn_tail_while_it_is_replaced(store):
    save(store, B1, "alice", "a").result()
    save_tail(store, B1, "alice", "a", "0").result()
    last = None
    for i in range(100):
        last = save_tail(store, B1, "alice", "a", str(i))
        got, metadata = store.read_tail(B1).result()
        assert bytes(got["k"].data) == tensors(metadata["name"])["k"].data
    last.result()
    assert store.read_tail(B1).result()[1]["name"] == "99"


class ReplacedAfterLookup(Catalog):
    """The writer replaces the tail right after a reader has looked it up."""

    def tail(self, branch_id):
        found = super().tail(branch_id)
        self.update({}, {branch_id: self.newer})
        return found


def test_a_tail_replaced_between_lookup_and_read_is_no_corruption(tmp_path):
    layout = Layout(tmp_path)
    layout.tails.mkdir()
    buf = segment.encode(tensors("new"), {"name": "new"})
    segment.write_durable(layout.tail(B1, 2), buf)
    catalog = ReplacedAfterLookup({}, {B1: FileRef(9, b"removed", 1)})
    header = segment.parse_header(buf, len(buf))
    catalog.newer = FileRef(len(buf), segment.checksum(buf[: header.nbytes]), 2)
    reader = Reader(layout, catalog)
    assert reader.read_tail(B1).result()[1]["name"] == "new"
    reader.close()


def test_last_use_is_kept_and_never_goes_back(tmp_path):
    with opened(tmp_path) as store:
        save(store, B1, "alice", "a").result()
        store.touch(AgentRecord(AgentKey("ns", "alice"), 1.0, 9e9), B1)
        store.touch(AgentRecord(AgentKey("ns", "alice"), 1.0, 1.0), B1)
        store.touch(AgentRecord(AgentKey("ns", "nobody"), 1.0, 1.0))
        store.save_branch(BranchHead(B1, AgentKey("ns", "alice"), key("a"), last_used=8e9)).result()
    with opened(tmp_path) as store:
        assert [(a.key.agent_id, a.last_used) for a in store.index().agents] == [("alice", 9e9)]
        assert [b.last_used for b in store.index().branches] == [9e9]
