"""What can be done to agents, on a tiny model: each time the next answer is compared with an
undisturbed agent's.
"""

import asyncio
import io
import json
import random
import tarfile
import threading
import time

import mlx.core as mx
import pytest

from agentmem.agent_key import AgentKey
from agentmem.engine.api import GenerateRequest, SamplingParams
from agentmem.errors import Conflict, InvalidRequest, NotFound
from agentmem.store.files.crypto import Vault
from agentmem.store.upkeep.quota import disk_usage
from support.engines import settle
from support.lifecycle import MORE, PROMPT, drain, exported, imported, rested, store_files, talk
from support.tiny import BLOCK, random_tokens, tiny_engine, tiny_loader


def reference(tmp_path, tokens: list[int]) -> str:
    with tiny_engine(tmp_path / "reference") as engine:
        talk(engine, "r")
        return engine.ask("r", tokens)[0]


# -- fork


@pytest.mark.parametrize("hot", [True, False])
def test_a_fork_goes_on_like_its_source_which_does_not_notice(tmp_path, hot):
    with tiny_engine(tmp_path / "a") as engine:
        tokens = rested(engine, hot=hot)
        written = engine.core.store.stats()["bytes_written"]
        detail = engine.call(engine.engine.forks.fork(AgentKey("default", "alice"), "bob", None))
        assert detail.agent.tokens == len(tokens) - 1  # the last of an answer is never in a cache
        settle(engine)
        assert engine.core.store.stats()["bytes_written"] == written
        alice, _ = engine.ask("alice", tokens + MORE)
        bob, stats = engine.ask("bob", tokens + MORE)
        assert bob == alice == reference(tmp_path, tokens + MORE)
        assert stats.cached_tokens >= len(tokens) - 1


def test_a_fork_survives_a_restart_and_the_deletion_of_its_source(tmp_path):
    with tiny_engine(tmp_path / "a") as engine:
        tokens = talk(engine, "alice")
        settle(engine)
        engine.call(engine.engine.forks.fork(AgentKey("default", "alice"), "bob", None))
        engine.call(engine.engine.agents.delete(AgentKey("default", "alice")))
    with tiny_engine(tmp_path / "a") as engine:
        assert engine.agents().keys() == {"bob"}
        bob, stats = engine.ask("bob", tokens + MORE)
        assert (stats.cache, stats.cached_tokens) == ("warm", len(tokens) - 1)
        assert bob == reference(tmp_path, tokens + MORE)


@pytest.mark.parametrize("cut", [2 * BLOCK, 2 * BLOCK + 5, 3 * BLOCK + 3])
@pytest.mark.parametrize("hot", [True, False])
def test_a_fork_at_a_token_continues_like_a_truncated_copy(tmp_path, cut, hot):
    with tiny_engine(tmp_path / "a") as engine:
        rested(engine, hot=hot)
        engine.call(engine.engine.forks.fork(AgentKey("default", "alice"), "bob", cut))
        bob, stats = engine.ask("bob", PROMPT[:cut] + MORE)
        assert stats.cached_tokens == cut
    with tiny_engine(tmp_path / "b") as engine:
        talk(engine, "alice")
        alice, stats = engine.ask(
            "alice", PROMPT[:cut] + MORE
        )  # an edit cuts the cache at the same place
        assert (bob, stats.cached_tokens) == (alice, cut)


def test_a_fork_needs_a_source_and_a_new_name(tmp_path):
    with tiny_engine(tmp_path) as engine:
        talk(engine, "alice")
        with pytest.raises(NotFound, match="nobody"):
            engine.call(engine.engine.forks.fork(AgentKey("default", "nobody"), "bob", None))
        with pytest.raises(NotFound):
            engine.call(engine.engine.forks.fork(AgentKey("other", "alice"), "bob", None))
        with pytest.raises(Conflict, match="already"):
            engine.call(engine.engine.forks.fork(AgentKey("default", "alice"), "alice", None))
        with pytest.raises(InvalidRequest, match="tokens must be 1 to"):
            engine.call(engine.engine.forks.fork(AgentKey("default", "alice"), "bob", 10_000))
        assert engine.agents().keys() == {"alice"}


# -- truncate


@pytest.mark.parametrize("cut", [BLOCK, 2 * BLOCK + 5, 3 * BLOCK + 3])
@pytest.mark.parametrize("hot", [True, False])
def test_a_truncated_agent_has_forgotten_the_rest_also_on_disk(tmp_path, cut, hot):
    with tiny_engine(tmp_path / "a") as engine:
        rested(engine, hot=hot)
        blocks = engine.core.store.stats()["blocks"]
        detail = engine.call(engine.engine.forks.truncate(AgentKey("default", "alice"), cut, None))
        assert (detail.agent.tokens, len(detail.branches), detail.branches[0].unsaved_tokens) == (
            cut,
            1,
            0,
        )
        assert engine.core.store.stats()["blocks"] == cut // BLOCK <= blocks
    with tiny_engine(tmp_path / "a") as engine:
        answer, stats = engine.ask("alice", PROMPT[:cut] + MORE)
        assert (stats.cache, stats.cached_tokens) == ("warm", cut)
    with tiny_engine(tmp_path / "b") as engine:
        talk(engine, "alice")
        assert engine.ask("alice", PROMPT[:cut] + MORE)[0] == answer


def test_a_truncated_ephemeral_agent_keeps_the_rest_in_ram(tmp_path):
    with tiny_engine(tmp_path) as engine:
        drain(
            engine,
            GenerateRequest(
                AgentKey("default", "eve"), PROMPT, SamplingParams(max_tokens=0), ephemeral=True
            ),
        )
        engine.call(engine.engine.forks.truncate(AgentKey("default", "eve"), 2 * BLOCK + 5, None))
        stats = engine.ask("eve", PROMPT[: 2 * BLOCK + 5] + MORE)[1]
        assert (stats.cache, stats.cached_tokens) == ("hot", 2 * BLOCK + 5)
        known = engine.on_engine(lambda: set(engine.core.prefix_cache.blocks))
        held = engine.on_engine(
            lambda: {n.key for b in engine.core.prefix_cache.branches() for n in b.blocks}
        )
        assert held == known


def test_truncating_to_what_is_there_changes_nothing_and_beyond_is_refused(tmp_path):
    with tiny_engine(tmp_path) as engine:
        n = len(talk(engine, "alice")) - 1
        assert (
            engine.call(
                engine.engine.forks.truncate(AgentKey("default", "alice"), n, n)
            ).agent.tokens
            == n
        )
        with pytest.raises(InvalidRequest, match=f"1 to {n}"):
            engine.call(engine.engine.forks.truncate(AgentKey("default", "alice"), n + 1, None))
        with pytest.raises(Conflict, match="changed"):
            engine.call(engine.engine.forks.truncate(AgentKey("default", "alice"), 5, n - 1))


# -- evict, pin, TTL, ephemeral


def test_evicted_means_out_of_ram_and_back_with_the_same_answer(tmp_path):
    with tiny_engine(tmp_path / "a") as engine:
        tokens = talk(engine, "alice")
        freed = engine.call(engine.engine.agents.evict(AgentKey("default", "alice")))
        assert freed > 0
        assert (engine.agents()["alice"].tier, engine.agents()["alice"].ram_bytes) == ("warm", 0)
        answer, stats = engine.ask("alice", tokens + MORE)
        assert (stats.cache, stats.cached_tokens) == ("warm", len(tokens) - 1)
        assert answer == reference(tmp_path, tokens + MORE)


def test_eviction_spares_what_another_agent_holds(tmp_path):
    with tiny_engine(tmp_path) as engine:
        talk(engine, "alice")
        engine.ask("bob", PROMPT[: 2 * BLOCK] + MORE)
        before = engine.agents()["bob"].ram_bytes
        engine.call(engine.engine.agents.evict(AgentKey("default", "alice")))
        assert engine.agents()["bob"].ram_bytes == before


def test_a_pin_is_kept_over_a_restart_and_forbids_eviction(tmp_path):
    with tiny_engine(tmp_path) as engine:
        talk(engine, "alice")
        engine.call(engine.engine.agents.pin(AgentKey("default", "alice"), True))
        with pytest.raises(Conflict, match="unpin"):
            engine.call(engine.engine.agents.evict(AgentKey("default", "alice")))
    with tiny_engine(tmp_path) as engine:
        assert engine.agents()["alice"].pinned
        engine.call(engine.engine.agents.pin(AgentKey("default", "alice"), False))
    with tiny_engine(tmp_path) as engine:
        assert not engine.agents()["alice"].pinned


def test_an_agent_expires_after_its_last_use_also_while_the_server_is_down(tmp_path):
    with tiny_engine(tmp_path) as engine:
        talk(engine, "alice")
        talk(engine, "bob")
        talk(engine, "carol")
        engine.call(engine.engine.agents.set_ttl(AgentKey("default", "alice"), 0.5))
        engine.call(engine.engine.agents.set_ttl(AgentKey("default", "bob"), 1.5))
        engine.call(engine.engine.agents.set_ttl(AgentKey("default", "carol"), 0.5))
        engine.call(engine.engine.agents.pin(AgentKey("default", "carol"), True))
        deadline = time.monotonic() + 5
        while "alice" in engine.agents():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert engine.agents().keys() == {"bob", "carol"}
    time.sleep(1.5)
    with tiny_engine(tmp_path) as engine:
        engine.on_engine(lambda: None)
        assert engine.agents().keys() == {"carol"}  # what is pinned stays


def test_a_request_can_say_how_long_its_agent_is_kept(tmp_path):
    with tiny_engine(tmp_path) as engine:
        request = GenerateRequest(
            AgentKey("default", "alice"), PROMPT, SamplingParams(max_tokens=2), ttl=3600.0
        )
        drain(engine, request)
        assert engine.agents()["alice"].ttl == 3600
    with tiny_engine(tmp_path) as engine:
        assert engine.agents()["alice"].ttl == 3600


def test_an_ephemeral_agent_is_never_written_and_works_like_another_until_its_ram_is_needed(
    tmp_path,
):
    with tiny_engine(tmp_path / "a") as engine:
        request = GenerateRequest(
            AgentKey("default", "eve"), PROMPT, SamplingParams(max_tokens=4, seed=7), ephemeral=True
        )
        drain(engine, request)
        engine.wait_until_saved()
        assert engine.core.store.stats()["bytes_written"] == 0
        assert engine.agents()["eve"].ephemeral
        assert engine.ask("eve", PROMPT + MORE)[1].cached_tokens == len(PROMPT)
        with pytest.raises(Conflict, match="ephemeral"):
            engine.call(engine.engine.agents.evict(AgentKey("default", "eve")))
        with pytest.raises(Conflict, match="exists"):
            drain(
                engine,
                GenerateRequest(
                    AgentKey("default", "eve"),
                    PROMPT,
                    SamplingParams(max_tokens=4),
                    ephemeral=False,
                ),
            )
        # another agent with the same prefix is written, all of it
        alice = talk(engine, "alice")
        engine.wait_until_saved()
    with tiny_engine(tmp_path / "a") as engine:
        assert engine.agents().keys() == {"alice"}
        _, stats = engine.ask("alice", alice + MORE)
        assert (stats.cache, stats.cached_tokens) == ("warm", len(alice) - 1)


def test_ephemeral_agents_give_their_ram_to_others(tmp_path):
    with tiny_engine(tmp_path, kv_budget=1_000_000) as engine:
        for i in range(24):
            prompt = random_tokens(3 * BLOCK, seed=50 + i)
            request = GenerateRequest(
                AgentKey("default", f"e{i}"), prompt, SamplingParams(max_tokens=2), ephemeral=True
            )
            drain(engine, request)
        assert engine.core.store.stats()["writes"] == 0
        assert engine.ask("e23", random_tokens(3 * BLOCK, seed=73) + MORE)[1].cache == "hot"
        assert (
            engine.ask("e0", random_tokens(3 * BLOCK, seed=50) + MORE)[1].cached_tokens < 3 * BLOCK
        )


def test_a_prewarmed_prompt_is_all_cached_and_was_not_answered(tmp_path):
    with tiny_engine(tmp_path / "a") as engine:
        drain(
            engine,
            GenerateRequest(AgentKey("default", "alice"), PROMPT, SamplingParams(max_tokens=0)),
        )
        answer, stats = engine.ask("alice", PROMPT)
        assert stats.cached_tokens == len(PROMPT) - 1
        assert answer == talk_answer(tmp_path)


def talk_answer(tmp_path) -> str:
    with tiny_engine(tmp_path / "plain") as engine:
        return engine.ask("alice", PROMPT)[0]


def test_show_tells_what_a_crash_would_cost(tmp_path):
    with tiny_engine(tmp_path, write_amplification=1.0) as engine:
        tokens = talk(engine, "alice")
        time.sleep(0.5)
        detail = engine.call(engine.engine.agents.show(AgentKey("default", "alice")))
        assert [b.unsaved_tokens for b in detail.branches] == [(len(tokens) - 1) % BLOCK]
        assert (detail.agent.requests, detail.agent.hit_tokens) == (1, 0)
        engine.ask("alice", tokens + MORE)
        detail = engine.call(engine.engine.agents.show(AgentKey("default", "alice")))
        assert (detail.agent.requests, detail.agent.hit_tokens) == (2, len(tokens) - 1)


# -- export and import


@pytest.mark.parametrize("kv_bits", ["4", "16"])
def test_an_imported_agent_answers_its_next_turn_like_the_exported_one(tmp_path, kv_bits):
    with tiny_engine(tmp_path / "a", kv_bits=kv_bits) as engine:
        tokens = talk(engine, "alice", turns=2)
        engine.ask("alice", tokens[: 2 * BLOCK + 7] + MORE)  # a second branch, cut inside a block
        archive = exported(engine)
        alice, _ = engine.ask("alice", tokens + MORE)
        other, _ = engine.ask("alice", tokens[: 2 * BLOCK + 7] + MORE + MORE)
        assert not any((tmp_path / "a").rglob("exports/*"))
    with tiny_engine(tmp_path / "b", kv_bits=kv_bits) as engine:
        detail = imported(engine, archive)
        assert (detail.agent.agent_id, len(detail.branches)) == ("alice", 2)
        answer, stats = engine.ask("alice", tokens + MORE)
        assert (answer, stats.cache, stats.cached_tokens) == (alice, "warm", len(tokens) - 1)
        assert engine.ask("alice", tokens[: 2 * BLOCK + 7] + MORE + MORE)[0] == other
    with tiny_engine(tmp_path / "b", kv_bits=kv_bits) as engine:
        assert engine.agents()["alice"].tokens > len(tokens)


def cache_bytes(engine, agent: str, tokens: list[int]) -> list[dict[str, bytes]]:
    """All arrays of the agent's whole cache, in order."""

    def read() -> list[dict[str, bytes]]:
        match = engine.core.prefix_cache.match(AgentKey("default", agent), tokens)
        snapshot, _ = engine.core.restorer.snapshot(match)
        arrays = [block.arrays for block in snapshot.blocks] + [snapshot.tail.to_arrays()]
        return [
            {name: bytes(memoryview(mx.contiguous(a))) for name, a in part.items()}
            for part in arrays
        ]

    engine.call(engine.engine.agents.prefetch(AgentKey("default", agent)))
    return engine.on_engine(read)


def test_an_imported_cache_is_the_exported_one_bit_for_bit(tmp_path):
    with tiny_engine(tmp_path / "a") as engine:
        tokens = talk(engine, "alice", turns=2)
        archive, before = exported(engine), cache_bytes(engine, "alice", tokens)
    with tiny_engine(tmp_path / "b") as engine:
        imported(engine, archive)
        assert cache_bytes(engine, "alice", tokens) == before


def test_an_export_says_what_it_is_and_the_safetensors_package_reads_it(tmp_path):
    from safetensors.numpy import load

    with tiny_engine(tmp_path) as engine:
        tokens = talk(engine, "alice")
        archive = exported(engine)
        text = engine.core.model.tokenizer.decode(tokens[:-1])
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        about = json.load(tar.extractfile("agent.json"))
        assert about["branches"][0]["text"] == text
        found = [t for block in about["blocks"] for t in block["tokens"]] + about["branches"][0][
            "tail"
        ]["tokens"]
        assert found == tokens[:-1]
        for name in (about["blocks"][0]["file"], about["branches"][0]["tail"]["file"]):
            assert load(tar.extractfile(name).read())


def test_an_imported_block_never_reaches_another_agent(tmp_path):
    with tiny_engine(tmp_path / "a") as engine:
        talk(engine, "alice")
        archive = exported(engine)
    with tiny_engine(tmp_path / "b") as engine:
        imported(engine, archive)
        assert engine.ask("bob", PROMPT)[1].cached_tokens == 0


def test_an_import_of_another_model_is_refused_with_the_reason(tmp_path):
    with tiny_engine(tmp_path / "a") as engine:
        talk(engine, "alice")
        archive = exported(engine)
    with (
        tiny_engine(tmp_path / "b", tiny_loader(seed=1)) as engine,
        pytest.raises(InvalidRequest, match="other weights"),
    ):
        imported(engine, archive)
    with tiny_engine(tmp_path / "c", kv_bits="8") as engine:
        with pytest.raises(InvalidRequest, match="cache layout"):
            imported(engine, archive)
        assert engine.agents() == {}
        assert engine.core.store.stats()["blocks"] == 0


def test_an_import_needs_a_new_name(tmp_path):
    with tiny_engine(tmp_path) as engine:
        talk(engine, "alice")
        archive = exported(engine)
        with pytest.raises(Conflict, match="already"):
            imported(engine, archive)
        with pytest.raises(InvalidRequest, match="control"):
            imported(engine, archive, "a\nb")
        assert imported(engine, archive, "bob").agent.agent_id == "bob"


def test_a_changed_archive_is_refused_and_leaves_nothing(tmp_path):
    rng = random.Random(3)
    with tiny_engine(tmp_path / "a") as engine:
        talk(engine, "alice")
        archive = exported(engine)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        last = tar.getmembers()[-1]
        end = last.offset_data + last.size
    with tiny_engine(tmp_path / "b") as engine:
        for _ in range(60):
            damaged = bytearray(archive)
            damaged[rng.randrange(end)] ^= 1 << rng.randrange(8)
            cut = archive[: rng.randrange(end)]
            for bad in (bytes(damaged), cut):
                with pytest.raises(InvalidRequest):
                    imported(engine, bad)
        assert engine.agents() == {}
        assert (engine.core.store.stats()["blocks"], engine.core.store.stats()["agents"]) == (0, 0)
        assert imported(engine, archive).agent.agent_id == "alice"


# -- encryption


def test_with_encryption_nothing_on_disk_is_readable_and_everything_works(tmp_path):
    key = tmp_path / "key"
    plain = {}
    for encrypt in (False, True):
        home = tmp_path / str(encrypt)
        with tiny_engine(home, encrypt=encrypt, key_file=key) as engine:
            tokens = talk(engine, "alice", turns=2)
            engine.call(engine.engine.forks.fork(AgentKey("default", "alice"), "bob", None))
            archive = exported(engine)
        data = [path.read_bytes() for path in store_files(home) if "calibration" not in path.name]
        run = bytes(b for t in PROMPT[8:20] for b in t.to_bytes(4, "little"))
        plain[encrypt] = any(run in d or b"packed" in d for d in data)
        with tiny_engine(home, encrypt=encrypt, key_file=key) as engine:
            engine.call(engine.engine.agents.delete(AgentKey("default", "alice")))
            answer, stats = engine.ask("bob", tokens + MORE)
            assert (stats.cache, stats.cached_tokens) == ("warm", len(tokens) - 1)
            assert imported(engine, archive, "carol").agent.tokens == len(tokens) - 1
        with tiny_engine(home, encrypt=encrypt, key_file=key) as engine:
            assert engine.ask("carol", tokens + MORE)[0] == answer
    assert plain == {False: True, True: False}
    assert len(Vault(bytes.fromhex(key.read_text().strip())).check) == 32


# -- the store's limits


def test_an_agent_that_left_a_full_store_is_prefilled_again_and_right(tmp_path):
    with tiny_engine(tmp_path / "plain") as engine:
        expected = [
            engine.ask(f"a{i}", random_tokens(6 * BLOCK + 10, seed=100 + i))[0] for i in range(12)
        ]
    with tiny_engine(
        tmp_path / "a", store_quota=1_500_000, store_min_free=0, kv_budget=1_200_000
    ) as engine:
        root = tmp_path / "a" / "store"
        for _ in range(3):
            for i in range(12):
                assert (
                    engine.ask(f"a{i}", random_tokens(6 * BLOCK + 10, seed=100 + i))[0]
                    == expected[i]
                )
                # the rows of a batch may be in the log before room is made for them; and a look
                # beside the writer may count a file that goes as well as the one that takes its
                # place
                assert min(disk_usage(root) for _ in range(5)) <= 1_500_000 + 100_000
        assert engine.core.store.stats()["trimmed_bytes"] > 0
        assert engine.engine.health()["status"] == "ok"


def test_fifty_agents_in_a_store_for_ten_keep_its_quota_and_the_pinned_and_newest_are_there(
    tmp_path,
):
    prompts = {f"a{i}": random_tokens(20 * BLOCK + 10, seed=300 + i) for i in range(50)}
    with tiny_engine(tmp_path / "one") as engine:
        empty = disk_usage(tmp_path / "one" / "store")
        engine.ask("a0", prompts["a0"])
        settle(engine)
        files = [
            path.stat().st_blocks * 512
            for path in (tmp_path / "one" / "store").rglob("*/*.safetensors")
        ]
        agent_bytes, block_bytes = sum(files), max(files)
    log = 1_000_000  # what the manifest grows by
    quota, root, seen, done = (
        empty + log + 10 * agent_bytes,
        tmp_path / "a" / "store",
        [0],
        threading.Event(),
    )

    def watch() -> None:
        while not done.wait(0.002):
            # of a look while files come and go, one may count both: the least of a few is nearer
            # the truth
            seen[0] = max(seen[0], min(disk_usage(root) for _ in range(3)) if root.exists() else 0)

    watcher = threading.Thread(target=watch)
    with tiny_engine(
        tmp_path / "a", store_quota=quota, store_min_free=0, kv_budget=2_500_000
    ) as engine:
        watcher.start()
        for i, (name, prompt) in enumerate(prompts.items()):
            engine.ask(name, prompt)
            if i < 2:
                engine.call(engine.engine.agents.pin(AgentKey("default", name), True))
        settled = time.monotonic() + 1
        while time.monotonic() < settled:
            time.sleep(0.1)
    done.set()
    watcher.join()
    assert (
        seen[0] <= quota + block_bytes + 100_000
    )  # rows of a batch are in the log before room is made for them
    with tiny_engine(tmp_path / "a", store_quota=quota, store_min_free=0) as engine:
        assert engine.engine.health()["errors"] == []
        whole = {name for name, agent in engine.agents().items() if agent.tokens >= 20 * BLOCK}
        assert {"a0", "a1", "a49", "a48", "a47"} <= whole
        assert "a5" not in whole and len(whole) <= 10 + log // agent_bytes
        assert engine.ask("a0", prompts["a0"] + MORE)[1].cached_tokens >= len(prompts["a0"])


def test_of_imports_of_one_name_at_the_same_time_one_is_taken(tmp_path):
    with tiny_engine(tmp_path / "a") as engine:
        talk(engine, "alice")
        archive = exported(engine)

    async def all_at_once(engine):
        imports = (
            engine.engine.archives.import_("default", None, io.BytesIO(archive)) for _ in range(5)
        )
        return await asyncio.gather(*imports, return_exceptions=True)

    with tiny_engine(tmp_path / "b") as engine:
        results = engine.call(all_at_once(engine))
        assert sum(isinstance(r, Conflict) for r in results) == 4
        assert engine.agents()["alice"].branches == 1
        assert engine.core.store.stats()["agents"] == 1


def test_a_truncation_right_after_a_prewarm_is_saved(tmp_path):
    with tiny_engine(tmp_path, tail_delay=0.0) as engine:
        for i in range(60):
            prompt = random_tokens(4 * BLOCK + 9, seed=400 + i % 3)
            drain(
                engine,
                GenerateRequest(AgentKey("default", "alice"), prompt, SamplingParams(max_tokens=0)),
            )
            cut = 3 * BLOCK if i % 2 else 3 * BLOCK - 7
            detail = engine.call(
                engine.engine.forks.truncate(AgentKey("default", "alice"), cut, None)
            )
            assert (detail.branches[0].tokens, detail.branches[0].unsaved_tokens) == (cut, 0)
