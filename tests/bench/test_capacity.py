"""`agentmem bench capacity`: its formulas against real caches and files, the paper's table, and
what it refuses.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from agentmem.bench.capacity import capacity
from agentmem.bench.footprints import (
    ModelCapacity,
    compare_with_paper,
    disk_bytes,
    footprint,
    fp16_window_bytes,
    kinds,
    rest_bytes,
    worst_rest_bytes,
)
from agentmem.bench.harness.model_config import BUILT_IN, built_in_names, read_config
from agentmem.bench.harness.paper import CONTEXTS, PAPER_TABLE
from agentmem.engine.model_runner import ModelRunner
from agentmem.errors import ModelError, StartupError
from agentmem.kvcache.batch import BatchQuantizedKVCache
from agentmem.kvcache.block import SealedBlock, Snapshot, from_host, to_host
from agentmem.kvcache.quantize import CacheSpace
from agentmem.kvcache.sequence import SequenceCache
from agentmem.kvcache.spec import KVCacheSpec
from agentmem.kvcache.spec_of_config import spec_of_config
from agentmem.store.files import segment
from agentmem.store.files.segment_file import read_file
from support import zoo
from support.tiny import BLOCK, random_tokens
from support.tiny_model_dir import write_tiny_model

K = 1024
# global; sliding with sinks; chunked; latent; recurrent with global; recurrent with sliding;
# recurrent alone
OPAQUE = "minimax_m3_vl"
TYPES = ["llama", "gpt_oss", "llama4", "deepseek_v3", "qwen3_next", "recurrent_gemma", "mamba2"]


def built_in(name: str, **options) -> KVCacheSpec:
    return spec_of_config(read_config(BUILT_IN / f"{name}.json"), **options)


# -- the paper


@pytest.mark.parametrize("row", PAPER_TABLE, ids=lambda row: row.model)
def test_the_papers_table_comes_out_of_its_rule(row):
    for cell in compare_with_paper(row, built_in(row.model)):
        assert cell.by_its_rule == cell.paper
        assert cell.agentmem >= cell.paper[1]


def test_no_single_reading_of_10_2_gb_gives_the_papers_table():
    lowest, beyond = [], []
    for row in PAPER_TABLE:
        spec = built_in(row.model)
        sizes = [footprint(spec, n) for n in CONTEXTS]
        counts = list(zip(row.fp16, (s.fp16_all_layers for s in sizes), strict=True))
        counts += zip(row.q4, (s.paper_q4 for s in sizes), strict=True)
        lowest.append(max(count * nbytes for count, nbytes in counts))
        beyond.append(min((count + 1) * nbytes for count, nbytes in counts))
        assert lowest[-1] <= row.budget < beyond[-1]
    assert max(lowest) >= min(beyond)  # else bench/harness/paper.py should have one budget


def test_the_papers_layout_of_gemma_at_32k_takes_3_4_gib_and_ours_less_than_0_75_gb():
    sizes = footprint(built_in("gemma-3-12b"), 32 * K)
    assert sizes.paper_q4 == 3.375 * 2**30
    assert sizes.agentmem == 698_613_760 < 0.75e9
    # one token before, the open block of 255 is in full precision, all layers
    assert sizes.agentmem_at_worst < 0.8e9


# -- real arrays and files


def gemma_6_layers() -> KVCacheSpec:
    """Gemma 3 12B's shape, with one layer in eight of it: five that slide over 1,024 tokens, and a
    global one.
    """
    config = read_config(BUILT_IN / "gemma-3-12b.json")
    config["text_config"]["num_hidden_layers"] = 6
    return spec_of_config(config)


def random_pass(spec: KVCacheSpec, cache: SequenceCache, num_tokens: int) -> None:
    """Random keys and values, as `num_tokens` more positions, in all layers."""
    batch = BatchQuantizedKVCache(spec, [cache])
    for view, layer in zip(batch.layers, spec.layers, strict=True):
        q, k, v = (mx.random.normal((1, 8, num_tokens, 256)).astype(spec.dtype) for _ in range(3))
        assert layer.dims == (256, 256) and layer.num_kv_heads == 8
        view.update_and_fetch(k, v)
        mx.eval(view.attend(q, 1 / 16, None))
    [fresh] = batch.advance(num_tokens)
    mx.eval([block.arrays for block in fresh], cache.arrays())


def bytes_read_so_far() -> int:
    """Count the bytes that this process read; 0 where the system does not say."""
    counters = Path("/proc/self/io")
    return int(counters.read_text().split()[1]) if counters.exists() else 0


def test_gemmas_shape_at_32k_tokens_is_restored_from_files_by_reading_what_the_formula_says(
    tmp_path,
):
    spec, position = gemma_6_layers(), 32 * K
    space = CacheSpace(spec)
    real = SequenceCache(spec, space)
    random_pass(spec, real, spec.block_size)
    random_pass(spec, real, spec.block_size)
    files = [
        segment.encode(to_host(block.arrays), {}) for block in real.blocks
    ]  # the second stands for all others
    restored, in_ram, read, parts = [], mx.get_active_memory(), 0, 0
    for index in range(position // spec.block_size):
        data, path = files[min(index, 1)], tmp_path / f"{index}.safetensors"
        header = segment.parse_header(data, len(data))
        path.write_bytes(data)
        read -= bytes_read_so_far()
        needed = spec.needed(index, position)
        tensors, _ = read_file(path, len(data), segment.checksum(data[: header.nbytes]), needed)
        read += bytes_read_so_far()
        path.unlink()
        parts += sum(tensor.nbytes for tensor in tensors.values())
        restored.append(SealedBlock(from_host(tensors)))
    expected = rest_bytes(spec, position)
    assert parts == sum(block.nbytes for block in restored) == expected
    assert mx.get_active_memory() - in_ram == pytest.approx(expected, rel=0.01)
    assert read == 0 or expected < read < 1.05 * expected  # headers on top
    assert 8 * expected == rest_bytes(built_in("gemma-3-12b"), position) < 0.75e9
    goes_on = SequenceCache(
        spec, space, Snapshot(tuple(restored)), on_codes=True
    )  # nothing that it needs is missing
    random_pass(spec, goes_on, 1)
    assert goes_on.length == position + 1


def real_bytes(runner: ModelRunner, lengths: list[int]) -> dict[int, tuple[int, int]]:
    """Return, by number of tokens, bytes of a real cache.

    They are (those that a resting agent needs, those of all that was sealed and the tail).
    """
    spec, cache, sealed, found = runner.spec, runner.new_cache(), [], {}
    tokens = random_tokens(max(lengths), seed=5)
    for n in range(1, max(lengths) + 1):
        logits, [fresh] = runner.forward(mx.array([tokens[n - 1 : n]]), [cache])
        mx.eval(logits, cache.arrays(), [block.arrays for block in fresh])
        sealed += fresh
        if n in lengths:
            snapshot = cache.snapshot()
            tail = snapshot.tail.nbytes if snapshot.tail else 0
            needed = sum(
                block.only(spec.needed(i, n)).nbytes for i, block in enumerate(snapshot.blocks)
            )
            # the state at a boundary goes to the last block when the sequence rests there
            last = [snapshot.blocks[-1]] if snapshot.blocks else []
            written = sum(block.nbytes for block in sealed[: len(sealed) - len(last)])
            added = [sealed[-1].with_arrays(last[0].arrays)] if last else []
            found[n] = needed + tail, written + tail + sum(block.nbytes for block in added)
    return found


@pytest.mark.parametrize("kv_bits", ["4", "16"])
@pytest.mark.parametrize("model_type", TYPES)
def test_the_formulas_give_the_bytes_of_a_real_cache(model_type, kv_bits):
    runner = ModelRunner(
        zoo.tiny(model_type), kv_bits=kv_bits, block_size=BLOCK, state_interval=2 * BLOCK
    )
    lengths = [
        1,
        BLOCK - 1,
        BLOCK,
        BLOCK + 1,
        2 * BLOCK,
        2 * BLOCK + 6,
        3 * BLOCK,
        3 * BLOCK + 7,
        4 * BLOCK,
    ]
    for n, (needed, written) in real_bytes(runner, lengths).items():
        assert rest_bytes(runner.spec, n) == needed, n
        assert disk_bytes(runner.spec, n) == written, n


def rest_bytes_by_loop(spec: KVCacheSpec, num_tokens: int) -> int:
    """Block by block, as KVCacheSpec.needed says."""
    size, total = spec.block_size, num_tokens % spec.block_size * spec.dense_bytes
    for index in range(-(-num_tokens // size)):
        for part in spec.needed(index, num_tokens):
            if part.startswith("@"):
                total += spec.state_bytes
            elif (index + 1) * size <= num_tokens:
                stack = spec.stacks[int(part)]
                layer = spec.layers[stack[0]]
                sinks = (
                    spec.num_sinks
                    * len(stack)
                    * layer.num_kv_heads
                    * sum(layer.dims)
                    * spec.dtype.size
                )
                total += size * spec.stack_bytes[int(part)] + (
                    sinks if index == 0 and spec.bits else 0
                )
    return total


@pytest.mark.parametrize("name", built_in_names())
def test_the_closed_form_is_the_sum_over_blocks_of_what_is_needed(name):
    for options in (
        {},
        {"kv_bits": "k5v4", "block_size": 64},
        {"kv_bits": "16", "block_size": 512},
    ):
        spec = built_in(name, **options)
        lengths = [0, 1, 127, 128, 4095, 4096, 8191, 8192, 8193, 20_000, 32 * K, 32 * K + 255]
        for n in (*lengths, *range(1000, 1600)):
            assert rest_bytes(spec, n) == rest_bytes_by_loop(spec, n), (options, n)
        if spec.needs_all_parts:
            assert rest_bytes(spec, 20_000) == disk_bytes(spec, 20_000)


def test_at_worst_is_the_most_of_a_block_or_chunk():
    for name, span in (("gemma-3-12b", 256), ("llama-4-scout", 8192)):
        spec = built_in(name)
        assert worst_rest_bytes(spec, 10_000) == max(
            rest_bytes(spec, n) for n in range(10_000 - span, 10_001)
        )
    assert worst_rest_bytes(spec, 8192) > 4 * rest_bytes(
        spec, 8192
    )  # where a chunk ends, it is let go of


@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt_oss", "qwen3_next"])
def test_fp16_with_windows_is_what_mlx_lms_own_caches_hold(model_type):
    model = zoo.tiny(model_type)
    spec = ModelRunner(model).spec
    assert spec.dtype == mx.float32
    caches, n = make_prompt_cache(model), 256  # by so many tokens mlx-lm's caches grow
    for tokens in (random_tokens(n - 1), [9]):
        mx.eval(model(mx.array([tokens]), cache=caches))
    states = spec.state_bytes
    assert sum(cache.nbytes for cache in caches) - states == 2 * (
        fp16_window_bytes(spec, n) - states
    )


# -- from a config to a spec


@pytest.mark.parametrize("model_type", TYPES)
def test_a_config_gives_the_spec_of_the_model(model_type):
    def shapes(spec: KVCacheSpec) -> list:
        return [
            replace(layer, state=tuple(shape for shape, _ in layer.state)) for layer in spec.layers
        ]

    spec = spec_of_config(zoo.config_of(model_type), kv_bits="8", block_size=BLOCK)
    real = ModelRunner(zoo.tiny(model_type), kv_bits="8", block_size=BLOCK).spec
    assert spec.layers and shapes(spec) == shapes(real)
    assert (spec.stacks, spec.bits, spec.block_size) == (real.stacks, real.bits, BLOCK)


def test_built_ins_have_the_kinds_and_layers_of_their_models():
    def kinds_of(name: str) -> dict:
        return {
            (row.kind, row.window): (
                row.layers,
                row.num_kv_heads,
                row.k_dim,
                row.v_dim,
                row.attention_sinks,
            )
            for row in kinds(built_in(name))
        }

    assert kinds_of("gemma-3-12b") == {
        ("sliding", 1024): (40, 8, 256, 256, False),
        ("global", None): (8, 8, 256, 256, False),
    }
    assert kinds_of("deepseek-coder-v2-lite") == {("global", None): (27, 16, 192, 128, False)}
    assert kinds_of("llama-3.1-8b") == {("global", None): (32, 8, 128, 128, False)}
    assert kinds_of("gpt-oss-20b") == {
        ("sliding", 128): (12, 8, 64, 64, True),
        ("global", None): (12, 8, 64, 64, True),
    }
    assert kinds_of("deepseek-v3") == {("latent", None): (61, 1, 512, 64, False)}
    assert kinds_of("llama-4-scout") == {
        ("chunked", 8192): (36, 8, 128, 128, False),
        ("global", None): (12, 8, 128, 128, False),
    }
    assert kinds_of("qwen3-next-80b-a3b") == {
        ("global", None): (12, 2, 256, 256, False),
        ("recurrent", None): (36, 0, 0, 0, False),
    }


def test_a_cache_that_only_mlx_lm_can_hold_is_said_to_be_kept_by_nobody():
    spec = spec_of_config(zoo.config_of(OPAQUE))
    row = footprint(spec, 1000)
    assert spec.opaque and row.agentmem is None and row.paper_q4 is None and row.fp16_windows > 0
    shown = ModelCapacity(OPAQUE, OPAQUE, spec, (row,)).to_json(2**30)
    assert shown["not_kept"] == spec.opaque.reason


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "nosuch"},
        {"model_type": "llama"},
        {"model_type": "llama", "hidden_size": "wide"},
        {"model_type": "gemma3"},
        {"model_type": "../etc"},
    ],
)
def test_a_config_that_is_no_models_is_refused_in_one_line(config):
    with pytest.raises(ModelError) as error:
        spec_of_config(config)
    assert "\n" not in error.value.message and config["model_type"] in error.value.message


# -- the command


def command(home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AGENTMEM_")} | {
        "HF_HUB_OFFLINE": "1"
    }
    parts = [
        sys.executable,
        "-m",
        "agentmem",
        "bench",
        "capacity",
        "--home",
        home,
        *arguments,
    ]
    return subprocess.run(
        [str(p) for p in parts], capture_output=True, text=True, env=environment, timeout=60
    )


def test_the_command_prints_and_writes_what_fits(tmp_path):
    model = write_tiny_model(tmp_path / "tiny")
    models = [model / "config.json", model, "gemma-3-12b"]
    options = ["--paper", "--contexts", "32k,4096", "--budget", "1G"]
    done = command(tmp_path, *models, *options, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    by_file, by_directory, gemma = result["models"]
    assert by_file | {"model": ""} == by_directory | {"model": ""}
    assert (result["budget_bytes"], result["kv_bits"], result["block_size"]) == (2**30, "4", 256)
    assert [row["tokens"] for row in gemma["contexts"]] == [4096, 32768]
    assert gemma["contexts"][1]["agentmem"] == {"bytes": 698_613_760, "agents": 1}
    assert (gemma["fp16_bytes_per_token"], gemma["sealed_bytes_per_token"]) == (393_216, 110_592)
    assert gemma["sealed_bytes_per_token_beyond_windows"] == 18_432
    assert [row["model"] for row in result["paper"]] == [row.model for row in PAPER_TABLE]
    assert (
        "sliding 1,024" in done.stdout
        and "698.6 MB" in done.stdout
        and "6/24 | 6/24 | " in done.stdout
    )


def test_without_a_model_the_papers_three_are_shown(tmp_path):
    done = command(tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(row.model in done.stdout for row in PAPER_TABLE) and "3/12 | 3/12" in done.stdout


def test_the_help_names_every_built_in(tmp_path):
    printed = command(tmp_path, "--help").stdout
    assert all(name in printed for name in built_in_names())


def test_a_users_fault_is_one_line_and_exit_code_2(tmp_path):
    done = command(tmp_path, "nosuch")
    assert done.returncode == 2 and not done.stdout
    assert (
        done.stderr.count("\n") == 1
        and "no such directory" in done.stderr
        and "gemma-3-12b" in done.stderr
    )


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("demo", {}, "agentmem pull demo"),
        ("broken.json", {}, "is no JSON"),
        ("list.json", {}, "names no model_type"),
        ("strange.json", {}, "strange"),
        ("directory", {}, "config.json"),
        ("gpt-oss-20b", {"budget": "much"}, "--budget: 'much' is not a size"),
        ("gpt-oss-20b", {"budget": "1e999"}, "is not a size"),
        ("gpt-oss-20b", {"budget": "0"}, "more than nothing"),
        ("gpt-oss-20b", {"contexts": "4k,0"}, "--contexts"),
        ("gpt-oss-20b", {"contexts": "4k,many"}, "--contexts"),
        ("gpt-oss-20b", {"contexts": ""}, "--contexts"),
        ("gpt-oss-20b", {"kv_bits": "3"}, "kv_bits"),
        ("gpt-oss-20b", {"json_file": Path("nosuch/out.json")}, "can't be written"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(
    tmp_path, monkeypatch, capsys, model, options, said
):
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_text("{")
    Path("list.json").write_text("[]")
    Path("strange.json").write_text('{"model_type": "strange"}')
    Path("directory").mkdir()
    with pytest.raises(StartupError) as error:
        capacity([model], home=tmp_path, **options)
    assert said in error.value.message and "\n" not in error.value.message
    assert not capsys.readouterr().out
