"""`agentmem bench perplexity`, as a process on a tiny model, and its arithmetic."""

import json
import math
import subprocess
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models import llama
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    make_prompt_cache,
)

from agentmem.bench.harness.corpus import Windows, cut_windows
from agentmem.bench.perplexity_scores import (
    Score,
    delta_percent,
    log_probabilities,
    score,
    student_t,
)
from agentmem.bench.plain_cache import plain_cache
from agentmem.errors import ModelError, StartupError
from support import tiny
from support.bench_process import run_bench
from support.tiny import BLOCK, VOCAB, random_tokens, tiny_model
from support.tiny_model_dir import write_tiny_model

WINDOW, STRIDE, TOKENS = 128, 64, 250
ROWS = ["16", "8", "k5v4", "4", "plain4"]
FIELDS = [
    "kv_bits",
    "ppl",
    "delta_percent",
    "delta_ci95_percent",
    "kl",
    "top1",
    "bytes_per_token",
    "ratio_to_fp16",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "words.txt"
    path.write_text(" ".join(f"w{token}" for token in random_tokens(600, seed=3)))
    return path


def bench(home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run_bench(home, "perplexity", "--home", home, *arguments)


def small(model: Path, corpus: Path) -> list[object]:
    sizes = ["--window", WINDOW, "--stride", STRIDE, "--tokens", TOKENS, "--block-size", BLOCK]
    return ["--model", model, "--corpus", corpus, *sizes]


@pytest.fixture(scope="module")
def result(model, corpus, tmp_path_factory) -> dict:
    """The result of one run, and what it printed."""
    directory = tmp_path_factory.mktemp("run")
    done = bench(directory, *small(model, corpus), "--json", directory / "result.json")
    assert done.returncode == 0, done.stderr
    return json.loads((directory / "result.json").read_text()) | {"printed": done.stdout}


def test_the_result_has_a_row_for_each_preset_and_says_what_was_measured(result, model, corpus):
    printed = result.pop("printed")
    assert [row["kv_bits"] for row in result["presets"]] == ROWS
    assert all(set(row) == set(FIELDS) for row in result["presets"])
    assert set(result) == {
        "benchmark",
        "presets",
        "machine",
        "model",
        "corpus",
        "window",
        "stride",
        "tokens",
        "date",
    }
    assert (result["model"], result["corpus"]) == (str(model), corpus.name)
    assert (result["window"], result["stride"], result["tokens"]) == (WINDOW, STRIDE, 128 + 2 * 64)
    assert [line.split()[0] for line in printed.splitlines()[2:]] == ROWS
    result["printed"] = printed


def test_16_bits_differ_in_nothing_from_themselves_and_fewer_bits_differ_more(result):
    rows = {row["kv_bits"]: row for row in result["presets"]}
    assert rows["16"]["delta_percent"] == rows["16"]["kl"] == 0 and rows["16"]["top1"] == 1
    assert 0 < rows["8"]["kl"] < rows["k5v4"]["kl"] < rows["4"]["kl"] < rows["plain4"]["kl"]
    for name in ROWS[1:]:
        low, high = rows[name]["delta_ci95_percent"]
        assert low < rows[name]["delta_percent"] < high
        assert rows[name]["ppl"] == pytest.approx(
            rows["16"]["ppl"] * (1 + rows[name]["delta_percent"] / 100)
        )


def test_bytes_a_token_are_those_of_codes_and_scales(result):
    ratios = {row["kv_bits"]: row["ratio_to_fp16"] for row in result["presets"]}
    assert ratios == {"16": 1.0, "8": 0.53125, "k5v4": 0.3125, "4": 0.28125, "plain4": 0.28125}
    assert (
        result["presets"][0]["bytes_per_token"] == 2 * 2 * 2 * 64 * 2
    )  # layers, heads, keys and values, dim, bytes


def naive_nll(tokens: list[int], windows: list[tuple[int, int]]) -> float:
    """Mean over (start of a window, first scored position in it), by mlx-lm's own caches."""
    model, losses = tiny_model(), []
    for start, first in windows:
        part = mx.array(tokens[start : start + WINDOW + 1])
        logits = model(part[None, :-1], cache=make_prompt_cache(model))[0]
        log_probs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        losses += [-log_probs[i, part[i + 1]].item() for i in range(first, WINDOW)]
    return sum(losses) / len(losses)


def test_perplexity_of_16_bits_is_that_of_mlx_lms_own_cache(result):
    nll = naive_nll(
        random_tokens(600, seed=3),
        [(0, 0), (STRIDE, WINDOW - STRIDE), (2 * STRIDE, WINDOW - STRIDE)],
    )
    assert result["presets"][0]["ppl"] == pytest.approx(math.exp(nll), rel=1e-5)


@pytest.mark.parametrize("bos", [[], [7]])
@pytest.mark.parametrize(
    "window, stride, tokens", [(8, 8, 20), (8, 4, 21), (8, 3, 8), (8, 1, 12), (512, 256, 7935)]
)
def test_each_token_is_scored_once_and_from_the_tokens_before_it(window, stride, tokens, bos):
    protocol, corpus = Windows(window, stride, tokens), list(range(100, 9000))
    scored = []
    for w in cut_windows(corpus, protocol, bos):
        assert len(w.inputs) == len(w.targets) == window
        assert w.inputs[1:] == w.targets[:-1] and w.inputs[: len(bos)] == bos
        scored += w.targets[w.first_scored :]
    assert scored == corpus[1 - len(bos) :][: len(scored)]
    assert tokens <= len(scored) == protocol.num_scored < tokens + max(stride, window - tokens + 1)


def test_windows_need_a_corpus_that_is_long_enough():
    protocol = Windows(8, 4, 12)
    assert len(list(cut_windows(list(range(13)), protocol, []))) == 2
    with pytest.raises(StartupError, match="has 12 tokens, 13 are needed"):
        list(cut_windows(list(range(12)), protocol, []))


def test_divergence_and_agreement_of_two_known_distributions():
    one, other = (
        log_probabilities(mx.log(mx.array([p]))) for p in ([0.5, 0.3, 0.2], [0.2, 0.3, 0.5])
    )
    assert score(one, one, [1]) == Score(1, pytest.approx(-math.log(0.3)), 0.0, 1)
    assert score(one, other, [0]) == Score(
        1, pytest.approx(-math.log(0.2)), pytest.approx(0.3 * math.log(2.5)), 0
    )


def test_the_interval_is_students_t_over_windows():
    reference = [Score(10, nll=20.0)] * 4
    scores = [Score(10, nll=20.0 + 10 * d) for d in (0.01, 0.02, 0.03, 0.04)]
    change, (low, high) = delta_percent(reference, scores)
    error = 3.182 * math.sqrt(
        5 / 3 * 1e-4 / 4
    )  # the standard deviation of 0.01 ... 0.04 over the root of their number
    assert change == pytest.approx(100 * math.expm1(0.025))
    assert (low, high) == pytest.approx(
        (100 * math.expm1(0.025 - error), 100 * math.expm1(0.025 + error))
    )
    assert delta_percent(reference[:1], scores[:1])[1] is None
    assert student_t(20) == pytest.approx(2.086, abs=2e-3) and student_t(10**6) == pytest.approx(
        1.960, abs=1e-3
    )


def test_plain_4_bits_are_mlx_lms_quantized_cache():
    model, tokens = tiny_model(), mx.array([random_tokens(96)])
    theirs = [QuantizedKVCache(group_size=64, bits=4) for _ in model.layers]
    ours = plain_cache(model)
    for part in (tokens[:, :40], tokens[:, 40:]):
        assert mx.allclose(model(part, cache=ours), model(part, cache=theirs), atol=1e-4)


def test_recurrent_state_stays_what_it_is_in_the_plain_cache_and_alone_is_no_row():
    class Model:
        def __init__(self, *caches):
            self.make_cache = lambda: list(caches)

    state = ArraysCache(2)
    first, (second, latent) = plain_cache(Model(state, CacheList(state, KVCache())))
    assert first is second is state and type(latent) is not KVCache
    for caches in ([state], [KVCache(), ChunkedKVCache(8)]):
        with pytest.raises(ModelError, match="mlx-lm"):
            plain_cache(Model(*caches))


def test_layers_that_slide_have_all_rows_too(corpus, tmp_path):
    model = write_tiny_model(tmp_path / "sliding", "gemma3")
    done = bench(
        tmp_path, *small(model, corpus), "--kv-bits", "plain4,4", "--json", tmp_path / "result.json"
    )
    assert done.returncode == 0, done.stderr
    rows = {
        row["kv_bits"]: row for row in json.loads((tmp_path / "result.json").read_text())["presets"]
    }
    assert list(rows) == ["16", "4", "plain4"] and 0 < rows["4"]["kl"] < rows["plain4"]["kl"]


def test_a_row_that_can_not_be_measured_says_why(corpus, tmp_path, monkeypatch):
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "vocab_size": VOCAB,
    }
    narrow = llama.ModelArgs("llama", num_hidden_layers=1, head_dim=32, rms_norm_eps=1e-5, **sizes)
    monkeypatch.setitem(tiny._MAKE, "narrow", lambda: llama.Model(narrow))
    model = write_tiny_model(tmp_path / "narrow", "narrow")
    done = bench(tmp_path, *small(model, corpus), "--json", tmp_path / "result.json")
    assert done.returncode == 0, done.stderr
    *measured, last = json.loads((tmp_path / "result.json").read_text())["presets"]
    assert (
        last["kv_bits"] == "plain4"
        and last["ppl"] is None
        and "no multiple of 64" in last["unavailable"]
    )
    assert last["unavailable"] in done.stdout and all(row["ppl"] > 0 for row in measured)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--kv-bits", "4,3"), "--kv-bits 3: not known; choose from 16,8,k5v4,k5v3,4,plain4"),
        (("--stride", "129"), "--stride must be from 1 to --window (128), is 129"),
        (("--stride", "0"), "--stride must be from 1 to --window (128), is 0"),
        (("--window", "1", "--stride", "1"), "--window must be at least 2 tokens"),
        (("--window", "2048"), "more than the model's context of 1024 tokens"),
        (("--tokens", "0"), "--tokens must be at least 1"),
        (("--tokens", "9000"), "the corpus has 600 tokens"),
        (("--corpus", "/nowhere.txt"), "/nowhere.txt: No such file"),
        (("--model", "demo"), "agentmem pull demo"),
        (("--json", "/nowhere/x.json"), "/nowhere/x.json: can't be written"),
    ],
)
def test_a_wrong_argument_is_one_line_that_says_what_is_right(
    arguments, message, model, corpus, tmp_path, refused
):
    assert message in refused("perplexity", "--home", tmp_path, *small(model, corpus), *arguments)


def test_a_plot_is_drawn(model, corpus, tmp_path):
    picture = tmp_path / "plot.png"
    done = bench(tmp_path, *small(model, corpus), "--kv-bits", "4", "--plot", picture)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
