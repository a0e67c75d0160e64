"""Forks, moves, second names of files, and who holds the lock: none of it copies a byte or loses
one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agentmem.agent_key import AgentKey
from agentmem.errors import CorruptSegment, InvalidRequest, NotFound
from agentmem.store.files.layout import Layout
from agentmem.store.records import AgentRecord, BranchHead
from agentmem.store.upkeep.quota import disk_usage
from support.stores import (
    B1,
    B2,
    B3,
    META,
    files,
    holds,
    index,
    key,
    opened,
    save,
    save_tail,
    tail_name,
    tensors,
)


def with_tail(store, branch: str = B1, agent: str = "alice", chain: str = "ab", name: str = "t"):
    save(store, branch, agent, chain)
    return save_tail(store, branch, agent, chain, name)


@pytest.mark.parametrize("deleted, other", [(B1, B2), (B2, B1)])
def test_a_fork_writes_no_bytes_and_either_side_outlives_the_other(tmp_path, deleted, other):
    with opened(tmp_path) as store:
        tail = with_tail(store).result()
        before, on_disk = store.stats(), disk_usage(tmp_path / "f0" / "tails")
        assert (
            store.fork_branch(B1, BranchHead(B2, AgentKey("ns", "bob"), key("ab"), 1.0)).result()
            == tail.nbytes
        )
        after = store.stats()
        assert (after["bytes_written"], after["writes"]) == (
            before["bytes_written"],
            before["writes"],
        )
        assert disk_usage(tmp_path / "f0" / "tails") == on_disk
        assert (tail_name(store, B1), tail_name(store, B2)) == ("t", "t")
        store.delete_branch(deleted).result()
        assert (tail_name(store, deleted), tail_name(store, other)) == (None, "t")
        assert holds(store, "ab")
    with opened(tmp_path) as store:
        assert [branch.id for branch in store.index().branches] == [other]
        assert tail_name(store, other) == "t"
        assert len(files(tmp_path)) == 3


def test_a_fork_goes_its_own_way(tmp_path):
    with opened(tmp_path) as store:
        with_tail(store)
        store.fork_branch(B1, BranchHead(B2, AgentKey("ns", "bob"), key("ab"), 1.0))
        save_tail(store, B1, "alice", "ab", "source").result()
        assert (tail_name(store, B1), tail_name(store, B2)) == ("source", "t")
        save(store, B2, "bob", "abx").result()
        assert (tail_name(store, B1), tail_name(store, B2)) == ("source", None)
    branches, blocks = index(tmp_path)
    assert (branches[B1].head, branches[B2].head) == (key("ab"), key("abx"))
    assert blocks == {key("a"), key("ab"), key("abx")}


def test_a_fork_of_a_branch_whose_head_moved_on_has_no_tail(tmp_path):
    with opened(tmp_path) as store:
        with_tail(store)
        with_tail(store, chain="abc", name="u").result()
        assert (
            store.fork_branch(B1, BranchHead(B2, AgentKey("ns", "bob"), key("ab"), 1.0)).result()
            == 0
        )
        assert (tail_name(store, B1), tail_name(store, B2)) == ("u", None)
    branches, _ = index(tmp_path)
    assert (branches[B2].head, branches[B2].tail) == (key("ab"), None)


def test_a_fork_that_cannot_be_leaves_nothing(tmp_path):
    with opened(tmp_path) as store:
        with_tail(store).result()
        before = files(tmp_path)
        failed = store.fork_branch(B1, BranchHead(B2, AgentKey("ns", "bob"), key("nothing"), 1.0))
        with pytest.raises(NotFound):
            failed.result()
        assert files(tmp_path) == before
        assert store.stats()["agents"] == 1


def test_a_fork_whose_tails_file_was_lost_has_none_and_is_no_error_of_the_disk(tmp_path):
    with opened(tmp_path) as store:
        with_tail(store).result()
        next(Layout(tmp_path / "f0").tails.iterdir()).unlink()
        assert (
            store.fork_branch(B1, BranchHead(B2, AgentKey("ns", "bob"), key("ab"), 1.0)).result()
            == 0
        )
        lost = store.link_files([], [B1])
        with pytest.raises(NotFound):
            lost.result()
        assert store.background_error is None


def test_a_quarantined_tail_leaves_the_forks_name_and_the_count_of_bytes_alone(tmp_path):
    with opened(tmp_path) as store:
        with_tail(store)
        store.fork_branch(B1, BranchHead(B2, AgentKey("ns", "bob"), key("ab"), 1.0)).result()
        store.quarantine_tail(B1).result()
        store.delete_agent(AgentKey("ns", "alice")).result()  # empties the quarantine
        assert tail_name(store, B2) == "t"
        assert store.stats()["disk_bytes"] == disk_usage(tmp_path / "f0")


def test_linked_files_are_readable_after_the_agent_is_deleted_and_gone_when_unlinked(tmp_path):
    exports = Layout(tmp_path / "f0").exports
    with opened(tmp_path) as store:
        with_tail(store).result()
        linked = store.link_files([key("a"), key("ab")], [B1]).result()
        assert store.delete_agent(AgentKey("ns", "alice")).result()
        assert files(tmp_path) == []
        for name, wanted in ((key("a"), "a"), (key("ab"), "ab"), (B1, "t")):
            assert bytes(store.read_linked(linked, name)[0]["k"].data) == tensors(wanted)["k"].data
        assert store.stats()["disk_bytes"] == disk_usage(tmp_path / "f0")
        store.unlink(linked).result()
        assert list(exports.iterdir()) == []
        assert store.stats()["disk_bytes"] == disk_usage(tmp_path / "f0")
        with pytest.raises(CorruptSegment):
            store.read_linked(linked, B1)


def test_a_link_of_something_missing_leaves_no_names_behind(tmp_path):
    with opened(tmp_path) as store:
        with_tail(store).result()
        for wanted in ([[key("a"), key("nothing")], [B1]], [[key("a")], [B1, B2]]):
            failed = store.link_files(*wanted)
            with pytest.raises(NotFound):
                failed.result()
        exports = Layout(tmp_path / "f0").exports
        assert not exports.exists() or list(exports.iterdir()) == []


def test_reopening_removes_what_an_export_left(tmp_path):
    with opened(tmp_path) as store:
        with_tail(store).result()
        store.link_files([key("a")], [B1]).result()
        assert len(list((tmp_path / "f0" / "exports").rglob("*.safetensors"))) == 2
    with opened(tmp_path) as store:
        assert not (tmp_path / "f0" / "exports").exists()
        assert tail_name(store, B1) == "t"


def agent_names(root: Path) -> dict[AgentKey, AgentRecord]:
    with opened(root) as store:
        return {agent.key: agent for agent in store.index().agents}


def test_a_moved_agent_keeps_its_pin_and_its_counts(tmp_path):
    with opened(tmp_path) as store:
        with_tail(store)
        store.touch(
            AgentRecord(
                AgentKey("ns", "alice"), 1.0, 9e9, pinned=True, ttl=60.0, requests=7, hit_tokens=8
            )
        )
        store.move_agent(AgentKey("ns", "alice"), AgentKey("other", "bob")).result()
        assert tail_name(store, B1) == "t"
    ((place, agent),) = agent_names(tmp_path).items()
    assert place == ("other", "bob")
    assert (agent.pinned, agent.ttl, agent.requests, agent.hit_tokens, agent.last_used) == (
        True,
        60.0,
        7,
        8,
        9e9,
    )


def test_an_agent_moved_into_another_one_leaves_that_ones_pin(tmp_path):
    with opened(tmp_path) as store:
        with_tail(store)
        with_tail(store, B2, "bob", "x", "u")
        store.touch(AgentRecord(AgentKey("ns", "bob"), 1.0, 5.0, pinned=True))
        store.touch(AgentRecord(AgentKey("ns", "alice"), 1.0, 9e9))
        store.move_agent(AgentKey("ns", "alice"), AgentKey("ns", "bob")).result()
        assert (tail_name(store, B1), tail_name(store, B2)) == ("t", "u")
        assert store.stats()["agents"] == 1
    ((place, agent),) = agent_names(tmp_path).items()
    assert (place, agent.pinned, agent.last_used) == (("ns", "bob"), True, 9e9)
    assert {b.agent.agent_id for b in index(tmp_path)[0].values()} == {"bob"}


def test_an_agent_moved_onto_itself_is_left_as_it_is(tmp_path):
    with opened(tmp_path) as store:
        with_tail(store)
        store.move_agent(AgentKey("ns", "alice"), AgentKey("ns", "alice")).result()
        assert tail_name(store, B1) == "t"
    assert index(tmp_path)[0].keys() == {B1}


def test_no_name_that_isnt_unicode_reaches_the_writer(tmp_path):
    bad = "\ud83d"
    with opened(tmp_path) as store:
        for ask in (
            lambda: store.touch(AgentRecord(AgentKey("ns", bad), 1.0, 1.0)),
            lambda: store.delete_agent(AgentKey("ns", bad)),
            lambda: store.move_agent(AgentKey("ns", "alice"), AgentKey("ns", bad)),
            lambda: store.fork_branch(B1, BranchHead(B2, AgentKey("ns", bad), None, 1.0)),
        ):
            with pytest.raises(InvalidRequest):
                ask()
        save(store, B3, "alice", "a").result()


def test_a_second_process_is_told_who_has_the_store_and_where(tmp_path):
    code = f"""
from agentmem.store.agent_store import AgentStore
from agentmem.store.upkeep.locks import InUse
try:
    AgentStore.open({str(tmp_path)!r}, "f0", {META!r})
except InUse as e:
    print(e.holder.pid, e.holder.url)
    print(e)
"""

    def second() -> list[str]:
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True
        ).stdout.splitlines()

    with opened(tmp_path) as store:
        assert second()[0] == f"{os.getpid()} None"
        store.announce("http://127.0.0.1:8000/a-longer-one")
        store.announce("http://127.0.0.1:8000")
        holder, message = second()
        assert holder == f"{os.getpid()} http://127.0.0.1:8000"
        assert f"in use by process {os.getpid()}" in message
    with opened(tmp_path) as store:
        assert second()[0] == f"{os.getpid()} None"
