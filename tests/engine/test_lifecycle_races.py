"""What is done to agents while something else is on its way: deletions, reads, writes, other
requests.
"""

import asyncio
import io
import json
import math
import tarfile
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager

import pytest
import xxhash

from agentmem.agent_key import AgentKey
from agentmem.engine.api import GenerateRequest, SamplingParams
from agentmem.errors import AgentMemError, Conflict, InvalidRequest, NotFound, StoreFailed
from agentmem.server.api.agents import TTLBody
from agentmem.store.upkeep.fsck import shrink, stores
from support.engines import hold_back, settle
from support.lifecycle import MORE, PROMPT, drain, exported, imported, rested, store_files, talk
from support.tiny import BLOCK, random_tokens, tiny_engine


@contextmanager
def slow_writer(engine):
    """The store's writer does nothing until this ends."""
    writer, gate = engine.core.store._writer, threading.Event()
    process = writer._process

    def wrapped(jobs):
        gate.wait(20)
        process(jobs)

    writer._process = wrapped
    try:
        yield gate
    finally:
        gate.set()
        writer._process = process


def start(engine, coroutine) -> Future:
    return asyncio.run_coroutine_threadsafe(coroutine, engine.loop)


def meanwhile(engine) -> None:
    """Let the engine take what was posted."""
    engine.call(asyncio.sleep(0.1))
    engine.on_engine(lambda: None)


def test_a_fork_that_is_deleted_before_it_is_on_disk_harms_nobody(tmp_path):
    with tiny_engine(tmp_path) as engine:
        talk(engine, "alice")
        settle(engine)
        with slow_writer(engine):
            fork = start(
                engine, engine.engine.forks.fork(AgentKey("default", "alice"), "bob", None)
            )
            meanwhile(engine)
            delete = start(engine, engine.engine.agents.delete(AgentKey("default", "bob")))
            meanwhile(engine)
        assert delete.result(10)
        with pytest.raises(NotFound):
            fork.result(10)
        assert engine.engine.health()["status"] == "ok"
        assert engine.agents().keys() == {"alice"}


@pytest.mark.parametrize("cut", [2 * BLOCK, 2 * BLOCK + 5])
def test_what_is_not_on_disk_yet_of_a_fork_is_not_shown_as_saved(tmp_path, cut):
    with tiny_engine(tmp_path) as engine:
        talk(engine, "alice")
        settle(engine)
        with slow_writer(engine):
            engine.call(engine.engine.forks.fork(AgentKey("default", "alice"), "bob", cut))
            detail = engine.call(engine.engine.agents.show(AgentKey("default", "bob")))
            assert detail.branches[0].unsaved_tokens == cut
        engine.wait_until_saved()
        detail = engine.call(engine.engine.agents.show(AgentKey("default", "bob")))
        assert detail.branches[0].unsaved_tokens == 0


def test_an_agent_deleted_during_a_truncation_does_not_come_back(tmp_path):
    with tiny_engine(tmp_path) as engine:
        talk(engine, "alice")
        engine.ask("bob", PROMPT + MORE)  # holds the same first blocks
        settle(engine)
        with slow_writer(engine):
            truncation = start(
                engine, engine.engine.forks.truncate(AgentKey("default", "alice"), 2 * BLOCK, None)
            )
            meanwhile(engine)
            delete = start(engine, engine.engine.agents.delete(AgentKey("default", "alice")))
            meanwhile(engine)
        assert delete.result(10)
        with pytest.raises(AgentMemError):
            truncation.result(10)
    with tiny_engine(tmp_path) as engine:
        assert engine.agents().keys() == {"bob"}


def read_late(engine, gate, calls=frozenset({1})) -> None:
    hold_back(engine, "read_block", set(calls), gate)


def fork_while_reading(engine) -> tuple[Future, threading.Event]:
    """A fork of alice to bob that has begun, and what lets go of the read of a block that it waits
    for.
    """
    rested(engine, hot=False)
    gate = threading.Event()
    read_late(engine, gate)
    fork = start(
        engine, engine.engine.forks.fork(AgentKey("default", "alice"), "bob", 2 * BLOCK + 5)
    )
    meanwhile(engine)
    return fork, gate


@pytest.mark.parametrize("change", ["quarantine", "delete"])
def test_a_fork_whose_source_changes_while_it_is_read_is_refused(tmp_path, change):
    with tiny_engine(tmp_path) as engine:
        fork, gate = fork_while_reading(engine)
        prefix_cache = engine.core.prefix_cache
        if change == "quarantine":
            node = prefix_cache.agents["default", "alice"].newest.blocks[1]
            engine.on_engine(lambda: prefix_cache.cut_at(node))
        else:
            assert engine.call(engine.engine.agents.delete(AgentKey("default", "alice")))
        gate.set()
        with pytest.raises((Conflict, NotFound)):
            fork.result(10)
        assert "bob" not in engine.agents()
        assert engine.ask("bob", PROMPT[: 2 * BLOCK + 5] + MORE)[
            1
        ].prompt_tokens == 2 * BLOCK + 5 + len(MORE)
        assert engine.engine.health()["status"] == "ok"


def test_a_fork_reads_again_what_left_ram_for_another_before_it_went_on(tmp_path):
    with tiny_engine(tmp_path) as engine:
        fork, gate = fork_while_reading(engine)
        inbox = engine.engine._inbox

        def arrive_and_leave():
            gate.set()
            while inbox.empty():
                time.sleep(0.001)
            inbox.put(lambda: engine.core.budget.evict_idle(1 << 30))

        engine.on_engine(arrive_and_leave)
        assert fork.result(10).agent.tokens == 2 * BLOCK + 5


def test_a_fork_does_not_take_the_name_of_an_agent_that_came_meanwhile(tmp_path):
    with tiny_engine(tmp_path) as engine:
        fork, gate = fork_while_reading(engine)
        engine.ask("bob", random_tokens(40, seed=9))
        gate.set()
        with pytest.raises(Conflict, match="already"):
            fork.result(10)
        assert engine.agents()["bob"].branches == 1


def test_what_runs_for_a_new_ephemeral_agent_is_not_written_whatever_is_asked_meanwhile(tmp_path):
    prompt = random_tokens(3 * BLOCK, seed=77)
    with tiny_engine(tmp_path) as engine:
        talk(engine, "alice")
        settle(engine)

        async def run(ephemeral, max_tokens):
            params = SamplingParams(max_tokens=max_tokens, seed=7, ignore_eos=True)
            request = GenerateRequest(
                AgentKey("default", "eve"), prompt, params, ephemeral=ephemeral
            )
            async for _ in engine.engine.generate(request):
                pass

        running = start(engine, run(True, 600))
        while not engine.on_engine(lambda: engine.core.scheduler.active):
            pass
        with pytest.raises(Conflict):
            engine.call(engine.engine.forks.fork(AgentKey("default", "alice"), "eve", None))
        with pytest.raises(Conflict):
            engine.call(run(False, 2))
        running.result(60)
        assert engine.agents()["eve"].ephemeral
        engine.wait_until_saved()
    run_of = bytes(b for t in prompt[8:20] for b in t.to_bytes(4, "little"))
    assert not any(run_of in path.read_bytes() for path in store_files(tmp_path))


def test_an_export_of_an_agent_that_is_deleted_meanwhile_is_refused_or_whole(tmp_path):
    with tiny_engine(tmp_path) as engine:
        talk(engine, "alice")
        settle(engine)
        with slow_writer(engine):
            export = start(engine, engine.engine.archives.export(AgentKey("default", "alice")))
            delete = start(engine, engine.engine.agents.delete(AgentKey("default", "alice")))
            meanwhile(engine)
        assert delete.result(10)
        if isinstance(export.exception(10), NotFound):
            return
        taken = export.result()  # before the deletion
        archive = b"".join(taken.chunks)
        taken.close()
    with tiny_engine(tmp_path / "other") as engine:
        detail = engine.call(engine.engine.archives.import_("default", None, io.BytesIO(archive)))
        assert detail.agent.tokens > len(PROMPT)


def test_an_export_whose_text_can_not_be_told_fails_alone_and_holds_nobody_up(
    tmp_path, monkeypatch
):
    with tiny_engine(tmp_path) as engine:
        talk(engine, "alice")
        threads = []

        def decode(_tokens):
            threads.append(threading.current_thread().name)
            raise IndexError("piece id is out of range")

        with monkeypatch.context() as patched:
            patched.setattr(engine.engine.tokenizer._tokenizer, "decode", decode)
            with pytest.raises(IndexError):
                exported(engine)
        assert len(threads) == 1 and "engine" not in threads
        engine.core.store.flush().result(10)
        assert not list(tmp_path.rglob("exports/*/*"))
        assert engine.engine.health()["status"] == "ok"
        assert exported(engine)


# -- import


def edited(archive: bytes, change, extra=None) -> bytes:
    """The archive with `change` done to agent.json, and a right checksum. `extra`: makes other
    members of it.
    """
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
    about = json.loads(files["agent.json"])
    change(about, files)
    files["agent.json"] = json.dumps(about).encode()
    del files["checksum"]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if data.startswith(b"->"):
                info.type, info.linkname, info.size = tarfile.SYMTYPE, data[2:].decode(), 0
            tar.addfile(info, io.BytesIO(data) if info.size else None)
        end = out.tell()
        digest = xxhash.xxh3_128(out.getvalue()[:end]).hexdigest().encode()
        info = tarfile.TarInfo("checksum")
        info.size = len(digest)
        tar.addfile(info, io.BytesIO(digest))
    return out.getvalue()


def test_an_imported_tail_never_reaches_another_agent(tmp_path):
    short = random_tokens(BLOCK - 8, seed=5)
    with tiny_engine(tmp_path / "a") as engine:
        engine.ask("alice", short, 2)
        archive = exported(engine)
    with tiny_engine(tmp_path / "b") as engine:
        imported(engine, archive)
        long = short + MORE
        assert engine.ask("alice", long)[1].cached_tokens >= len(short)
        assert engine.ask("bob", long)[1].cached_tokens == 0


def set_used(value):
    def change(about, files):
        about["branches"][0]["last_used"] = value

    return change


def set_token(value):
    def change(about, files):
        about["blocks"][0]["tokens"][0] = value

    return change


def self_link(about, files):
    files["blocks/000000.safetensors"] = b"->blocks/000000.safetensors"


def dead_link(about, files):
    files["tails/000.safetensors"] = b"->nowhere"


@pytest.mark.parametrize(
    "change",
    [
        set_used(-math.inf),
        set_used(math.nan),
        set_used(-1.0),
        set_token(2**32 - 1),
        self_link,
        dead_link,
    ],
    ids=["-inf", "nan", "negative", "token", "self-link", "dead-link"],
)
def test_a_made_up_archive_is_refused_and_leaves_nothing(tmp_path, change):
    with tiny_engine(tmp_path) as engine:
        talk(engine, "alice")
        archive = exported(engine)
        before = engine.core.store.stats()
        with pytest.raises(InvalidRequest):
            imported(engine, edited(archive, change), "bob")
        engine.core.store.flush().result(10)
        after = engine.core.store.stats()
        assert (after["blocks"], after["agents"]) == (before["blocks"], before["agents"])
        assert (
            imported(engine, edited(archive, lambda about, files: None), "carol").agent.agent_id
            == "carol"
        )


def test_an_import_that_the_disk_refuses_leaves_nothing(tmp_path):
    with tiny_engine(tmp_path) as engine:
        talk(engine, "alice")
        archive = exported(engine)
        before = engine.core.store.stats()
        store = engine.core.store
        save_tail = store.save_tail

        def refuse(*_args, **_more):
            future = Future()
            future.set_exception(OSError(28, "No space left on device"))
            return future

        store.save_tail = refuse
        with pytest.raises(StoreFailed, match="No space"):
            imported(engine, archive, "bob")
        store.save_tail = save_tail
        store.flush().result(10)
        assert store.stats()["blocks"] == before["blocks"]


def test_a_deletion_that_the_disk_refuses_says_so(tmp_path):
    with tiny_engine(tmp_path) as engine:
        talk(engine, "alice")
        settle(engine)
        store = engine.core.store
        delete = store.delete_agent

        def refuse(*_args):
            future = Future()
            future.set_exception(OSError(5, "Input/output error"))
            return future

        store.delete_agent = refuse
        with pytest.raises(StoreFailed, match="Input/output"):
            engine.call(engine.engine.agents.delete(AgentKey("default", "alice")))
        store.delete_agent = delete
        assert engine.call(engine.engine.agents.delete(AgentKey("default", "alice")))


# -- RAM


def test_what_left_ram_unsaved_is_not_taken_for_cached(tmp_path):
    with tiny_engine(tmp_path) as engine:
        params = SamplingParams(max_tokens=0)
        drain(engine, GenerateRequest(AgentKey("default", "eve"), PROMPT, params, ephemeral=True))
        engine.on_engine(lambda: engine.core.budget.evict_idle(1 << 30))
        assert engine.core.prefix_cache.pool.nbytes == 0
        info = engine.agents().get("eve")
        assert info is None or info.tokens == 0
        assert engine.ask("eve", PROMPT)[1].cached_tokens == 0


@pytest.mark.parametrize("hot", [True, False])
def test_what_an_ephemeral_agent_shared_with_a_deleted_one_is_not_taken_for_stored(tmp_path, hot):
    with tiny_engine(tmp_path) as engine:
        talk(engine, "alice")
        settle(engine)
        params = SamplingParams(max_tokens=0)
        drain(
            engine,
            GenerateRequest(AgentKey("default", "eve"), PROMPT + MORE, params, ephemeral=True),
        )
        if not hot:
            engine.on_engine(lambda: engine.core.budget.evict_idle(1 << 30))
        engine.call(engine.engine.agents.delete(AgentKey("default", "alice")))
        assert engine.agents()["eve"].disk_bytes == 0
        cached = engine.ask("eve", PROMPT + MORE)[1].cached_tokens
        assert cached == (len(PROMPT + MORE) - 1 if hot else 0)
        engine.on_engine(lambda: engine.core.budget.evict_idle(1 << 30))
        assert engine.agents()["eve"].tokens == 0


def test_a_prewarm_of_what_is_cached_computes_nothing(tmp_path):
    with tiny_engine(tmp_path) as engine:
        for _ in range(2):
            drain(
                engine,
                GenerateRequest(AgentKey("default", "alice"), PROMPT, SamplingParams(max_tokens=0)),
            )
            assert engine.agents()["alice"].tokens == len(PROMPT) - 1


# -- for how long


def test_a_pinned_agent_does_not_expire_in_a_store_that_is_not_in_use_either(tmp_path):
    with tiny_engine(tmp_path) as engine:
        talk(engine, "alice")
        engine.call(engine.engine.agents.pin(AgentKey("default", "alice"), True))
        engine.call(engine.engine.agents.set_ttl(AgentKey("default", "alice"), 0.01))
    time.sleep(0.05)
    for layout in stores(tmp_path / "store"):
        shrink(layout, 0)
    with tiny_engine(tmp_path) as engine:
        assert engine.agents().keys() == {"alice"}


@pytest.mark.parametrize("ttl", ["1e999", "Infinity", "0"])
def test_a_lifetime_is_a_number_that_an_answer_can_hold(ttl):
    with pytest.raises(ValueError, match="seconds"):
        TTLBody.model_validate_json(f'{{"seconds": {ttl}}}')
