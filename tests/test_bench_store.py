"""`agentmem bench ttft, persistence, restore, write, ablation`: real servers and engines, on a tiny model."""

import sys
from pathlib import Path

import pytest
from bench_process import result_of
from tiny_model_dir import write_tiny_model

from agentmem.bench.paper import ttft_of
from agentmem.bench.ttft import Samples, rows


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def ttft(tmp_path_factory, model) -> dict:
    return result_of(tmp_path_factory.mktemp("ttft"), "ttft", model, "--contexts", "64,600", "--passes", 1)


def test_ttft_has_a_row_a_length_and_every_state_in_it(ttft):
    assert [row["context"] for row in ttft["rows"]] == [64, 600]
    for row in ttft["rows"]:
        assert 0.9 * row["context"] - 16 <= row["prompt_tokens"] <= row["context"]
        for state in ("cold", "warm", "hot"):
            cell = row[state]
            assert 0 < cell["min_ms"] <= cell["ttft_ms"] <= cell["max_ms"]
        assert len(row["warm"]["values_ms"]) == len(row["hot"]["values_ms"]) == 5 * len(row["cold"]["values_ms"])
        assert row["in_process"]["bare"]["ttft_ms"] > 0
        assert row["paper"] is None


def test_ttft_shows_what_it_writes(ttft):
    last = ttft["shown"].strip().splitlines()[-1].split()
    row = ttft["rows"][-1]
    assert last[:2] == ["600", f"{row['cold']['ttft_ms']:,.0f}"]


def test_ttft_on_a_model_of_the_paper_has_its_figures_beside():
    sample = Samples(http={"cold": [2.0], "warm": [1.0], "hot": [1.0]}, prompt_tokens=1024)
    papers = ttft_of("mlx-community/Meta-Llama-3.1-8B-Instruct-4bit")
    assert papers is not None
    assert list(papers) == [1024, 2048, 4096, 8192, 16384]
    known, unknown = rows({1024: sample, 1000: sample}, papers)
    assert known.paper == {"cold": 2500, "warm": 260, "hot": 412}
    assert unknown.paper is None
    assert ttft_of("mlx-community/gemma-3-12b-it-4bit")[32768] == {"cold": 172096, "warm": 1819, "hot": 1264}
    assert ttft_of("demo") is None


def test_persistence_loses_nothing_by_a_stop_and_less_than_a_block_by_a_kill(tmp_path, model):
    result = result_of(tmp_path, "persistence", model, "--context", 600, "--passes", 1)
    rows = {row["ending"]: row for row in result["rows"]}
    assert rows["stop"]["lost_tokens"]["max"] == 0
    assert 0 <= rows["kill after rest"]["lost_tokens"]["max"] < 256
    assert rows["kill at once"]["lost_tokens"]["max"] >= rows["kill after rest"]["lost_tokens"]["max"]
    for row in rows.values():
        assert row["cached_tokens"]["median"] + row["lost_tokens"]["median"] == row["prompt_tokens"] - 1
        assert row["same_answers"]


def test_restore_counts_the_bytes_of_the_files_of_one_agent_and_of_all(tmp_path, model):
    result = result_of(tmp_path, "restore", model, "--tokens", 600, "--agents", 3, "--passes", 2)
    sources = ["system's cache", "disk"] if sys.platform == "linux" else ["system's cache"]
    assert [(row["source"], row["agents"]) for row in result["rows"]] == [(s, n) for s in sources for n in (1, 3)]
    one, three = result["rows"][:2]
    assert (one["files"], three["files"]) == (3, 9)
    assert three["bytes"] == pytest.approx(3 * one["bytes"], rel=0.01)
    assert one["restore_bytes_per_s"] == pytest.approx(one["bytes"] / one["restore_ms"]["median"] * 1e3, rel=0.01)
    assert result["fork_ms"]["min"] > 0


def test_write_tells_what_each_turn_wrote_and_what_is_left(tmp_path, model):
    result = result_of(tmp_path, "write", model, "--turns", 6, "--tokens", 900)
    assert [row["turn"] for row in result["rows"]] == [1, 2, 3, 4, 5, 6]
    assert sum(row["tokens"] for row in result["rows"]) == result["tokens"]
    assert result["written_bytes"] >= sum(row["bytes"] for row in result["rows"])
    assert 1 <= result["amplification"] < 1.3
    if sys.platform == "linux":
        assert result["process_bytes"] > 0


def test_ablation_measures_the_same_with_each_component_and_without(tmp_path, model):
    result = result_of(tmp_path, "ablation", model, "--context", 512, "--passes", 1)
    rows = {(row["component"], row["measure"]): row for row in result["rows"]}
    components = {component for component, _ in rows}
    assert components == {"persistence", "quantization", "rotation", "batching", "splice", "overlap"}
    assert rows["quantization", "RAM of an agent at rest"]["off_over_on"] > 1.5
    assert rows["splice", "tokens prefilled twice in 6 turns"]["on"]["max"] == 0
    assert rows["batching", "first token of the last of 4"]["off_over_on"] > 1
    kl = rows["rotation", "KL divergence from 16 bits"]
    assert 0 < kl["on"]["median"] != kl["off"]["median"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ttft", "--contexts", "1k,x"), "write whole numbers"),
        (("ttft", "--contexts", "1000000"), "more than the model's context"),
        (("ttft", "--contexts", "8"), "too few"),
        (("ttft", "--json", "/nowhere/x.json"), "is no directory"),
        (("ablation", "--components", "magic"), "choose from persistence"),
    ],
)
def test_a_wrong_argument_is_one_line_that_says_what_is_right(tmp_path, model, refused, arguments, message):
    assert message in refused(*arguments, "--model", model, "--home", tmp_path)
