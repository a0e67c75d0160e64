"""`agentmem bench ttft, persistence, restore, write, ablation`: real servers and engines, on a tiny
model.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from agentmem.bench.harness.paper import ttft_of
from agentmem.bench.harness.session import check_room
from agentmem.bench.restore import _sources
from agentmem.bench.ttft import TtftSamples, rows
from agentmem.config import Settings
from agentmem.errors import StartupError
from support.bench_process import FAULT, result_of, run_bench, write_words
from support.tiny_model_dir import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def ttft(tmp_path_factory, model) -> dict:
    return result_of(
        tmp_path_factory.mktemp("ttft"), "ttft", model, "--contexts", "64,600", "--passes", 1
    )


def test_ttft_has_a_row_a_length_and_every_state_in_it(ttft):
    assert [row["context"] for row in ttft["rows"]] == [64, 600]
    for row in ttft["rows"]:
        assert 0.9 * row["context"] - 16 <= row["prompt_tokens"] <= row["context"]
        for state in ("cold", "warm", "hot"):
            cell = row[state]
            assert 0 < cell["min_ms"] <= cell["ttft_ms"] <= cell["max_ms"]
        assert (
            len(row["warm"]["values_ms"])
            == len(row["hot"]["values_ms"])
            == 32 * len(row["cold"]["values_ms"])
        )
        assert row["in_process"]["bare"]["ttft_ms"] > 0
        assert row["paper"] is None


def test_ttft_shows_what_it_writes(ttft):
    last = ttft["shown"].strip().splitlines()[-1].split()
    row = ttft["rows"][-1]
    assert last[:2] == ["600", f"{row['cold']['ttft_ms']:,.0f}"]


def test_ttft_on_a_model_of_the_paper_has_its_figures_beside():
    sample = TtftSamples(http={"cold": [2.0], "warm": [1.0], "hot": [1.0]}, prompt_tokens=1024)
    papers = ttft_of("mlx-community/Meta-Llama-3.1-8B-Instruct-4bit")
    assert papers is not None
    assert list(papers) == [1024, 2048, 4096, 8192, 16384]
    known, unknown = rows({1024: sample, 1000: sample}, papers)
    assert known.paper == {"cold": 2500, "warm": 260, "hot": 412}
    assert unknown.paper is None
    assert ttft_of("mlx-community/gemma-3-12b-it-4bit")[32768] == {
        "cold": 172096,
        "warm": 1819,
        "hot": 1264,
    }
    assert ttft_of("demo") is None


def test_persistence_loses_nothing_by_a_stop_and_less_than_a_block_by_a_kill(tmp_path, model):
    result = result_of(tmp_path, "persistence", model, "--context", 600, "--passes", 1)
    rows = {row["ending"]: row for row in result["rows"]}
    assert rows["stop"]["lost_tokens"]["max"] == 0
    assert 0 <= rows["kill after rest"]["lost_tokens"]["max"] < 256
    assert (
        rows["kill at once"]["lost_tokens"]["max"] >= rows["kill after rest"]["lost_tokens"]["max"]
    )
    for row in rows.values():
        assert (
            row["cached_tokens"]["median"] + row["lost_tokens"]["median"]
            == row["prompt_tokens"] - 1
        )
        assert row["same_answers"]


def test_restore_counts_the_bytes_of_the_files_of_one_agent_and_of_all(tmp_path, model):
    result = result_of(tmp_path, "restore", model, "--tokens", 600, "--agents", 3, "--passes", 2)
    sources = ["system's cache", "disk"] if sys.platform == "linux" else ["system's cache"]
    assert [(row["source"], row["agents"]) for row in result["rows"]] == [
        (s, n) for s in sources for n in (1, 3)
    ]
    one, three = result["rows"][:2]
    assert (one["files"], three["files"]) == (3, 9)
    assert three["bytes"] == pytest.approx(3 * one["bytes"], rel=0.01)
    assert one["restore_bytes_per_s"] == pytest.approx(
        one["bytes"] / one["restore_ms"]["median"] * 1e3, rel=0.01
    )
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
    assert components == {
        "persistence",
        "quantization",
        "rotation",
        "batching",
        "splice",
        "overlap",
    }
    assert rows["quantization", "RAM of an agent at rest"]["off_over_on"] > 1.5
    assert rows["splice", "tokens prefilled twice in 6 turns"]["on"]["max"] == 0
    assert rows["batching", "first token of the last of 4"]["off_over_on"] > 1
    kl = rows["rotation", "KL divergence from 16 bits"]
    assert 0 < kl["on"]["median"] != kl["off"]["median"] > 0


def test_a_corpus_without_enough_text_is_one_line(tmp_path, model):
    for text, message in (("", "no text in it"), ("w10", "take another")):
        corpus = tmp_path / "corpus.txt"
        corpus.write_text(text)
        done = run_bench(
            tmp_path, "restore", "--model", model, "--home", tmp_path, "--corpus", corpus
        )
        assert (done.returncode, len(done.stderr.strip().splitlines())) == (FAULT, 1)
        assert message in done.stderr


def test_a_model_without_a_chat_template_is_one_line(tmp_path, model):
    plain = shutil.copytree(model, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    done = run_bench(tmp_path, "ttft", "--contexts", 64, "--model", plain, "--home", tmp_path)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (FAULT, 1)
    assert "no chat template" in done.stderr


def test_a_result_that_can_not_be_written_is_not_lost(tmp_path, model):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    inputs = ("--model", model, "--home", tmp_path, "--corpus", write_words(tmp_path / "words.txt"))
    done = run_bench(
        tmp_path, "write", "--turns", 2, "--tokens", 64, *inputs, "--json", "/dev/full"
    )
    said = done.stderr.strip().splitlines()
    if "not a quiet run" in said[0]:  # the machine may be busy
        del said[0]
    assert (done.returncode, len(said)) == (FAULT, 1)
    assert "/dev/full: " in said[0]
    assert len(json.loads(done.stdout)["rows"]) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="a file system in RAM at a known place")
def test_restore_has_no_figure_of_a_disk_where_its_directory_is_in_ram(tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        assert _sources(Path(directory)) == ("system's cache",)


def test_a_disk_without_room_is_said_before_anything_is_measured():
    with pytest.raises(StartupError, match=r"GB free, a benchmark wants 1,000,001\.0"):
        check_room(Settings(store_min_free=10**15))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ttft", "--contexts", "1k,x"), "write whole numbers"),
        (("ttft", "--contexts", "infk"), "write whole numbers"),
        (("ttft", "--plot", "picture.doc"), "must end in .png, .svg or .pdf"),
        (("write", "--tokens", "1000000"), "more than the model's context"),
        (("ablation", "--context", "256"), "longer than a block, 256 tokens"),
        (("ttft", "--contexts", "1000000"), "more than the model's context"),
        (("ttft", "--contexts", "8"), "too few"),
        (("ttft", "--json", "/nowhere/x.json"), "is no directory"),
        (("ablation", "--components", "magic"), "choose from persistence"),
    ],
)
def test_a_wrong_argument_is_one_line_that_says_what_is_right(
    tmp_path, model, refused, arguments, message
):
    assert message in refused(*arguments, "--model", model, "--home", tmp_path)
