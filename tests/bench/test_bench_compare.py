"""`agentmem bench compare`, as a process: agentmem beside mlx_lm.server on a tiny model, and its
arithmetic.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_config, quantize_model, save_config, save_model
from mlx_lm.utils import load_model as load_mlx_model

from agentmem.bench.compare import ROUNDS, STATES, rate_side_by_side
from agentmem.bench.compare_rows import decode_rows
from agentmem.bench.harness.contenders import check_names
from agentmem.bench.harness.float32 import write_float32
from agentmem.bench.harness.server import BenchError, TimedAnswer
from agentmem.errors import StartupError
from support.tiny import random_tokens, tiny_model
from support.tiny_model_dir import write_tiny_model

CONTEXT, BLOCK = 100, 32


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def result(model, tmp_path_factory) -> dict:
    """The result of one run, what it printed, and what it left behind."""
    directory = tmp_path_factory.mktemp("run")
    (directory / "words.txt").write_text(
        " ".join(f"w{token}" for token in random_tokens(600, seed=3))
    )
    (directory / "tmp").mkdir()
    (directory / "config.toml").write_text(f"block_size = {BLOCK}\n")
    command = [
        sys.executable,
        "-m",
        "agentmem",
        "bench",
        "compare",
        "agentmem",
        "mlx-lm",
        "--passes",
        1,
    ]
    command += [
        "--contexts",
        CONTEXT,
        "--batches",
        1,
        "--decode-contexts",
        "64,96",
        "--answer-tokens",
        32,
    ]
    command += ["--model", model, "--corpus", directory / "words.txt", "--home", directory / "home"]
    command += ["--config", directory / "config.toml", "--json", directory / "result.json"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AGENTMEM_")}
    environment["TMPDIR"] = str(directory / "tmp")  # another benchmark may run on this machine
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    left = [path.name for path in (directory / "tmp").iterdir() if path.suffix != ".lock"]
    return json.loads((directory / "result.json").read_text()) | {
        "printed": done.stdout,
        "left": left,
    }


def rows(result: dict) -> tuple[dict, dict]:
    ours, theirs = result["rows"]
    assert (ours["server"], theirs["server"]) == ("agentmem", "mlx-lm")
    return ours, theirs


def test_both_servers_answer_the_same_prompts_in_every_state(result):
    for row in rows(result):
        assert row["context"] == CONTEXT
        assert all(
            len(row[state]["values_ms"]) == 1 and row[state]["ttft_ms"] > 0 for state in STATES
        )
    ours, theirs = rows(result)
    assert ours["prompt_tokens"]["cold"] == theirs["prompt_tokens"]["cold"]
    assert CONTEXT - 8 < ours["prompt_tokens"]["cold"][0] <= CONTEXT
    for row in rows(result):
        counts = [row["prompt_tokens"][state][0] for state in STATES]
        assert counts[0] < counts[1] == counts[2] < counts[3]


def test_what_was_cached_is_what_the_state_says(result):
    ours, theirs = rows(result)
    prompts = ours["prompt_tokens"]
    assert ours["cached_tokens"]["cold"] == theirs["cached_tokens"]["cold"] == [0]
    assert ours["cached_tokens"]["second_turn"][0] >= prompts["cold"][0]
    assert theirs["cached_tokens"]["second_turn"][0] >= theirs["prompt_tokens"]["cold"][0]
    assert ours["cached_tokens"]["after_restart"][0] == prompts["after_restart"][0] - 1
    assert ours["cached_tokens"]["resumed"][0] >= prompts["after_restart"][0]
    assert theirs["cached_tokens"]["after_restart"] == theirs["cached_tokens"]["resumed"] == [0]


def test_ratios_are_of_pairs_and_of_others_alone(result):
    ours, theirs = rows(result)
    assert ours["agentmem_over"] is None
    for state in STATES:
        pairs = zip(ours[state]["values_ms"], theirs[state]["values_ms"], strict=True)
        assert theirs["agentmem_over"][state]["values"] == pytest.approx(
            [a / b for a, b in pairs], rel=0.01
        )


def test_decode_has_a_row_for_each_context_and_batch_with_every_round(result):
    cells = [(row["context"], row["batch"], row["server"]) for row in result["decode"]]
    assert cells == [(n, 1, server) for n in (64, 96) for server in ("agentmem", "mlx-lm")]
    for ours, theirs in (result["decode"][:2], result["decode"][2:]):
        assert len(ours["tokens_per_s"]["values"]) == ROUNDS and ours["agentmem_over"] is None
        over = theirs["agentmem_over"]
        assert over["min"] <= over["median"] <= over["max"] and len(over["values"]) == ROUNDS
        assert (
            f"decode, 1 at once over {ours['context']} tokens each, tokens/s" in result["printed"]
        )
        assert f"{over['median']:.3f}x" in result["printed"]


def test_the_ratio_of_decoding_does_not_move_with_a_machine_that_slows_down_for_both():
    ours, theirs = [40.0, 20.0, 44.0, 22.0, 10.0], [20.0, 10.0, 22.0, 11.0, 20.0]
    first, second = decode_rows({("agentmem", 256, 4): ours, ("mlx-lm", 256, 4): theirs})
    assert first.tokens_per_s.median / second.tokens_per_s.median < 1.2
    assert (second.agentmem_over.median, second.agentmem_over.min, second.agentmem_over.max) == (
        2.0,
        0.5,
        2.0,
    )
    assert second.agentmem_over.values == [2.0, 2.0, 2.0, 2.0, 0.5]


def test_a_server_without_agentmem_beside_it_has_no_ratio():
    [row] = decode_rows({("mlx-lm", 256, 1): [1.0, 2.0]})
    assert row.agentmem_over is None


def test_a_sealed_token_takes_nine_32nds_of_its_size_in_16_bits(result):
    ours, theirs = result["cache"]
    dense = 2 * 2 * 2 * 64 * 2  # layers, heads, keys and values, dim, bytes
    sinks = 4 * dense * 2  # in float32
    held = (ours["sealed_bytes_per_token"] - dense * 9 / 32) * 5 * BLOCK
    assert result["fp16_bytes_per_token"] == dense
    assert held == pytest.approx(sinks, rel=0.5)
    assert ours["sealed_bytes_per_token"] < ours["bytes_per_token"] < 2 * dense
    assert theirs["bytes_per_token"] == 2 * dense and theirs["source"].startswith("computed")


def test_the_result_says_what_was_done_for_mlx_lm_and_leaves_nothing_running(result):
    ours, theirs = result["servers"]
    assert ours["weights"] == theirs["weights"] and "float32" in ours["weights"]
    assert "BLAS" in theirs["preparation"] and theirs["what"].startswith("mlx_lm.server ")
    assert "agentmem/mlx-lm" in result["printed"]
    assert result["left"] == []


def test_the_float32_copy_is_the_quantized_model_dequantized(tmp_path):
    source = write_tiny_model(tmp_path / "source")
    quantized, config = quantize_model(tiny_model(), load_config(source), group_size=32, bits=4)
    save_model(source, quantized)
    save_config(config, source / "config.json")
    copy = write_float32(source, tmp_path, tmp_path / "copy")
    assert "quantization" not in load_config(copy)
    assert {path.name for path in copy.iterdir()} == {path.name for path in source.iterdir()}
    tokens = mx.array([random_tokens(16)])
    before, after = (load_mlx_model(path)[0] for path in (source, copy))
    assert all(w.dtype == mx.float32 for _, w in tree_flatten(after.parameters()))
    assert mx.allclose(before(tokens), after(tokens), atol=1e-3)


def answer(began: float, times: list[float], tokens: int) -> TimedAnswer:
    return TimedAnswer(began=began, times=times, usage={"completion_tokens": tokens})


def test_tokens_count_only_while_all_stream_and_a_chunk_counts_for_its_tokens():
    first = answer(10.0, [1.0, 2.0, 3.0, 4.0], 4)  # until 14
    second = answer(11.0, [1.0, 2.0, 3.0, 4.0], 8)  # from 12, two tokens a chunk
    assert rate_side_by_side([first]) == 1.0
    assert rate_side_by_side([first, second]) == pytest.approx((2 * 1 + 2 * 2) / 2)


def test_answers_that_hardly_overlapped_give_no_figure():
    with pytest.raises(BenchError, match="streamed beside all others"):
        rate_side_by_side([answer(0.0, [1.0, 2.0, 3.0], 3), answer(1.9, [1.0, 2.0, 3.0], 3)])


@pytest.mark.parametrize(
    "names, problem",
    [
        (["agentmem", "mlxlm"], "mlxlm: name agentmem"),
        (["agentmem", "agentmem=http://localhost:1/v1"], "a name of its own"),
        (["llama.cpp"], "--gguf"),
    ],
)
def test_servers_that_can_not_be_started_are_refused_before_any_work(names, problem):
    with pytest.raises(StartupError, match=problem):
        check_names(names, None)
