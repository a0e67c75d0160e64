"""The engine on a tiny model and a real store: reuse, restore, isolation, cancellation, stop."""

import asyncio
import threading
import time

import pytest

from agentmem.agent_key import AgentKey
from agentmem.engine.api import GenerateRequest, SamplingParams
from agentmem.engine.calibration import calibrate
from agentmem.errors import Busy, CorruptSegment, EngineFailed, ModelError, ShuttingDown, StoreError
from support.engines import settle
from support.tiny import (
    BLOCK,
    ONE_SEQUENCE,
    random_tokens,
    tiny_engine,
    tiny_loader,
    tiny_runner,
    word_ids,
)

PROMPT = random_tokens(100)


def reference_text(tokens: list[int], n: int) -> list[int]:
    """Greedy tokens of a bare loop over the runner, from an empty cache."""
    runner = tiny_runner()
    from support.tiny import tiny_loader

    model = tiny_loader()()
    runner.use_centres(
        runner.calibrate(
            calibrate.calibration_tokens(
                lambda t: model.tokenizer.encode(t, add_special_tokens=False)
            )
        )
    )
    cache = runner.new_cache()
    runner.prefill(cache, tokens[:-1])
    out = [tokens[-1]]
    for _ in range(n):
        logits, fresh = runner.decode([cache], [out[-1]])
        runner.evaluate([logits], fresh)
        out.append(int(logits.argmax().item()))
    return out[1:]


def test_greedy_tokens_equal_a_bare_loop(tmp_path):
    with tiny_engine(tmp_path) as engine:
        text, stats = engine.ask("alice", PROMPT, 40, temperature=0.0)
    assert word_ids(text) == reference_text(PROMPT, 40)
    assert (stats.cache, stats.prompt_tokens, stats.completion_tokens) == ("cold", 100, 40)


def test_a_second_turn_is_hot_and_its_answer_that_of_a_restarted_server(tmp_path):
    def second_turn(engine, first):
        turn = PROMPT + word_ids(first) + random_tokens(20, seed=2)
        return engine.ask("alice", turn, 40)

    with tiny_engine(tmp_path / "a") as engine:
        first, _ = engine.ask("alice", PROMPT, 40)
        hot_text, hot = second_turn(engine, first)
    with tiny_engine(tmp_path / "b") as engine:
        assert engine.ask("alice", PROMPT, 40)[0] == first
    with tiny_engine(tmp_path / "b") as engine:
        assert engine.agents()["alice"].tier == "warm"
        warm_text, warm = second_turn(engine, first)
        assert engine.agents()["alice"].tier == "hot"
    assert (hot.cache, warm.cache) == ("hot", "warm")
    assert hot.cached_tokens == warm.cached_tokens == 139  # all but the token that was sampled last
    assert warm.restored_bytes > 0 and hot.restored_bytes == 0
    assert warm_text == hot_text


@pytest.mark.parametrize("kv_bits", ["k5v3", "k5v4", "8", "16"])
@pytest.mark.parametrize("kind", ["gemma3", "gpt_oss"])
def test_restart_gives_the_same_answer_whatever_the_precision_and_layers(tmp_path, kv_bits, kind):
    load = tiny_loader(kind)
    with tiny_engine(tmp_path, load, kv_bits=kv_bits) as engine:
        first = engine.ask("alice", PROMPT, 12)
        again = engine.ask("alice", PROMPT, 12)
    with tiny_engine(tmp_path, load, kv_bits=kv_bits) as engine:
        after = engine.ask("alice", PROMPT, 12)
    # what the end of the prompt sees through a window has left RAM by the end of the answer
    assert (first[1].cache, after[1].cache) == ("cold", "warm")
    assert again[1].restored_bytes < after[1].restored_bytes
    assert again[0] == after[0]


def test_evicted_agents_come_back_warm_with_the_same_answer(tmp_path):
    prompts = {name: random_tokens(100, seed=i) for i, name in enumerate(("a", "b", "c"))}
    with tiny_engine(tmp_path) as engine:
        expected = {}
        for name, prompt in prompts.items():
            engine.ask(name, prompt)
            expected[name] = engine.ask(name, prompt)[0]
    with tiny_engine(tmp_path / "small", kv_budget=ONE_SEQUENCE, tail_delay=0.0) as engine:
        for name, prompt in prompts.items():
            engine.ask(name, prompt)
        settle(engine)
        engine.ask("d", random_tokens(10, seed=9))  # what is on disk by now leaves RAM for it
        for name, prompt in prompts.items():
            text, stats = engine.ask(name, prompt)
            assert (text, stats.cache) == (expected[name], "warm")


def test_agents_with_one_system_prompt_share_its_blocks_and_nothing_else(tmp_path):
    system = random_tokens(2 * BLOCK + 5)
    with tiny_engine(tmp_path) as engine:
        engine.ask("alice", system + random_tokens(30, seed=1))
        _, bob = engine.ask("bob", system + random_tokens(30, seed=2))
        assert bob.cached_tokens == 2 * BLOCK  # not the 5 tokens in alice's third block
        alone = engine.ask("carol", system + random_tokens(30, seed=2))
    with tiny_engine(tmp_path / "other", sharing="agent") as engine:
        engine.ask("alice", system + random_tokens(30, seed=1))
        text, bob = engine.ask("bob", system + random_tokens(30, seed=2))
    assert bob.cached_tokens == 0
    assert text == alone[0]


def test_an_edit_in_the_middle_keeps_what_came_before(tmp_path):
    with tiny_engine(tmp_path) as engine:
        engine.ask("alice", PROMPT)
        edited = PROMPT[:70] + random_tokens(30, seed=3)
        _, stats = engine.ask("alice", edited)
        assert stats.cached_tokens == 70
        _, stats = engine.ask("alice", PROMPT)  # the first branch is still there
        assert stats.cached_tokens == 99
    with tiny_engine(tmp_path) as engine:
        after, stats = engine.ask("alice", edited)
        assert (stats.cache, stats.cached_tokens) == ("warm", 99)
    with tiny_engine(tmp_path / "control") as engine:
        engine.ask("alice", PROMPT)
        engine.ask("alice", edited)
        assert engine.ask("alice", edited)[0] == after


def test_eight_concurrent_agents_get_the_tokens_they_get_alone(tmp_path):
    prompts = [random_tokens(n, seed=n) for n in (1, 5, 31, 32, 33, 64, 100, 150)]
    seeded = {"temperature": 0.9, "top_p": 0.9, "seed": 11}
    with tiny_engine(tmp_path / "alone") as engine:
        alone = [engine.ask(f"a{i}", p, 20, temperature=0.0) for i, p in enumerate(prompts)]
        alone += [engine.ask(f"s{i}", p, 20, **seeded) for i, p in enumerate(prompts)]
    with tiny_engine(tmp_path / "together", max_running=16) as engine:

        async def together():
            greedy = [engine.answer(f"a{i}", p, 20, temperature=0.0) for i, p in enumerate(prompts)]
            sampled = [engine.answer(f"s{i}", p, 20, **seeded) for i, p in enumerate(prompts)]
            return await asyncio.gather(*greedy, *sampled)

        at_once = engine.call(together())
    assert [text for text, _ in at_once] == [text for text, _ in alone]


def test_the_same_seed_gives_the_same_text_and_another_one_another(tmp_path):
    with tiny_engine(tmp_path) as engine:
        texts = [engine.ask("a", PROMPT, 20, temperature=1.0, seed=s)[0] for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.8, "top_p": 0.5, "top_k": 5, "min_p": 0.05, "seed": 3},
        {"repetition_penalty": 1.8},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"logit_bias": ((77, 100.0),)},
    ],
)
def test_every_sampling_parameter_has_an_effect(tmp_path, params):
    with tiny_engine(tmp_path) as engine:
        assert engine.ask("a", PROMPT, 30, **params)[0] != engine.ask("b", PROMPT, 30)[0]


def test_stop_strings_and_stop_tokens_end_the_answer_before_them(tmp_path):
    with tiny_engine(tmp_path) as engine:
        text, _ = engine.ask("a", PROMPT, 30)
        all_words = text.split()
        cut = next(i for i in range(4, 30) if all_words[i] not in all_words[:i])
        stopped, stats = engine.ask("b", PROMPT, 30, stop=(all_words[cut],))
        assert stopped.split() == all_words[:cut]
        by_token, _ = engine.ask("c", PROMPT, 30, stop_token_ids=(word_ids(all_words[cut])[0],))
        assert by_token.split() == all_words[:cut]
        assert stats.completion_tokens == cut + 1


@pytest.mark.parametrize("how", ["stop", "stop_token_ids", "max_tokens"])
def test_an_answer_is_cut_where_the_model_did_not_end_it(tmp_path, how):
    with tiny_engine(tmp_path) as engine:
        word = engine.ask("a", PROMPT, 8)[0].split()[4]
        ends = {"stop": (word,), "stop_token_ids": tuple(word_ids(word)), "max_tokens": 3}
        params = SamplingParams(**{"max_tokens": 8, "seed": 7, "ignore_eos": True, how: ends[how]})

        async def finished():
            async for event in engine.engine.generate(
                GenerateRequest(AgentKey("default", "b"), PROMPT, params)
            ):
                last = event
            return last

        assert engine.call(finished()).cut == (how != "stop_token_ids")


def test_a_cancelled_stream_leaves_nothing_running_and_keeps_its_prefill(tmp_path):
    with tiny_engine(tmp_path) as engine:

        async def leave_early():
            request = GenerateRequest(
                AgentKey("default", "alice"),
                PROMPT,
                SamplingParams(max_tokens=900, temperature=0.0),
            )
            stream = engine.engine.generate(request)
            async for _ in stream:
                await stream.aclose()
                return

        engine.call(leave_early())
        deadline = time.monotonic() + 5
        while engine.engine.health()["running"] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.engine.health()["running"] == 0
        assert engine.ask("alice", PROMPT)[1].cached_tokens == 99


def test_a_full_queue_is_refused_and_the_queued_are_served(tmp_path):
    with tiny_engine(tmp_path, max_running=1, max_queue=2) as engine:

        async def crowd():
            tasks = [asyncio.create_task(engine.answer(f"a{i}", PROMPT, 60)) for i in range(6)]
            return await asyncio.gather(*tasks, return_exceptions=True)

        results = engine.call(crowd())
    busy = [r for r in results if isinstance(r, Busy)]
    assert busy and len(busy) + sum(isinstance(r, tuple) for r in results) == 6


def test_whose_turn_does_not_come_in_time_is_refused(tmp_path):
    with tiny_engine(tmp_path, max_running=1, max_queue_time=0.05) as engine:

        async def crowd():
            first = asyncio.create_task(engine.answer("a0", PROMPT, 400))
            await asyncio.sleep(0.02)
            others = [asyncio.create_task(engine.answer(f"a{i}", PROMPT, 4)) for i in (1, 2)]
            return await asyncio.gather(first, *others, return_exceptions=True)

        first, *others = engine.call(crowd())
        assert engine.ask("a1", PROMPT)[1].completion_tokens > 0
    assert first[1].completion_tokens == 400
    assert [(type(refused), refused.status) for refused in others] == [(Busy, 429)] * 2
    assert all("did not come in time" in refused.message for refused in others)


def test_a_deleted_agent_is_cold_again_and_spares_what_others_share(tmp_path):
    system = random_tokens(2 * BLOCK)
    with tiny_engine(tmp_path) as engine:
        engine.ask("alice", [*system, 9, 9, 9])
        engine.ask("bob", [*system, 8, 8, 8])
        assert engine.call(engine.engine.agents.delete(AgentKey("default", "alice"))) is True
        assert engine.call(engine.engine.agents.delete(AgentKey("default", "alice"))) is False
        assert list(engine.agents()) == ["bob"]
    with tiny_engine(tmp_path) as engine:
        assert list(engine.agents()) == ["bob"]
        assert engine.ask("bob", [*system, 8, 8, 8, 7])[1].cached_tokens == 2 * BLOCK + 3
        assert engine.call(engine.engine.agents.delete(AgentKey("default", "bob"))) is True
        assert engine.engine.health()["store"]["blocks"] == 0


def test_an_agent_deleted_while_it_answers_leaves_nothing(tmp_path):
    with tiny_engine(tmp_path) as engine:

        async def race():
            answer = asyncio.create_task(engine.answer("alice", PROMPT, 60))
            await asyncio.sleep(0.05)
            await engine.engine.agents.delete(AgentKey("default", "alice"))
            return await answer

        text, _ = engine.call(race())
        assert len(text.split()) == 60
        assert engine.agents() == {}
        assert engine.engine.health()["store"]["blocks"] == 0


def test_a_flipped_bit_on_disk_is_a_counted_miss_and_the_answer_stays_right(tmp_path):
    with tiny_engine(tmp_path) as engine:
        engine.ask("alice", PROMPT)
        expected = engine.ask("alice", PROMPT)[0]
    for file in [*tmp_path.rglob("blocks/*/*.safetensors"), *tmp_path.rglob("tails/*.safetensors")]:
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
    with tiny_engine(tmp_path) as engine:
        text, stats = engine.ask("alice", PROMPT)
        assert (stats.cache, stats.cached_tokens) == ("cold", 0)
        assert text == engine.ask("bob", PROMPT)[0]
        assert engine.ask("alice", PROMPT)[0] == expected
        engine.core.store.flush().result(10)
        assert engine.engine.health()["store"]["quarantined"] > 0


def test_a_fine_tune_of_the_same_shape_never_reads_the_other_ones_cache(tmp_path):
    with tiny_engine(tmp_path, tiny_loader(seed=0)) as engine:
        engine.ask("alice", PROMPT)
    with tiny_engine(tmp_path, tiny_loader(seed=1)) as engine:
        assert engine.ask("alice", PROMPT)[1].cache == "cold"


def test_a_damaged_calibration_is_made_again_and_the_cache_still_fits(tmp_path):
    with tiny_engine(tmp_path) as engine:
        engine.ask("alice", PROMPT)
        expected = engine.ask("alice", PROMPT)[0]
    [file] = tmp_path.rglob("calibration.safetensors")
    data = bytearray(file.read_bytes())
    data[-20] ^= 4
    file.write_bytes(data)
    with tiny_engine(tmp_path) as engine:
        text, stats = engine.ask("alice", PROMPT)
    assert (text, stats.cache) == (expected, "warm")


def test_stopping_lets_running_answers_finish_and_refuses_new_ones(tmp_path):
    engine_home = tmp_path
    with tiny_engine(engine_home) as engine:

        async def stop_meanwhile():
            answer = asyncio.create_task(engine.answer("alice", PROMPT, 50))
            await asyncio.sleep(0.05)
            engine.engine.begin_drain()
            with pytest.raises(ShuttingDown):
                await engine.answer("bob", PROMPT)
            return await answer

        text, _ = engine.call(stop_meanwhile())
        assert len(text.split()) == 50


def test_after_the_grace_time_running_answers_are_cut_and_what_they_computed_is_kept(tmp_path):
    with tiny_engine(tmp_path, grace=0.1) as engine:

        async def cut():
            answer = asyncio.create_task(engine.answer("alice", PROMPT, 900))
            await asyncio.sleep(0.3)
            engine.engine.begin_drain()
            with pytest.raises(ShuttingDown):
                await answer

        engine.call(cut())
    with tiny_engine(tmp_path) as engine:
        assert engine.ask("alice", PROMPT)[1].cached_tokens == 99


def test_an_internal_failure_latches_and_every_request_hears_of_it(tmp_path):
    with tiny_engine(tmp_path) as engine:
        engine.ask("alice", PROMPT)

        def broken(*_):
            raise RuntimeError("out of paper")

        engine.engine._core.runner.decode = broken
        for _ in range(2):
            with pytest.raises(EngineFailed):
                engine.ask("alice", PROMPT)
        health = engine.engine.health()
        assert engine.engine.failed
    assert health["status"] == "failed" and "out of paper" in health["errors"][0]


def test_who_asked_for_what_met_a_bug_hears_of_the_failure(tmp_path):
    with tiny_engine(tmp_path) as engine:
        engine.ask("alice", PROMPT)

        def broken(*_):
            raise RuntimeError("out of paper")

        engine.core.write_back.note = broken
        with pytest.raises(EngineFailed):
            engine.call(
                asyncio.wait_for(engine.engine.agents.pin(AgentKey("default", "alice"), True), 5)
            )


def test_a_second_engine_on_the_same_store_is_refused(tmp_path):
    with (
        tiny_engine(tmp_path),
        pytest.raises(StoreError, match="in use by process"),
        tiny_engine(tmp_path),
    ):
        pass


def test_a_model_that_does_not_load_is_a_startup_error(tmp_path):
    def load():
        raise ModelError("no such model")

    with pytest.raises(ModelError, match="no such model"), tiny_engine(tmp_path, load):
        pass
    assert not any(t.name == "engine" and t.is_alive() for t in threading.enumerate())


def test_corrupt_segment_is_no_startup_error():
    assert not issubclass(CorruptSegment, StoreError)


def test_an_agent_whose_cache_is_not_on_disk_yet_can_be_deleted(tmp_path):
    with tiny_engine(tmp_path, tail_delay=60.0) as engine:
        engine.ask("alice", PROMPT[:10])
        assert engine.call(engine.engine.agents.delete(AgentKey("default", "alice"))) is True
        assert engine.agents() == {}
        assert engine.ask("alice", PROMPT[:10])[1].cache == "cold"


def figures(engine) -> dict[str, float]:
    lines = engine.engine.metrics().decode().splitlines()
    return {
        name: float(value)
        for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    }


def test_metrics_count_what_requests_report(tmp_path):
    with tiny_engine(tmp_path, tail_delay=0.0) as engine:
        engine.ask("alice", PROMPT, 10)
        engine.ask("alice", PROMPT, 10)
        settle(engine)
        seen = figures(engine)
    assert (
        seen['agentmem_requests_total{cache="cold"}']
        == seen['agentmem_requests_total{cache="hot"}']
        == 1
    )
    assert (seen["agentmem_prompt_tokens_total"], seen["agentmem_cached_tokens_total"]) == (200, 99)
    assert seen["agentmem_completion_tokens_total"] == 20
    assert seen["agentmem_inter_token_seconds_count"] == 18
    assert seen['agentmem_ttft_seconds_count{cache="hot"}'] == 1
    assert seen["agentmem_running_requests"] == seen["agentmem_waiting_requests"] == 0
    assert seen["agentmem_written_bytes_total"] >= seen["agentmem_disk_bytes"] > 0
    with tiny_engine(tmp_path) as engine:
        restored = engine.ask("alice", PROMPT)[1].restored_bytes
        seen = figures(engine)
    assert seen["agentmem_restored_bytes_total"] == restored > 0
    assert seen['agentmem_requests_total{cache="warm"}'] == 1


def test_sending_the_same_prompt_again_writes_nothing(tmp_path):
    with tiny_engine(tmp_path, tail_delay=0.0) as engine:
        engine.ask("alice", PROMPT)
        settle(engine)
        before = engine.engine.health()["store"]["bytes_written"]
        for _ in range(3):
            assert engine.ask("alice", PROMPT)[1].cached_tokens == 99
        engine.ask("alice", PROMPT[:70], 1)
        settle(engine)
        time.sleep(0.2)
        assert engine.engine.health()["store"]["bytes_written"] == before
        assert engine.agents()["alice"].branches == 1
