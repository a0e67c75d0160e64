"""Turns as a tree, and where they are kept: RAM, the manifest, or nowhere."""

import asyncio
import sqlite3
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from agentmem.agent_key import AgentKey
from agentmem.errors import StoreError
from agentmem.store.agent_store import AgentStore
from agentmem.store.files.crypto import Vault
from agentmem.transcripts import registry, turns
from agentmem.transcripts.registry import TranscriptRegistry
from agentmem.transcripts.turns import TurnTree, new_turn
from support.stores import make_older

KEY = AgentKey("ns", "a")


def said(role: str, text: str, **more) -> dict:
    return {"role": role, "content": text, **more}


def chat(*texts: str) -> list[dict]:
    return [said("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]


@contextmanager
def opened(root: Path, **options):
    store = AgentStore.open(root, "f1", {"calibration": "c"}, **options)
    try:
        yield store
    finally:
        store.close()


def unlock(may_create: bool) -> Vault:
    return Vault(bytes(32))


async def add(kept: TranscriptRegistry, agent: str, *texts: str, parent=None, **more):
    tree = await kept.tree(AgentKey("ns", agent))
    turn = new_turn("chat", parent, chat(*texts))
    assert kept.add(tree, [turn], **more)
    return turn


# the tree


def test_the_longest_prefix_is_found_however_messages_are_written():
    tree = TurnTree(KEY)
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "f", "arguments": '{"b": 1, "a": 2}'},
    }
    one = new_turn(
        "chat",
        None,
        [said("system", "s"), said("user", "hi"), said("assistant", None, tool_calls=[call])],
    )
    two = new_turn(
        "chat",
        one,
        [said("tool", "7", tool_call_id="c1"), said("assistant", " yes ", reasoning_content="?")],
    )
    other = new_turn("chat", None, [said("user", "title")])
    for turn in (one, two, other):
        tree.add(turn)
    same = {**call, "function": {"name": "f", "arguments": {"a": 2, "b": 1}}}
    written = [
        said("developer", [{"type": "text", "text": "s"}]),
        said("user", "hi"),
        said("assistant", "", tool_calls=[same]),
        said("tool", "7", tool_call_id="c1"),
        said("assistant", "yes"),
        said("user", "more"),
    ]
    assert tree.longest_prefix(written) == (two, 5)
    assert tree.longest_prefix(written[:4]) == (one, 3)
    assert tree.longest_prefix([said("user", "hi")]) == (None, 0)
    changed = {**call, "function": {"name": "f", "arguments": "{}"}}
    assert tree.longest_prefix([*written[:2], said("assistant", None, tool_calls=[changed])]) == (
        None,
        0,
    )


def test_what_is_removed_takes_hidden_ancestors_along_and_leaves_what_others_build_on():
    tree = TurnTree(KEY)
    one = new_turn("chat", None, chat("a"))
    two, three = (new_turn("chat", one, chat(text)) for text in "bc")
    for turn in (one, two, three):
        tree.add(turn)
    assert tree.remove(one.id) == []
    tree.hide(one.id)
    assert tree.remove(two.id) == [two.id]
    assert tree.messages(three) == chat("a") + chat("c")
    assert tree.remove(three.id) == [three.id, one.id]
    assert tree.newest is None and tree.nbytes == 0 and not tree.turns


def test_off_the_newest_path_the_oldest_turns_go_and_never_what_others_follow(monkeypatch):
    monkeypatch.setattr(turns, "MAX_OFF_PATH", 3)
    tree, chain = TurnTree(KEY), [new_turn("chat", None, chat("0"))]
    tree.add(chain[0])
    for i in range(1, 6):
        chain.append(new_turn("chat", chain[-1], chat(str(i))))
        tree.add(chain[-1])
        assert tree.surplus() == []
    roots = [new_turn("chat", None, chat(f"r{i}")) for i in range(3)]
    for root in roots:
        tree.add(root)
        tree.surplus()
    assert tree.path(tree.newest) == roots[-1:]
    assert list(tree.turns) == [turn.id for turn in (chain[0], *roots)]


def test_off_the_newest_path_there_are_no_more_bytes_than_may_be_however_long_that_path_is():
    tree, last = TurnTree(KEY), None
    for i in range(20):
        last = new_turn("chat", last, chat("x" * 1000))
        tree.add(last)
        tree.add(new_turn("chat", None, chat(f"{i}" * 1000)))
        tree.add(last := new_turn("chat", last, chat("y" * 1000)))
        tree.surplus(10_000)
    others = [turn for turn in tree.turns.values() if turn not in tree.path(last)]
    assert len(tree.path(last)) == 40 and 1 <= len(others) <= 5
    assert others[-1].items[0]["content"].startswith("19")


# where they are kept


def test_turns_are_there_at_once_and_after_the_store_was_opened_again(tmp_path):
    async def first(store):
        kept = TranscriptRegistry(store.turns)
        one = await add(kept, "a", "hi", "there")
        two = await add(kept, "a", "more", "words", parent=one)
        assert (await kept.find("ns", two.id))[1] == two
        return two

    async def second(store):
        kept = TranscriptRegistry(store.turns)
        assert await kept.find("other", two.id) is None
        tree, turn = await kept.find("ns", two.id)
        assert (tree.agent, turn) == (KEY, two)
        assert tree.messages(turn) == chat("hi", "there", "more", "words")

    with opened(tmp_path) as store:
        two = asyncio.run(first(store))
    with opened(tmp_path) as store:
        asyncio.run(second(store))


def test_a_deleted_agent_takes_its_turns_along_and_what_it_was_still_being_told(tmp_path):
    async def run(store):
        kept = TranscriptRegistry(store.turns)
        await add(kept, "a", "secret")
        begun = kept.open(KEY)
        kept.forget(KEY, lambda: store.delete_agent(KEY))
        assert not kept.add(begun, [new_turn("chat", None, chat("late"))])
        assert not (await kept.tree(KEY)).turns
        await add(kept, "a", "new life")
        store.flush().result(10)
        assert [t.content for t in store.turns.read(KEY).result(10)] == [
            b'{"items":[{"role":"user","content":"new life"}],"kind":"chat"}'
        ]

    with opened(tmp_path) as store:
        asyncio.run(run(store))
        assert b"secret" not in b"".join(p.read_bytes() for p in tmp_path.rglob("manifest*"))


def test_idle_agents_turns_leave_ram_and_come_back_those_that_are_nowhere_else_stay(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(registry, "MAX_TREES", 2)

    async def run(store):
        kept = TranscriptRegistry(store.turns)
        for i in range(6):
            await add(kept, f"a{i}", f"text {i}", ephemeral=i == 0)
        assert len(kept._trees) == 4  # the ephemeral one, two idle, the last
        for i in range(6):
            assert (await kept.tree(AgentKey("ns", f"a{i}"))).newest.items == chat(f"text {i}")
        store.flush().result(10)
        assert store.turns.read(AgentKey("ns", "a0")).result(10) == []

    with opened(tmp_path) as store:
        asyncio.run(run(store))


def test_over_their_quota_the_turns_of_the_least_recently_used_agents_go(tmp_path):
    async def run(store):
        kept = TranscriptRegistry(store.turns, max_disk=5000)
        for i in range(8):
            await add(kept, f"a{i}", "x" * 1000)
            store.flush().result(10)
            await asyncio.sleep(0.02)
        held = [i for i in range(8) if store.turns.read(AgentKey("ns", f"a{i}")).result(10)]
        assert held == list(range(8 - len(held), 8)) and 3 <= len(held) <= 5
        assert [i for i in range(8) if (await kept.tree(AgentKey("ns", f"a{i}"))).turns] == held

    with opened(tmp_path) as store:
        asyncio.run(run(store))


def test_turns_outlive_the_blocks_of_their_agent_and_another_calibration(tmp_path):
    async def write(store):
        await add(TranscriptRegistry(store.turns), "a", "kept")

    with opened(tmp_path) as store:
        asyncio.run(write(store))
    other = AgentStore.open(tmp_path, "f1", {"calibration": "another"})
    assert len(other.turns.read(KEY).result(10)) == 1
    assert [agent.key.agent_id for agent in other.index().agents] == ["a"]
    other.close()


def test_a_turn_whose_parent_or_row_is_damaged_is_not_half_told(tmp_path):
    async def write(store):
        kept = TranscriptRegistry(store.turns)
        one = await add(kept, "a", "one")
        await add(kept, "a", "two", parent=one)
        return one.id

    with opened(tmp_path) as store:
        damaged = asyncio.run(write(store))
    with closing(sqlite3.connect(tmp_path / "f1" / "manifest.sqlite", isolation_level=None)) as db:
        (trigger,) = db.execute(
            "SELECT sql FROM sqlite_schema WHERE name = 'turns_updated'"
        ).fetchone()
        db.execute("DROP TRIGGER turns_updated")
        db.execute(
            "UPDATE turns SET content = CAST(replace(content, 'one', 'uno') AS BLOB) WHERE id = ?",
            (damaged,),
        )
        db.execute(trigger)

    async def read(store):
        tree = await TranscriptRegistry(store.turns).tree(KEY)
        assert tree.newest is None

    with opened(tmp_path) as store:
        assert store.stats()["damaged_rows"] == 1
        asyncio.run(read(store))


def test_encrypted_turns_are_read_with_their_key_and_the_store_is_opened_in_no_other_way(tmp_path):
    async def write(store):
        await add(TranscriptRegistry(store.turns), "a", "a secret text")

    with opened(tmp_path, unlock=unlock) as store:
        asyncio.run(write(store))
    assert b"a secret text" not in b"".join(p.read_bytes() for p in tmp_path.rglob("manifest*"))
    with pytest.raises(StoreError, match="encrypted"):
        AgentStore.open(tmp_path, "f1", {"calibration": "c"})
    with opened(tmp_path, unlock=unlock) as store:
        assert b"a secret text" in store.turns.read(KEY).result(10)[0].content
        store.move_agent(KEY, AgentKey("ns", "b")).result(10)
        assert store.turns.read(KEY).result(10) == []
        assert b"a secret text" in store.turns.read(AgentKey("ns", "b")).result(10)[0].content


def test_agents_that_are_merged_keep_the_turns_of_both_under_one_key(tmp_path):
    async def write(store):
        kept = TranscriptRegistry(store.turns)
        await add(kept, "a", "of a")
        await add(kept, "b", "of b")

    with opened(tmp_path, unlock=unlock) as store:
        asyncio.run(write(store))
        store.move_agent(KEY, AgentKey("ns", "b")).result(10)
        found = [t.content for t in store.turns.read(AgentKey("ns", "b")).result(10)]
    assert len(found) == 2 and b"of a" in found[0] and b"of b" in found[1]


def test_a_store_of_the_format_before_starts_without_turns_and_takes_new_ones(tmp_path):
    async def write(store):
        await add(TranscriptRegistry(store.turns), "a", "said")

    with opened(tmp_path) as store:
        asyncio.run(write(store))
    make_older(tmp_path / "f1", 4)
    with opened(tmp_path) as store:
        assert store.turns.nbytes == 0
        assert store.turns.read(KEY).result(10) == []
        asyncio.run(write(store))
        assert len(store.turns.read(KEY).result(10)) == 1


def test_a_cut_is_still_one_after_the_store_was_opened_again(tmp_path):
    async def run() -> None:
        with opened(tmp_path) as store:
            kept = TranscriptRegistry(store.turns)
            one = await add(kept, "a", "one")
            await add(kept, "a", "title")
            two = await add(kept, "a", "two", parent=one)
            edit = await add(kept, "a", "edit", parent=one)
            three = await add(kept, "a", "three", parent=two)
            tree = await kept.tree(KEY)
            await kept.cut(tree, [two, three])
            assert tree.messages(tree.newest) == chat("one") and tree.messages(edit) == chat(
                "one"
            ) + chat("edit")
        with opened(tmp_path) as store:
            again = await TranscriptRegistry(store.turns).tree(KEY)
            assert again.turns == tree.turns
            assert again.messages(again.newest) == chat("one")

    asyncio.run(run())
