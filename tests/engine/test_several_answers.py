"""Several answers to one prompt: it is prefilled once, and each is what it would be alone."""

import asyncio
import json
import time
from dataclasses import replace

import pytest

from agentmem.agent_key import AgentKey
from agentmem.engine.api import Finished, GenerateRequest, SamplingParams, TextDelta
from agentmem.errors import ContextLengthExceeded, ShuttingDown
from support.tiny import BLOCK, KINDS, ONE_SEQUENCE, random_tokens, tiny_engine, tiny_loader
from support.zoo import zoo_loader

RECURRENT = ("qwen3_next", "recurrent_gemma")
ALICE = AgentKey("default", "alice")
PROMPT = random_tokens(5 * BLOCK + 11, seed=1)
LENGTH = BLOCK + 9  # of an answer
SEEDS = (7, 8, 9, 10)


def requests(tokens=PROMPT, max_tokens=LENGTH, n=4, **params):
    given = SamplingParams(max_tokens, **{"ignore_eos": True, **params})
    seeds = SEEDS[:n] if given.temperature else [None] * n
    return [GenerateRequest(ALICE, tokens, replace(given, seed=seed)) for seed in seeds]


async def read(events):
    """The text, the log probabilities and the figures of one answer."""
    text, told = "", []
    async for event in events:
        if isinstance(event, TextDelta):
            text += event.text
            told += event.logprobs
        elif isinstance(event, Finished):
            return text, told, event.stats
    raise AssertionError("the stream ended without Finished")


async def read_all(engine, asked):
    return await asyncio.gather(*map(read, engine.engine.generate_each(asked)))


def answers(engine, asked):
    return engine.call(read_all(engine, asked))


def counted(engine, name):
    lines = engine.engine.metrics().decode().splitlines()
    return int(sum(float(line.split()[1]) for line in lines if line.startswith(name + "_total")))


def batches(trace):
    """How many sequences each step decoded."""
    lines = [line.rstrip(",") for line in trace.read_text().splitlines()]
    events = [json.loads(line) for line in lines if line.startswith("{")]
    return [len(event["args"]["agents"]) for event in events if event["name"] == "decode"]


def loader(kind):
    return tiny_loader(kind) if kind in KINDS else zoo_loader(kind)


def wait_until_idle(engine):
    deadline = time.monotonic() + 10
    while engine.core.scheduler.active or engine.core.scheduler.waiting:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("kind", "at_once"),
    [*((kind, 1) for kind in (*KINDS, *RECURRENT)), ("llama", 8), (RECURRENT[0], 8)],
)
def test_each_answer_is_what_its_seed_gives_alone_and_the_prompt_is_prefilled_once(
    tmp_path, kind, at_once
):
    """One at a time they are equal bit for bit; in a batch a product may be rounded otherwise."""
    alone = []
    for i, request in enumerate(requests()):
        with tiny_engine(tmp_path / str(i), loader(kind)) as engine:
            alone.append(engine.call(read(engine.engine.generate(request)))[0])
    assert len(set(alone)) == 4
    with tiny_engine(tmp_path / "all", loader(kind), max_running=at_once) as engine:
        together = answers(engine, requests())
        assert [text for text, _, _ in together] == alone
        assert counted(engine, "agentmem_prefilled_tokens") == len(PROMPT) - 1
        assert counted(engine, "agentmem_prompt_tokens") == len(PROMPT)
        assert counted(engine, "agentmem_completion_tokens") == 4 * LENGTH
        assert counted(engine, "agentmem_requests") == 1
        for _, _, stats in together:
            assert (stats.prompt_tokens, stats.cached_tokens) == (len(PROMPT), 0)
            assert (stats.cache, stats.completion_tokens) == ("cold", LENGTH)
        assert engine.agents()["alice"].requests == 1


@pytest.mark.parametrize("length", [1, 2, BLOCK - 3, BLOCK, BLOCK + 1, 3 * BLOCK + 1])
def test_it_does_not_matter_where_the_prompt_ends(tmp_path, length):
    asked = requests(PROMPT[:length], max_tokens=BLOCK + 3)
    with tiny_engine(tmp_path / "alone") as engine:
        alone = [engine.call(read(engine.engine.generate(one)))[0] for one in asked[:1]]
    with tiny_engine(tmp_path / "all") as engine:
        together = answers(engine, asked)
        assert together[0][0] == alone[0] and len({text for text, _, _ in together}) == 4
        assert counted(engine, "agentmem_prefilled_tokens") == length - 1
        again = answers(engine, asked)  # now all of it is cached, perhaps as codes
        assert [stats.cached_tokens for _, _, stats in again] == [length - 1] * 4
        assert counted(engine, "agentmem_prefilled_tokens") == length - 1


def test_they_decode_in_one_batch_from_the_first_token_on(tmp_path):
    with tiny_engine(tmp_path / "home", trace=tmp_path / "trace") as engine:
        answers(engine, requests(max_tokens=6))
    assert batches(tmp_path / "trace") == [4] * 6


def test_greedy_answers_are_all_the_same(tmp_path):
    with tiny_engine(tmp_path) as engine:
        told = answers(engine, requests(temperature=0.0, frequency_penalty=1.0))
        assert len({text for text, _, _ in told}) == 1


def test_log_probabilities_of_the_prompt_are_told_with_each_answer(tmp_path):
    with tiny_engine(tmp_path) as engine:
        told = answers(engine, requests(max_tokens=3, logprobs=1, prompt_logprobs=1))
        prompts = [rows[: len(PROMPT) - 1] for _, rows, _ in told]
        assert [row.token for row in prompts[0]] == PROMPT[1:] and prompts == [prompts[0]] * 4
        assert all(len(rows) == len(PROMPT) - 1 + 3 for _, rows, _ in told)
        assert counted(engine, "agentmem_prefilled_tokens") == len(PROMPT) - 1


def test_nothing_is_answered_where_no_token_may_be(tmp_path):
    with tiny_engine(tmp_path) as engine:
        assert [text for text, _, _ in answers(engine, requests(max_tokens=0))] == [""] * 4
        [branch] = engine.core.prefix_cache.agents[ALICE].branches.values()
        assert len(branch) == len(PROMPT) - 1


@pytest.mark.parametrize("chosen", [0, 2])
def test_a_conversation_goes_on_from_any_of_the_answers(tmp_path, chosen):
    vocabulary = None
    with tiny_engine(tmp_path) as engine:
        text = answers(engine, requests(max_tokens=20))[chosen][0]
        vocabulary = engine.engine.tokenizer.get_vocab()
        tokens = [*PROMPT, *(vocabulary[word] for word in text.split())]
        _, stats = engine.ask("alice", [*tokens, *random_tokens(9, seed=2)])
        assert stats.cached_tokens == len(PROMPT) + 20 - 1
        assert len(engine.core.prefix_cache.agents[ALICE].branches) == 4


def test_with_room_for_one_they_take_turns_and_say_the_same(tmp_path):
    with tiny_engine(tmp_path / "roomy") as engine:
        wanted = [text for text, _, _ in answers(engine, requests())]
    limits = {"kv_budget": int(1.4 * ONE_SEQUENCE), "tail_delay": 0.0, "max_context": 300}
    with tiny_engine(tmp_path / "tight", trace=tmp_path / "trace", **limits) as engine:
        assert [text for text, _, _ in answers(engine, requests())] == wanted
        assert counted(engine, "agentmem_prefilled_tokens") == len(PROMPT) - 1
    assert set(batches(tmp_path / "trace")) == {1}


def test_answers_that_share_a_prompt_reserve_room_for_what_each_adds(tmp_path):
    """Never more than the budget, looked at between all steps."""
    limit = int(2.5 * ONE_SEQUENCE)
    with tiny_engine(tmp_path, kv_budget=limit, tail_delay=0.0) as engine:
        most = []
        engine.on_engine(lambda: _watch(engine.core.budget, most))
        answers(engine, requests(max_tokens=2 * BLOCK))
        assert 0 < max(most) <= limit


def _watch(budget, most):
    note = budget.note

    def noted():
        note()
        most.append(budget.noted_used)

    budget.note = noted


@pytest.mark.parametrize("when", ["unread", "prefill", "decode"])
def test_a_client_that_goes_away_cancels_them_all(tmp_path, when):
    with tiny_engine(tmp_path, max_running=2) as engine:

        async def leave():
            streams = engine.engine.generate_each(requests(max_tokens=500))
            if when == "decode":
                await anext(streams[1])
            elif when == "prefill":
                reading = asyncio.ensure_future(anext(streams[0]))
                await asyncio.sleep(0.01)
                reading.cancel()
            for stream in streams:
                await stream.aclose()

        engine.call(leave())
        wait_until_idle(engine)
        branches = engine.core.prefix_cache.agents[ALICE].branches if when == "decode" else {}
        assert not any(branch.in_use for branch in branches.values())
        assert engine.ask("bob", PROMPT)[1].completion_tokens == 8


def test_one_answer_that_nobody_wants_leaves_the_others(tmp_path):
    with tiny_engine(tmp_path / "whole") as engine:
        wanted = [text for text, _, _ in answers(engine, requests())]

    async def without(engine, left_out):
        streams = engine.engine.generate_each(requests())
        reading = [read(stream) for i, stream in enumerate(streams) if i != left_out]
        first = asyncio.gather(*reading)
        await asyncio.sleep(0)
        await streams[left_out].aclose()
        return [text for text, _, _ in await first]

    for left_out in (0, 3):
        with tiny_engine(tmp_path / str(left_out)) as engine:
            told = engine.call(without(engine, left_out))
            assert told == [text for i, text in enumerate(wanted) if i != left_out]


def test_what_refuses_the_prompt_is_told_to_all(tmp_path):
    async def refused(engine, tokens):
        streams = engine.engine.generate_each(requests(tokens))
        return await asyncio.gather(*map(read, streams), return_exceptions=True)

    with tiny_engine(tmp_path) as engine:
        told = engine.call(refused(engine, random_tokens(2000)))
        assert [type(error) for error in told] == [ContextLengthExceeded] * 4
        told = engine.call(_refused_while_waiting(engine))
        assert [type(error) for error in told] == [ShuttingDown] * 4


async def _refused_while_waiting(engine):
    """Shut the engine down before the prompt is prefilled."""
    engine.engine._post(lambda: time.sleep(0.1))
    streams = engine.engine.generate_each(requests())
    reading = asyncio.gather(*map(read, streams), return_exceptions=True)
    await asyncio.sleep(0.02)
    engine.engine.begin_drain()
    return await reading


def test_an_agent_that_is_deleted_meanwhile_stays_deleted_and_is_answered(tmp_path):
    with tiny_engine(tmp_path, max_running=1) as engine:

        async def delete_meanwhile():
            streams = engine.engine.generate_each(requests())
            await anext(streams[0])
            await engine.engine.agents.delete(ALICE)
            return await asyncio.gather(*map(read, streams))

        told = engine.call(delete_meanwhile())
        assert all(stats.completion_tokens == LENGTH for _, _, stats in told)
        wait_until_idle(engine)
        assert "alice" not in engine.agents()
