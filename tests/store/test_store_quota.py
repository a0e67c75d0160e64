"""What a store does that may not grow: real files, their real bytes, and a naive reference for what
leaves it.
"""

import contextlib
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentmem.agent_key import AgentKey
from agentmem.errors import AgentMemError, CorruptSegment
from agentmem.store.files.layout import Layout
from agentmem.store.manifest.manifest import Manifest
from agentmem.store.records import (
    AgentRecord,
    BlockRecord,
    BlockToSave,
    BranchHead,
    TailRecord,
    TailToSave,
)
from agentmem.store.upkeep.quota import Limits, StoreFull, disk_usage, rounded
from agentmem.store.upkeep.trim import trim
from support.stores import B1, B2, B3, key, opened, save, save_tail, tensors, tokens

BLOCK = 256 << 10  # bytes of tensors
FILE = BLOCK + 4096
MANIFEST = 3 << 20  # bytes within which it and its log vary


def branch(i: int) -> str:
    return f"{i:032x}"


def fill(store, i: int, chain: str, used: float):
    """An agent whose blocks are the prefixes of `chain`, with a tail, used at `used`."""
    name = f"agent{i}"
    save(store, branch(i), name, chain, nbytes=BLOCK)
    done = save_tail(store, branch(i), name, chain, f"t{i}")
    store.touch(AgentRecord(AgentKey("ns", name), 1.0, used), branch(i))
    return done


def pin(store, name: str, pinned: bool = True):
    return store.touch(AgentRecord(AgentKey("ns", name), 1.0, time.time(), pinned=pinned))


def big(store, name: str) -> bool:
    """Whether a block of BLOCK bytes can be read."""
    try:
        got = store.read_block(key(name)).result()
    except CorruptSegment:
        return False
    assert bytes(got["k"].data) == tensors(name, BLOCK)["k"].data
    return True


def has_tail(store, i: int) -> bool:
    try:
        return store.read_tail(branch(i)).result()[1]["name"] == f"t{i}"
    except CorruptSegment:
        return False


def chain_of(i: int) -> str:
    return chr(0x4E00 + i) * 2  # two blocks that no other agent has


def test_fifty_agents_in_a_store_for_ten_stay_under_the_quota_and_the_newest_and_pinned_survive(
    tmp_path,
):
    root = tmp_path / "f0"
    quota = 10 * (2 * FILE + 8192) + MANIFEST
    gone_blocks, gone_tails = [], []
    most = 0
    with opened(tmp_path, limits=Limits(quota=quota)) as store:
        store.on_trim = lambda gone: (
            gone_blocks.extend(gone.blocks),
            gone_tails.extend(gone.tails),
        )
        for i in range(50):
            for done in (
                fill(store, i, chain_of(i), time.time()),
                pin(store, f"agent{i}", i in (0, 3)),
            ):
                done.result()
                most = max(most, disk_usage(root))
        du = subprocess.run(["du", "-s", "-B1", root], capture_output=True, text=True)
        if du.returncode == 0:  # macOS' du has no -B
            assert int(du.stdout.split()[0]) == disk_usage(root)
        assert quota - 3 * FILE < most <= quota + FILE
        assert abs(store.stats()["disk_bytes"] - disk_usage(root)) <= MANIFEST
        whole = [
            i
            for i in range(50)
            if big(store, chain_of(i)) and big(store, chain_of(i)[0]) and has_tail(store, i)
        ]
        assert whole[:2] == [0, 3]
        assert len(whole) >= 9
        assert whole[2:] == list(range(50 - len(whole) + 2, 50))
        assert len(set(gone_blocks)) == len(gone_blocks)
        assert set(gone_blocks) == {
            key(n) for i in range(50) for n in (chain_of(i), chain_of(i)[0]) if not big(store, n)
        }
        assert sorted(gone_tails) == [branch(i) for i in range(50) if not has_tail(store, i)]
        for name in gone_blocks:
            with pytest.raises(CorruptSegment):
                store.read_block(name).result()
        assert store.background_error is None
        assert store.stats()["trimmed_bytes"] >= len(gone_blocks) * BLOCK > 0
    with opened(tmp_path, limits=Limits(quota=quota)) as store:
        held = {block.key for block in store.index().blocks}
        assert held == {key(n) for i in range(50) for n in (chain_of(i), chain_of(i)[0])} - set(
            gone_blocks
        )
        assert {"agent0", "agent3"} <= {
            agent.key.agent_id for agent in store.index().agents if agent.pinned
        }


def test_many_saves_at_once_stay_under_the_quota_too(tmp_path):
    quota = 20 * FILE + MANIFEST
    with opened(tmp_path, limits=Limits(quota=quota)) as store:
        futures = [fill(store, i, chain_of(i), float(i)) for i in range(40)]
        most = 0
        for future in futures:
            with contextlib.suppress(
                AgentMemError
            ):  # of more than a quota's worth in one batch, some can't be saved
                future.result()
            most = max(most, disk_usage(tmp_path / "f0"))
        assert most <= quota + FILE


def test_a_full_store_stays_under_the_quota_while_only_rows_change(tmp_path):
    """Each commit makes the manifest's log longer, up to about a megabyte."""
    root, quota = tmp_path / "f0", 16 * FILE
    most = 0
    with opened(tmp_path, limits=Limits(quota=quota)) as store:
        for i in range(12):
            fill(store, i, chain_of(i), time.time()).result()
            store.delete_agent(
                AgentKey("ns", "nobody")
            ).result()  # empties the log, so that files take all the room
        assert disk_usage(root) > quota - 2 * FILE
        for i in range(200):
            pin(store, "agent11", i % 2 == 0).result()
            most = max(most, disk_usage(root))
        assert most <= quota
        assert store.stats()["disk_bytes"] == disk_usage(root)


def test_a_shared_prefix_goes_last(tmp_path):
    with opened(tmp_path, limits=Limits(quota=8 * FILE + MANIFEST)) as store:
        for i in range(30):
            fill(store, i, "P" + chr(0x4E00 + i), float(i)).result()
            assert big(store, "P")
        assert not big(store, "P" + chr(0x4E00))
        assert big(store, "P" + chr(0x4E00 + 29))


def test_a_store_full_of_pinned_agents_refuses_latches_and_recovers_after_a_delete(tmp_path):
    quota = 6 * FILE + MANIFEST
    with opened(tmp_path, limits=Limits(quota=quota)) as store:
        for i in range(40):
            pin(store, f"agent{i}").result()
            if save(store, branch(i), f"agent{i}", chain_of(i), nbytes=BLOCK).exception():
                break
            saved = i
        done = save(store, B1, "late", "z", nbytes=BLOCK)
        with pytest.raises(StoreFull, match="pinned"):
            done.result()
        pin(store, "agent0").result()
        assert store.background_error is not None
        assert (
            "StoreFull" in store.background_error
        )  # and a row that could be written doesn't hide it
        assert disk_usage(tmp_path / "f0") <= quota + FILE
        assert all(big(store, chain_of(i)) for i in range(saved + 1))
        # what is stored already costs no room
        store.save_block(
            BlockToSave(
                branch_id=B2,
                agent=AgentKey("ns", "bob"),
                key=key(chain_of(0)[0]),
                parent=None,
                tokens=tokens(chain_of(0)[0]),
                tensors=tensors("other", BLOCK),
            )
        ).result()
        assert all(big(store, chain_of(i)) for i in range(saved + 1))
        store.delete_agent(AgentKey("ns", "agent1")).result()
        assert store.background_error is None
        save(store, B1, "late", "z", nbytes=BLOCK).result()
        assert big(store, "z")
        pin(store, "agent2", False).result()
        save(store, B3, "later", "y", nbytes=BLOCK).result()
        save(store, B3, "later", "yy", nbytes=BLOCK).result()
        save(store, B3, "later", "yyy", nbytes=BLOCK).result()
        assert not big(store, chain_of(2))


def test_a_quota_that_was_lowered_holds_when_the_store_is_opened(tmp_path):
    with opened(tmp_path) as store:
        for i in range(30):
            fill(store, i, chain_of(i), float(i)).result()
        pin(store, "agent0").result()
    quota = 10 * (2 * FILE + 8192) + MANIFEST
    with opened(tmp_path, limits=Limits(quota=quota)) as store:
        assert disk_usage(tmp_path / "f0") <= quota
        held = {block.key for block in store.index().blocks}
        assert held == {
            key(n) for i in range(30) for n in (chain_of(i)[0], chain_of(i)) if big(store, n)
        }
        assert 18 <= len(held) < 40
        assert big(store, chain_of(0)) and big(store, chain_of(29)) and not big(store, chain_of(1))
        assert abs(store.stats()["disk_bytes"] - disk_usage(tmp_path / "f0")) <= MANIFEST


def test_so_much_of_the_disk_stays_free(tmp_path):
    """Relative to what is free at the moment, in steps that dwarf what others write meanwhile."""
    with opened(tmp_path) as store:
        for i in range(4):
            fill(store, i, chain_of(i), float(i)).result()
    with opened(
        tmp_path, limits=Limits(min_free=shutil.disk_usage(tmp_path).free + (1 << 30))
    ) as store:
        done = save(store, B1, "late", "z", nbytes=BLOCK)
        with pytest.raises(StoreFull):
            done.result()
        assert not any(big(store, chain_of(i)[0]) for i in range(4))  # all that may go went for it
    with opened(tmp_path, limits=Limits(min_free=shutil.disk_usage(tmp_path).free // 2)) as store:
        for i in range(4):
            fill(store, i, chain_of(i), float(i)).result()
        assert all(big(store, chain_of(i)) for i in range(4))


def test_a_fork_whose_tail_has_two_names_does_not_hide_that_room_is_short(tmp_path):
    with opened(tmp_path, limits=Limits(quota=5 * FILE + MANIFEST)) as store:
        for i in range(4):
            store.save_tail(
                TailToSave(
                    branch_id=branch(i),
                    agent=AgentKey("ns", f"a{i}"),
                    head=None,
                    tokens=tokens("t"),
                    tensors=tensors(f"t{i}", BLOCK),
                    metadata={"name": f"t{i}"},
                )
            )
            for n in range(4):
                fork = f"{i}{n}".rjust(32, "f")
                store.fork_branch(
                    branch(i), BranchHead(fork, AgentKey("ns", f"f{i}{n}"), None, 1.0)
                )
        for i in range(40):
            save(store, branch(100 + i), "new", chr(0x4E00 + i), nbytes=BLOCK).result()
            assert disk_usage(tmp_path / "f0") <= 6 * FILE + MANIFEST
        assert store.background_error is None


# -- accounting

operations = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "save",
                "save",
                "tail",
                "fork",
                "delete",
                "branch",
                "bad block",
                "bad tail",
                "link",
                "reopen",
            ]
        ),
        st.integers(0, 5),
        st.text("abc", min_size=1, max_size=3),
        st.integers(1, 6),
    ),
    max_size=30,
)


def operate(store, root: Path, operation: str, i: int, chain: str, size: int, links: list) -> None:
    agent, nbytes = f"agent{i % 3}", size * 50_000
    if operation == "save":
        save(store, branch(i), agent, chain, nbytes=nbytes)
    elif operation == "tail":
        store.save_tail(
            TailToSave(
                branch_id=branch(i),
                agent=AgentKey("ns", agent),
                head=None,
                tokens=tokens("t"),
                tensors=tensors("t", nbytes),
            )
        )
    elif operation == "fork":
        store.fork_branch(
            branch(i), BranchHead(branch(i + size), AgentKey("ns", agent), None, float(size))
        )
    elif operation == "delete":
        store.delete_agent(AgentKey("ns", agent))
    elif operation == "branch":
        store.delete_branch(branch(i))
    elif operation == "bad block":
        store.quarantine_block(key(chain))
    elif operation == "bad tail":
        store.quarantine_tail(branch(i))
    elif operation == "link":
        store.flush().result()
        links.append(store.link_files([], [branch(i)]))
        if len(links) > 2 and not (old := links.pop(0)).exception():
            store.unlink(old.result())
    store.flush().result()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(operations)
def test_what_it_says_it_takes_is_what_it_takes(steps):
    """Files are counted to the byte, the manifest's log when a write ends."""
    with tempfile.TemporaryDirectory() as directory:
        path, links = Path(directory), []
        limits = Limits(quota=1_500_000)
        with contextlib.ExitStack() as stack:
            store = stack.enter_context(opened(path, limits=limits))
            for step in steps:
                if step[0] == "reopen":
                    stack.close()
                    links.clear()
                    store = stack.enter_context(opened(path, limits=limits))
                operate(store, path, *step, links)
            save(store, branch(10), "last", "z").exception()
            assert store.stats()["disk_bytes"] == disk_usage(path / "f0")


def test_a_block_that_goes_bad_again_and_again_is_counted_once(tmp_path):
    with opened(tmp_path) as store:
        for _ in range(3):
            save(store, B1, "alice", "a", nbytes=BLOCK)
            store.quarantine_block(key("a")).result()
        assert store.stats()["disk_bytes"] == disk_usage(tmp_path / "f0")
        assert store.stats()["quarantined"] == 3


def test_directories_that_grow_are_counted(tmp_path):
    """A tail's directory entry is some 60 bytes, and a directory never shrinks on some file
    systems.
    """
    with opened(tmp_path) as store:
        for i in range(200):
            store.save_tail(
                TailToSave(
                    branch_id=branch(i),
                    agent=AgentKey("ns", "alice"),
                    head=None,
                    tokens=tokens("t"),
                    tensors=tensors("t"),
                )
            )
        store.flush().result()
        assert store.stats()["disk_bytes"] == disk_usage(tmp_path / "f0")
        store.delete_agent(AgentKey("ns", "alice")).result()
        assert store.stats()["disk_bytes"] == disk_usage(tmp_path / "f0")


# -- what leaves first

trees = st.lists(
    st.tuples(
        st.integers(0, 9),  # the block that it is built on, if there are so many; else a root
        st.lists(
            st.tuples(st.integers(0, 3), st.booleans(), st.booleans()), max_size=2
        ),  # branches: used, tail, pinned
    ),
    min_size=1,
    max_size=10,
)


def plant(manifest: Manifest, tree) -> None:
    n = 0
    for i, (on, branches) in enumerate(tree):
        name = key(str(i))
        parent = key(str(on)) if on < i else None
        manifest.add_block(BlockRecord(name, parent, tokens("b"), 4096 * (i + 1), b"", 1.0), None)
        for used, tail, pinned in branches:
            agent = f"{n}{'pinned' * pinned}"
            manifest.agents.put(AgentRecord(AgentKey("ns", agent), 1.0, float(used), pinned=pinned))
            manifest.put_branch(BranchHead(branch(n), AgentKey("ns", agent), name, float(used)))
            if tail:
                manifest.set_tail(branch(n), TailRecord(tokens("t"), 5000, b""), n + 1, None)
            n += 1


def naive_order(blocks, branches, kept_blocks, kept_branches):
    """The order in which everything goes, each step from scratch. A block is used when a branch
    that ends in it is.

    blocks: key -> parent; branches: id -> [head, last used, has a tail, pinned].
    """
    blocks, branches = dict(blocks), {b: list(row) for b, row in branches.items()}
    order = []
    while True:
        safe = {b for b, row in branches.items() if row[3] or b in kept_branches}
        candidates = [(row[1], b"", b) for b, row in branches.items() if row[2] and b not in safe]
        for block in blocks:
            holders = [b for b, row in branches.items() if row[0] == block]
            if block in blocks.values() or block in kept_blocks or safe.intersection(holders):
                continue
            candidates.append(
                (max((branches[b][1] for b in holders), default=float("-inf")), block, "")
            )
        if not candidates:
            return order
        _, block, branch_id = min(candidates)
        order.append(block or branch_id)
        if branch_id:
            branches[branch_id][2] = False
            continue
        for row in branches.values():
            if row[0] == block:
                row[0] = blocks[block]
        del blocks[block]


@settings(max_examples=150, deadline=None)
@given(
    trees,
    st.sets(st.integers(0, 9), max_size=2),
    st.sets(st.integers(0, 9), max_size=2),
    st.integers(0, 100_000),
)
def test_what_leaves_is_what_a_fresh_look_at_every_step_would_choose(
    tree, kept_blocks, kept_branches, nbytes
):
    kept_blocks, kept_branches = (
        {key(str(i)) for i in kept_blocks},
        {branch(i) for i in kept_branches},
    )
    with tempfile.TemporaryDirectory() as directory:
        manifest = Manifest.open(Layout(Path(directory)).manifest)
        with contextlib.closing(manifest):
            with manifest.transaction():
                plant(manifest, tree)
            branches = {
                h.branch_id: [h.head, h.last_used, h.tail_bytes > 0, h.pinned]
                for h in manifest.holdings()
            }
            expected = naive_order(manifest.parents(), branches, kept_blocks, kept_branches)
            sizes = {k: rounded(ref.nbytes) for k, ref in manifest.block_files().items()}
            room, needed = 0, []
            for name in expected:
                if room >= nbytes:
                    break
                needed.append(name)
                room += sizes.get(name, 8192)
            with manifest.transaction():
                gone = trim(manifest, nbytes, kept_branches, kept_blocks)
            assert gone.blocks == [name for name in needed if isinstance(name, bytes)]
            assert gone.tails == [name for name in needed if isinstance(name, str)]
            assert gone.nbytes == room
            assert manifest.parents().keys() == sizes.keys() - set(gone.blocks)
