"""`agentmem bench throughput`, as a process on a tiny model, and its arithmetic."""

import tempfile
import time

import httpx
import pytest
from pytest import approx

from agentmem.bench.decode_steps import random_snapshot
from agentmem.bench.harness.paper import batch_2_of
from agentmem.bench.harness.server import Server, TimedAnswer, tokens_per_s
from agentmem.bench.harness.session import bench_session
from agentmem.bench.throughput import STATES, end_to_end_tokens_per_s
from agentmem.config import Settings
from agentmem.kvcache.block import Snapshot
from support.bench_process import result_of
from support.tiny import BLOCK, KINDS, random_tokens, tiny_runner
from support.tiny_model_dir import write_tiny_model

AGENTS, PASSES = [1, 3], 2


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    directory = tmp_path_factory.mktemp("run")
    model = write_tiny_model(directory / "tiny", max_context=4096)
    sizes = ["--batches", "1,3", "--context", 100, "--answer-tokens", 24, "--passes", PASSES]
    return result_of(directory, "throughput", model, *sizes)


def test_every_batch_has_each_state_and_a_time_for_each_agent(result):
    assert [row["agents"] for row in result["rows"]] == AGENTS
    for row in result["rows"]:
        for state in STATES:
            assert len(row[state]["end_to_end_tokens_per_s"]["values"]) == PASSES
            times = [of["ttft_ms"] for of in row[state]["ttft"]]
            assert len(times) == row["agents"] and times == sorted(times)
            assert all(len(of["values_ms"]) == PASSES for of in row[state]["ttft"])


def test_streaming_is_faster_than_the_whole_with_its_prefill(result):
    alone = result["rows"][0]["cold"]
    assert alone["tokens_per_s"]["min"] > alone["end_to_end_tokens_per_s"]["min"]


def test_as_many_run_at_once_as_were_asked_for(result):
    assert result["settings"]["max_running"] == str(AGENTS[-1])
    assert result["paper"] is None
    assert (result["context"], result["answer_tokens"], result["passes"]) == (100, 24, PASSES)


def test_decode_in_process_has_the_cases_that_the_context_holds_and_counts_bytes(result):
    rows = {row["case"]: row for row in result["in_process"]}
    assert set(rows) == {"1 x 500", "8 x 500", "4 x 1024"}  # not 4,096 tokens and an answer
    for name in ("agentmem", "batch_generator"):
        assert len(rows["1 x 500"][name]["step_ms"]["values"]) == 10 * PASSES
        assert rows["8 x 500"][name]["cache_bytes"] == 8 * rows["1 x 500"][name]["cache_bytes"]
    row = rows["8 x 500"]
    assert row["bytes_ratio"] == approx(
        row["agentmem"]["cache_bytes"] / row["batch_generator"]["cache_bytes"], abs=1e-3
    )


def test_the_table_has_a_line_for_each_batch_and_state(result):
    lines = [line.split()[:2] for line in result["shown"].splitlines()]
    assert all([str(n), state] in lines for n in AGENTS for state in STATES)


def test_where_one_of_several_requests_fails_nobody_waits_for_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, said = (
        write_tiny_model(tmp_path / "tiny", max_context=65536),
        [{"role": "user", "content": "w10 w11"}],
    )
    with (
        bench_session(print) as session,
        Server(session, Settings(), model, session.directory / "s") as server,
    ):
        with pytest.raises(ZeroDivisionError), server.threads() as pool:
            asked = pool.submit(server.ask, "agent", said, 60_000)
            time.sleep(0.5)
            pool.submit(lambda: 1 / 0).result()
        assert isinstance(asked.exception(timeout=0), httpx.HTTPError)
        assert server.process.poll() is not None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_bits", ["4", "16"])
def test_a_made_up_cache_has_the_shapes_of_a_prefilled_one(kind, kv_bits):
    runner = tiny_runner(kind, kv_bits)
    cache, length = runner.new_cache(), 3 * BLOCK + 5
    runner.prefill(cache, random_tokens(length))

    def shapes(snapshot: Snapshot) -> list[dict]:
        arrays = [*(block.arrays for block in snapshot.blocks), snapshot.tail.full]
        return [
            {n: (a.shape, a.dtype) for n, a in of.items() if not n.endswith("sinks")}
            for of in arrays
        ]

    assert shapes(random_snapshot(runner, length)) == shapes(cache.snapshot())


def answer(began: float, times: list[float], tokens: int) -> TimedAnswer:
    return TimedAnswer(began=began, times=times, usage={"completion_tokens": tokens})


def test_tokens_count_only_while_all_stream():
    a, b = answer(10.0, [1.0, 2.0, 3.0, 4.0], 4), answer(11.0, [1.0, 1.5, 2.0], 6)
    # together from 12 to 13: of a one chunk of one token, of b two of two
    assert tokens_per_s([a, b]) == approx(5.0)
    assert end_to_end_tokens_per_s([a, b]) == approx(10 / 4)


def test_no_rate_where_one_ended_before_another_began():
    assert tokens_per_s([answer(0.0, [1.0, 2.0], 2), answer(0.0, [3.0, 4.0], 2)]) is None
    assert tokens_per_s([answer(0.0, [1.0], 1)]) is None


def test_the_papers_rates_are_of_its_models():
    assert batch_2_of("mlx-community/gemma-3-12b-it-4bit") == {1024: 22.6, 4096: 19.6, 16384: 11.9}
    assert batch_2_of("mlx-community/Meta-Llama-3.1-8B-Instruct-4bit")[4096] == 34.5
    assert batch_2_of("demo") is None
