"""`agentmem bench staggered`, as a process on a tiny model, and its arithmetic."""

import pytest
from pytest import approx

from agentmem.bench.harness.server import TimedAnswer
from agentmem.bench.staggered import gaps_ms
from support.bench_process import result_of
from support.tiny_model_dir import write_tiny_model

CONTEXT, PASSES = 3000, 1  # long enough for some B to come meanwhile on a tiny model


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    directory = tmp_path_factory.mktemp("run")
    model = write_tiny_model(directory / "tiny", max_context=4096)  # room for a long answer of C
    return result_of(directory, "staggered", model, "--context", CONTEXT, "--passes", PASSES)


def test_the_result_says_who_waited_how_long_for_whom(result):
    meanwhile = result["meanwhile"]
    assert (
        1 <= len(meanwhile["b"]["values_ms"]) <= 5 and len(meanwhile["b_alone"]["values_ms"]) == 5
    )
    assert meanwhile["b_over_alone"] == approx(
        meanwhile["b"]["ttft_ms"] / meanwhile["b_alone"]["ttft_ms"], abs=0.01
    )
    delay = meanwhile["a_finish_ms"]["median"] / meanwhile["a_finish_without_b_ms"]["median"] - 1
    assert meanwhile["a_delay"] == approx(delay, abs=1e-3)
    for gap in (meanwhile["c_gap_ms"], meanwhile["c_gap_alone_ms"]):
        assert gap["count"] and 0 <= gap["median"] <= gap["p99"] <= gap["max"]


def test_of_a_pair_the_second_comes_two_seconds_after_the_first(result):
    pair = result["pair"]
    assert pair["wall_ms"]["min"] > 2000 + pair["second"]["min_ms"]
    assert len(pair["sequential"]["values_ms"]) == 2 * PASSES


def test_the_timeline_has_each_agent_in_order_and_c_answers_throughout(result):
    lines = {line["agent"]: line for line in result["timeline"]}
    assert list(lines) == ["C", "A", "B1", "B2", "B3", "B4", "B5"]
    asked = [line["asked_s"] for line in result["timeline"]]
    assert asked == sorted(asked) and lines["A"]["asked_s"] == 0 and lines["B1"]["asked_s"] > 0
    assert lines["C"]["tokens_s"][0] < 0 and lines["C"]["tokens_s"][-1] > lines["A"]["tokens_s"][-1]


def test_the_tables_show_both_scenes(result):
    assert "B, warm, 500 tokens: first token" in result["shown"]
    assert "first token of the second" in result["shown"]


def test_a_gap_counts_where_a_part_of_it_lies_in_between():
    c = TimedAnswer(began=10.0, times=[1.0, 2.0, 4.0, 7.0, 8.0])
    assert gaps_ms(c, 13.0, 15.0) == approx([2000, 3000])
    assert gaps_ms(c, 12.0, 14.0) == approx([2000])
