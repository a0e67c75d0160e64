"""Power loss at every point of an agent's life: what was acknowledged is there and equal, nothing
is half there.
"""

import fcntl
import hashlib
import os
import random
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentmem.agent_key import AgentKey
from agentmem.errors import CorruptSegment, StoreError
from agentmem.store.agent_store import AgentStore
from agentmem.store.files.crypto import Vault
from agentmem.store.files.layout import Layout
from agentmem.store.records import BlockToSave, BranchHead, TailToSave
from support.file_log import FileLog, Op, State
from support.store_child import tensors_of

B1, B2, B3 = "1" * 32, "2" * 32, "3" * 32
BLOCKS = ("a", "ab", "abc", "abe", "ad")  # each after its parent
TAILS = ("t1", "t2", "t3", "u1")
Where = tuple[str, str | None]  # of a branch: its last block, its tail


def key(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()[:16]


def tokens(name: str) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(name.encode()).digest(), np.uint32)


CLEAR: dict[str, Any] = {}
ENCRYPTED = {"unlock": lambda may_be_new: Vault(bytes(range(32)))}  # as AgentStore.open takes it
NAMES = {key(name): name for name in (*BLOCKS, *TAILS)}


@dataclass(frozen=True)
class Step:
    """A write that was asked for, and what it promises."""

    branch: str
    where: Where | None  # the branch afterwards
    gone: tuple[str, ...] = ()  # blocks and tails of which no byte is left


class Life:
    """Agents' turns, written down as they happen: when each step was asked for, and when it was
    acknowledged.
    """

    def __init__(self, store: AgentStore, log: FileLog):
        self.store, self._log = store, log
        self.steps: list[Step] = []

    def block(self, branch: str, agent: str, name: str) -> Future[Any]:
        parent = key(name[:-1]) if len(name) > 1 else None
        return self._do(
            Step(branch, (name, None)),
            lambda: self.store.save_block(
                BlockToSave(
                    branch_id=branch,
                    agent=AgentKey("ns", agent),
                    key=key(name),
                    parent=parent,
                    tokens=tokens(name),
                    tensors=tensors_of(key(name)),
                )
            ),
        )

    def tail(self, branch: str, agent: str, head: str, name: str) -> Future[Any]:
        tensors, metadata = tensors_of(key(name)), {"name": name}
        return self._do(
            Step(branch, (head, name)),
            lambda: self.store.save_tail(
                TailToSave(
                    branch_id=branch,
                    agent=AgentKey("ns", agent),
                    head=key(head),
                    tokens=tokens(name),
                    tensors=tensors,
                    metadata=metadata,
                )
            ),
        )

    def fork(self, source: str, branch: str, agent: str, head: str, tail: str) -> Future[Any]:
        return self._do(
            Step(branch, (head, tail)),
            lambda: self.store.fork_branch(
                source, BranchHead(branch, AgentKey("ns", agent), key(head), 1.0)
            ),
        )

    def move(self, branch: str, agent: str, head: str) -> Future[Any]:
        return self._do(
            Step(branch, (head, None)),
            lambda: self.store.save_branch(
                BranchHead(branch, AgentKey("ns", agent), key(head), last_used=1.0)
            ),
        )

    def delete_branch(self, branch: str, gone: tuple[str, ...]) -> None:
        self._do(Step(branch, None, gone), lambda: self.store.delete_branch(branch)).result()

    def delete_agent(self, branch: str, agent: str, gone: tuple[str, ...]) -> None:
        self._do(
            Step(branch, None, gone), lambda: self.store.delete_agent(AgentKey("ns", agent))
        ).result()

    def _do(self, step: Step, ask: Callable[[], Future[Any]]) -> Future[Any]:
        number = len(self.steps)
        self.steps.append(step)
        self._log.note("asked", number)
        future = ask()
        future.add_done_callback(lambda _: self._log.note("done", number))
        return future

    def allowed(self, ops: list[Op]) -> dict[str, list[Where | None]]:
        """Return where each branch may be after these operations.

        That is not before what was acknowledged, and not beyond what was asked for.
        """
        asked = {op.label for op in ops if op.kind == "asked"}
        done = {op.label for op in ops if op.kind == "done"}
        allowed: dict[str, list[Where | None]] = {}
        for branch in (B1, B2, B3):
            allowed[branch] = [None]
            for number in sorted(asked):
                if self.steps[number].branch == branch:
                    allowed[branch] = [
                        *(allowed[branch] if number not in done else ()),
                        self.steps[number].where,
                    ]
        return allowed

    def gone(self, ops: list[Op]) -> set[str]:
        return {name for op in ops if op.kind == "done" for name in self.steps[op.label].gone}


def opened(root: Path, options: dict[str, Any]) -> AgentStore:
    return AgentStore.open(root, "f0", {"calibration": "c"}, **options)


def live(root: Path, log: FileLog, options: dict[str, Any]) -> Life:
    """Let two agents take turns, share a block, fork, move back, and go on after a restart.

    One of them goes in the end.
    """
    store = opened(root, options)
    life = Life(store, log)
    life.block(B1, "alice", "a")
    life.block(B1, "alice", "ab")
    life.tail(B1, "alice", "ab", "t1").result()
    life.block(B2, "bob", "a")  # shared
    life.block(B2, "bob", "ad")
    life.tail(B2, "bob", "ad", "u1").result()
    life.block(B1, "alice", "abc")
    life.tail(B1, "alice", "abc", "t2").result()
    life.fork(B1, B3, "alice", "abc", "t2").result()
    life.move(B1, "alice", "ab").result()
    store.close()
    store = life.store = opened(root, options)
    life.block(B1, "alice", "abe")
    life.tail(B1, "alice", "abe", "t3").result()
    life.delete_branch(B3, gone=("abc", "t1", "t2"))
    life.delete_agent(B2, "bob", gone=("ad", "u1"))
    store.close()
    return life


def recorded(
    tmp_path: Path, options: dict[str, Any], believe: Callable[[Op], bool] = lambda op: True
) -> tuple[FileLog, Life]:
    root = tmp_path / "disk"
    root.mkdir()
    log = FileLog(root, believe=believe)
    with pytest.MonkeyPatch.context() as patch:
        log.install(patch)
        return log, live(root, log, options)


@dataclass(frozen=True)
class Case:
    """A state, and what must be true of it."""

    cut: int
    state: State
    allowed: dict[str, list[Where | None]]
    gone: set[str]
    options: dict[str, Any]

    def key(self) -> tuple[object, ...]:
        return self.state.key(), repr(self.allowed), frozenset(self.gone)


def cases(log: FileLog, life: Life, options: dict[str, Any]) -> Iterator[Case]:
    """Every state after every operation, each once."""
    rng, seen = random.Random(5), set()
    for cut in range(len(log.ops) + 1):
        ops = log.ops[:cut]
        for state in log.states(cut, rng):
            case = Case(cut, state, life.allowed(ops), life.gone(ops), options)
            if case.key() not in seen:
                seen.add(case.key())
                yield case


def problems(case: Case, root: Path) -> list[str]:
    """What is wrong when a store is opened after the power loss."""
    root.mkdir()
    case.state.write(root)
    found = list(_left_over(case))
    try:
        store = opened(root, case.options)
    except StoreError as e:
        return [*found, f"does not open: {e}"]
    found += _wrong(store, case)
    found += _garbage(store, Layout(root / "f0"))
    store.close()
    shutil.rmtree(root)
    return found


def _left_over(case: Case) -> Iterator[str]:
    everything = b"".join(
        data for part in (case.state.files, case.state.manifest) for data in part.values() if data
    )
    for name in NAMES.values() if case.options else case.gone:
        if bytes(tensors_of(key(name))["k.codes"].data) in everything:
            yield f"bytes of {name} are on disk, which was deleted or should be encrypted"


def _wrong(store: AgentStore, case: Case) -> Iterator[str]:
    index = store.index()
    keys = {block.key for block in index.blocks}
    for block in index.blocks:
        name = NAMES[block.key]
        yield from _differs(name, lambda k=block.key: store.read_block(k).result())
        if not np.array_equal(block.tokens, tokens(name)) or (
            block.parent is not None and block.parent not in keys
        ):
            yield f"{name}: wrong tokens, or no parent"
    found: dict[str, Where | None] = dict.fromkeys(case.allowed)
    for branch in index.branches:
        tail = None
        if branch.tail is not None:
            tail = {tokens(t).tobytes(): t for t in TAILS}[branch.tail.tokens.tobytes()]
            yield from _differs(tail, lambda b=branch.id: store.read_tail(b).result()[0])
        assert branch.head is not None
        found[branch.id] = NAMES[branch.head], tail
    for branch_id, where in found.items():
        if where not in case.allowed[branch_id]:
            yield f"branch {branch_id[0]} is at {where}, may be at {case.allowed[branch_id]}"


def _differs(name: str, read: Callable[[], dict[str, Any]]) -> Iterator[str]:
    try:
        got = {n: bytes(tensor.data) for n, tensor in read().items()}
    except CorruptSegment as e:
        yield f"{name} is listed, but {e}"
        return
    if got != {n: bytes(tensor.data) for n, tensor in tensors_of(key(name)).items()}:
        yield f"{name} holds other bytes"


def _garbage(store: AgentStore, layout: Layout) -> Iterator[str]:
    index = store.index()
    named = len(index.blocks) + sum(branch.tail is not None for branch in index.branches)
    files = [
        path for path in layout.root.rglob("*") if path.is_file() and path.parent != layout.root
    ]
    if len(files) != named:
        yield f"{len(files)} files, {named} are named"


@pytest.fixture
def quick_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is checked here is not lost again."""
    real, full = fcntl.fcntl, getattr(fcntl, "F_FULLFSYNC", None)
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(
        fcntl, "fcntl", lambda fd, command, *args: command != full and real(fd, command, *args)
    )


@pytest.mark.parametrize("options", [CLEAR, ENCRYPTED], ids=["clear", "encrypted"])
@pytest.mark.usefixtures("quick_fsync")
def test_after_a_power_loss_at_any_operation_what_was_acknowledged_is_there_and_nothing_else(
    tmp_path, options
):
    log, life = recorded(tmp_path, options)
    found = list(cases(log, life, options))
    wrong = {
        case.cut: p for i, case in enumerate(found) if (p := problems(case, tmp_path / str(i)))
    }
    assert wrong == {}
    kinds = {op.kind for op in log.ops}
    assert kinds >= {
        "open",
        "write",
        "sync",
        "sync_dir",
        "rename",
        "link",
        "unlink",
        "mkdir",
        "commit",
    }
    assert len(log.ops) > 100 and len(found) > 100


BROKEN = [
    ("sync", "f0/blocks/*"),
    ("sync", "f0/tails/*"),
    ("sync_dir", "f0"),  # blocks/ and tails/ are in it
    ("sync_dir", "f0/blocks"),  # the directories in which blocks lie
    ("sync_dir", "f0/blocks/*"),
    ("sync_dir", "f0/tails"),
    ("unlink", "f0/blocks/*"),
    ("unlink", "f0/tails/*"),
    ("committed", ""),
]


@pytest.mark.parametrize(("kind", "path"), BROKEN)
@pytest.mark.usefixtures("quick_fsync")
def test_an_operation_without_effect_would_be_noticed(tmp_path, kind, path):
    log, life = recorded(
        tmp_path, CLEAR, believe=lambda op: not (op.kind == kind and fnmatch(op.path, path))
    )
    wrong = (
        p
        for i, case in enumerate(cases(log, life, CLEAR))
        if (p := problems(case, tmp_path / str(i)))
    )
    assert next(wrong, None)
