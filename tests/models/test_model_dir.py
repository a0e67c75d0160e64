"""A tiny real model on disk, whole and broken in every way that a copy or a download can break."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs
from tokenizers import Tokenizer, models

from agentmem.errors import ModelError
from agentmem.models.loading import load_model
from agentmem.models.model_dir import DEFAULT_MAX_CONTEXT, max_context, read_model_dir
from agentmem.models.weights_hash import weights_hash

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 96,
    "max_position_embeddings": 512,
    "eos_token_id": 0,
    "quantization": {"group_size": 32, "bits": 4},
}


@pytest.fixture
def model_dir(tmp_path) -> Path:
    path = tmp_path / "tiny"
    path.mkdir()
    model = Model(ModelArgs.from_dict(CONFIG))
    model.set_dtype(mx.float16)
    nn.quantize(model, group_size=32, bits=4)
    mx.save_safetensors(
        str(path / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"}
    )
    (path / "config.json").write_text(json.dumps(CONFIG))
    vocabulary = {chr(32 + i): i for i in range(96)}
    Tokenizer(models.BPE(vocab=vocabulary, merges=[])).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": " "}'
    )
    return path


def test_a_whole_model_loads_and_runs(model_dir, tmp_path):
    loaded = load_model(str(model_dir), tmp_path)
    assert loaded.model(mx.array([[1, 2, 3]])).shape == (1, 3, 96)
    assert (loaded.max_context, loaded.tokenizer.encode("AB"), loaded.path) == (
        512,
        [33, 34],
        model_dir,
    )
    if mx.default_device() == mx.Device(mx.cpu):
        assert {v.dtype for _, v in tree_flatten(loaded.model.parameters())} == {mx.float32}


def test_a_model_under_the_home_is_found_by_its_plain_name(model_dir, tmp_path):
    (tmp_path / "models").mkdir()
    model_dir.rename(tmp_path / "models" / "tiny")
    assert load_model("tiny", tmp_path).max_context == 512


def test_parameters_and_dtype_are_read_off_the_headers(model_dir):
    found = read_model_dir(model_dir)
    unquantized = sum(
        v.size for _, v in tree_flatten(Model(ModelArgs.from_dict(CONFIG)).parameters())
    )
    assert (found.parameters, found.dtype, found.model_type) == (unquantized, "F16, 4-bit", "llama")


def edit_config(**changes) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        kept = {k: v for k, v in (CONFIG | changes).items() if v is not None}
        (path / "config.json").write_text(json.dumps(kept))

    return edit


def cut_weights(size: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path / "model.safetensors", size)


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda path: (path / name).write_text(text) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


BREAK = {
    "no directory": (shutil.rmtree, "no such directory"),
    "no config": (remove("config.json"), "config.json"),
    "config is no JSON": (write("config.json", "{"), "config.json"),
    "config is a list": (write("config.json", "[1]"), "model_type"),
    "config without a type": (edit_config(model_type=None), "model_type"),
    "unknown type": (edit_config(model_type="perceptron9"), "perceptron9"),
    "a type that is a path": (edit_config(model_type="../x"), "not supported"),
    "config lacks a size": (edit_config(hidden_size=None), "hidden_size"),
    "config of another shape": (edit_config(intermediate_size=256), "can't be loaded"),
    "config with a number for a text": (edit_config(hidden_act=3), "can't be loaded"),
    "config with more layers": (edit_config(num_hidden_layers=3), "can't be loaded"),
    "no weights": (remove("model.safetensors"), "model.safetensors is missing"),
    "weights cut by a byte": (
        lambda path: cut_weights((path / "model.safetensors").stat().st_size - 1)(path),
        "bytes",
    ),
    "weights cut in the header": (cut_weights(100), "broken"),
    "weights empty": (cut_weights(0), "broken"),
    "weights are a git-lfs pointer": (
        write("model.safetensors", "version https://git-lfs"),
        "broken",
    ),
    "a shard is missing": (
        write("model.safetensors.index.json", '{"weight_map": {"a": "model-00002.safetensors"}}'),
        "model-00002.safetensors is missing",
    ),
    "broken index": (write("model.safetensors.index.json", '{"weight_map": 3}'), "index.json"),
    "no tokenizer": (
        lambda path: [remove(f"tokenizer{x}.json")(path) for x in ("", "_config")] and None,
        "loaded",
    ),
    "broken tokenizer": (write("tokenizer.json", '{"model": '), "can't be loaded"),
}


@pytest.mark.filterwarnings("default")  # transformers' own complaints about a missing tokenizer
@pytest.mark.parametrize("case", BREAK)
def test_a_broken_model_is_one_clear_line(model_dir, tmp_path, case):
    damage, says = BREAK[case]
    damage(model_dir)
    with pytest.raises(ModelError, match=says) as e:
        load_model(str(model_dir), tmp_path)
    assert "\n" not in e.value.message and str(model_dir) in e.value.message


@pytest.mark.parametrize(
    "name", ["nowhere", "./nowhere", "/nowhere/at/all", "../x/y", "a b", "", ".", "a/b/c"]
)
def test_a_name_that_is_nothing_is_refused_without_asking_the_hub(tmp_path, name):
    with pytest.raises(ModelError):
        load_model(name, tmp_path)


def test_max_context_is_read_where_models_keep_it():
    assert max_context({"max_position_embeddings": 77}) == 77
    assert max_context({"text_config": {"max_position_embeddings": 88}}) == 88
    assert (
        max_context({"max_position_embeddings": None, "text_config": None}) == DEFAULT_MAX_CONTEXT
    )


def test_the_weights_hash_follows_weights_and_config_but_not_the_tokenizer(model_dir, tmp_path):
    def value() -> str:
        return weights_hash(read_model_dir(model_dir), tmp_path / "cache")

    first = value()
    write("tokenizer_config.json", "{}")(model_dir)
    assert value() == first
    weights = bytearray((model_dir / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model_dir / "model.safetensors").write_bytes(weights)
    second = value()
    assert second != first
    edit_config(rope_theta=5e5)(model_dir)
    assert value() not in (first, second)


def test_the_weights_hash_is_remembered_and_forgetting_it_is_harmless(model_dir, tmp_path):
    cache = tmp_path / "cache"
    first = weights_hash(read_model_dir(model_dir), cache)
    (remembered,) = cache.iterdir()
    known = json.loads(remembered.read_text())
    remembered.write_text(json.dumps(dict.fromkeys(known, "from memory")))
    assert (
        weights_hash(read_model_dir(model_dir), cache) != first
    )  # so the files were not read again
    for text in ("", "[]", "{"):
        remembered.write_text(text)
        assert weights_hash(read_model_dir(model_dir), cache) == first
