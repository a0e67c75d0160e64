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


def write_index(*names: str) -> Callable[[Path], None]:
    """An index that names these files."""
    weight_map = {f"tensor{i}": name for i, name in enumerate(names)}
    return write("model.safetensors.index.json", json.dumps({"weight_map": weight_map}))


def split(path: Path, *names: str | None) -> None:
    """Give each of these files a share of the tensors; that of None is lost."""
    tensors = sorted(mx.load(str(path / "model.safetensors")).items())
    mx.eval([tensor for _, tensor in tensors])
    (path / "model.safetensors").unlink()
    for i, name in enumerate(names):
        if name is not None:
            mx.save_safetensors(str(path / name), dict(tensors[i :: len(names)]), {"format": "mlx"})


BREAK = {
    "no directory": (shutil.rmtree, "no such directory"),
    "no config": (remove("config.json"), "config.json"),
    "a cache of the hub": (
        lambda path: [
            (path / "snapshots" / "5f3e").mkdir(parents=True),
            (path / "config.json").rename(path / "snapshots" / "5f3e" / "config.json"),
        ],
        "name .*/snapshots/5f3e$",
    ),
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
        write_index("model.safetensors", "model-00002.safetensors"),
        "model-00002.safetensors is missing",
    ),
    "a shard is missing, and there is no index": (
        lambda path: (path / "model.safetensors").rename(path / "model-00001-of-00003.safetensors"),
        "model-00002-of-00003.safetensors, model-00003-of-00003.safetensors are missing",
    ),
    "a shard of the index is empty": (
        lambda path: [
            write_index("model.safetensors", "model-00002.safetensors")(path),
            (path / "model-00002.safetensors").touch(),
        ],
        "model-00002.safetensors.* is broken",
    ),
    "the index leads elsewhere": (write_index("../model.safetensors"), "no file of the directory"),
    "weights are a link to nowhere": (
        lambda path: (
            (path / "model.safetensors").rename(path / "gone")
            and (path / "model.safetensors").symlink_to(path / "blob")
        ),
        "model.safetensors is broken",
    ),
    "weights of another kind": (
        lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"),
        r"model.safetensors is missing \(there is pytorch_model.bin\)",
    ),
    "weights that mlx-lm does not look for": (
        lambda path: (path / "model.safetensors").rename(path / "consolidated.safetensors"),
        r"model.safetensors is missing \(there is consolidated.safetensors\)",
    ),
    "weights of half the model beside an old index": (
        lambda path: [
            split(path, "model.safetensors", None),
            write_index("model-00001.safetensors")(path),
        ],
        "can't be loaded",
    ),
    "config in UTF-16": (
        lambda path: (path / "config.json").write_bytes(json.dumps(CONFIG).encode("utf-16")),
        "config.json can't be read",
    ),
    "config without end": (write("config.json", "[" * 100_000), "config.json can't be read"),
    "a tokenizer's config that is no object": (write("tokenizer_config.json", "[]"), "loaded"),
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


def logits(path: Path, home: Path) -> list[float]:
    """What the model says, which is another thing for other weights."""
    return load_model(str(path), home).model(mx.array([[1, 2, 3]]))[0, -1].tolist()


def other_model(path: Path, name: str, of: str = "model.safetensors") -> None:
    """A file with other weights under the same names of tensors."""
    tensors = {name: tensor + 1 for name, tensor in mx.load(str(path / of)).items()}
    mx.save_safetensors(str(path / name), tensors, {"format": "mlx"})


def with_bom(*names: str) -> Callable[[Path], None]:
    def add(path: Path) -> None:
        for name in names:
            (path / name).write_bytes(b"\xef\xbb\xbf" + (path / name).read_bytes())

    return add


def companions(path: Path) -> None:
    """What macOS leaves beside files on a disk of another kind."""
    for file in list(path.iterdir()):
        (path / f"._{file.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(4000))
    (path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "._tool_use.jinja").write_bytes(b"\0\5\x16\7\xff")


def empty(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).touch()


# what lies about in a directory, and changes nothing
STRAY = {
    "companions of macOS": companions,
    "an empty file": empty("model-00001.safetensors"),
    "an empty file of another name": empty("adapters.safetensors"),
    "a copy": lambda path: shutil.copy(path / "model.safetensors", path / "model copy.safetensors"),
    "half a copy": lambda path: (path / "model-1.safetensors").write_bytes(
        (path / "model.safetensors").read_bytes()[:5000]
    ),
    "another model beside": lambda path: other_model(path, "model-finetuned.safetensors"),
    "another model of another name": lambda path: other_model(path, "consolidated.safetensors"),
    "another model that the index leaves out": lambda path: [
        other_model(path, "model-00001-of-00001.safetensors"),
        write_index("model.safetensors")(path),
    ],
    "an index of shards that are not there": write_index("model-00001-of-00002.safetensors"),
    "an index with a byte order mark": lambda path: [
        write_index("model.safetensors")(path),
        with_bom("model.safetensors.index.json")(path),
    ],
    "generation_config.json is a list": write("generation_config.json", "[1]"),
    "generation_config.json is null": write("generation_config.json", "null"),
    "generation_config.json is empty": write("generation_config.json", ""),
    "generation_config.json has a byte order mark": lambda path: [
        write("generation_config.json", "{}")(path),
        with_bom("generation_config.json")(path),
    ],
    "chat_template.json is a list": write("chat_template.json", "[]"),
    "chat_template.json is no JSON": write("chat_template.json", "{% for"),
    "byte order marks": with_bom("tokenizer.json", "tokenizer_config.json"),
    "a folder": lambda path: (path / "original").mkdir(),
    "a link to nowhere": lambda path: (path / "notes.json").symlink_to(path / "nothing"),
}


@pytest.mark.parametrize("case", STRAY)
def test_what_lies_beside_a_model_changes_neither_what_is_loaded_nor_its_hash(
    model_dir, tmp_path, case
):
    before = logits(model_dir, tmp_path)
    first = weights_hash(read_model_dir(model_dir), tmp_path / "cache")
    STRAY[case](model_dir)
    there = {path: path.lstat().st_mtime_ns for path in model_dir.rglob("*")}
    assert logits(model_dir, tmp_path) == before
    found = read_model_dir(model_dir)
    assert found.weight_files == (model_dir / "model.safetensors",)
    assert weights_hash(found, tmp_path / "cache") == first
    assert {path: path.lstat().st_mtime_ns for path in model_dir.rglob("*")} == there


@pytest.mark.parametrize(
    "names",
    [
        ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        ("model-a.safetensors", "model-b.safetensors"),
        ("model.safetensors", "model-extra.safetensors"),
    ],
)
@pytest.mark.parametrize("has_index", [False, True])
def test_shards_are_loaded_and_hashed_with_an_index_and_without(
    model_dir, tmp_path, names, has_index
):
    before = logits(model_dir, tmp_path)
    split(model_dir, *names)
    if has_index:
        write_index(*names)(model_dir)
    assert logits(model_dir, tmp_path) == before
    found = read_model_dir(model_dir)
    assert {file.name for file in found.weight_files} == set(names)
    first = weights_hash(found, tmp_path / "cache")
    other_model(model_dir, names[1], of=names[1])
    assert weights_hash(read_model_dir(model_dir), tmp_path / "cache") != first


def test_shards_may_have_any_name_that_the_index_knows(model_dir, tmp_path):
    before = logits(model_dir, tmp_path)
    names = ("weights.00.safetensors", "weights.01.safetensors")
    split(model_dir, *names)
    write_index(*names)(model_dir)
    assert logits(model_dir, tmp_path) == before


@pytest.mark.parametrize(
    "name", ["a [4bit] model", "*", "50% off?", "model[!a]", "модель", "a\nb", "-x", "{a,b}"]
)
def test_a_directory_may_have_any_name(model_dir, tmp_path, name):
    before = logits(model_dir, tmp_path)
    there = tmp_path / "models" / name
    there.parent.mkdir()
    model_dir.rename(there)
    assert logits(there, tmp_path) == before
    assert load_model(name, tmp_path).path == there  # by its plain name under the home


def test_links_into_a_cache_of_the_hub_are_followed(model_dir, tmp_path):
    before = logits(model_dir, tmp_path)
    blobs = tmp_path / "hub" / "blobs"
    blobs.mkdir(parents=True)
    for i, file in enumerate(sorted(model_dir.iterdir())):
        file.rename(blobs / f"{i:064x}")
        file.symlink_to(os.path.relpath(blobs / f"{i:064x}", model_dir))
    assert logits(model_dir, tmp_path) == before


def test_a_directory_that_nobody_may_write_to_is_loaded(model_dir, tmp_path):
    before = logits(model_dir, tmp_path)
    for path in (*model_dir.iterdir(), model_dir):
        path.chmod(0o500 if path.is_dir() else 0o400)
    try:
        assert logits(model_dir, tmp_path) == before
    finally:
        model_dir.chmod(0o700)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_directory_that_may_not_be_entered_is_one_clear_line(model_dir, tmp_path):
    model_dir.chmod(0)
    try:
        with pytest.raises(ModelError, match="can't be read: Permission denied"):
            read_model_dir(model_dir)
    finally:
        model_dir.chmod(0o700)


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 300, "a\0b", "/" + "y/" * 3000])
def test_a_name_that_no_file_can_have_is_one_clear_line(tmp_path, name):
    with pytest.raises(ModelError) as e:
        load_model(name, tmp_path)
    assert len(e.value.message) < 500


def test_a_file_is_told_from_a_directory(model_dir, tmp_path):
    with pytest.raises(ModelError, match="it is a file; name its directory"):
        load_model(str(model_dir / "model.safetensors"), tmp_path)


TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({}, None),
        ({"chat_template.json": {"chat_template": TEMPLATE}}, TEMPLATE),
        ({"chat_template.json": "\ufeff" + json.dumps({"chat_template": TEMPLATE})}, TEMPLATE),
        ({"chat_template.jinja": TEMPLATE}, TEMPLATE),
        ({"chat_template.jinja": "\ufeff" + TEMPLATE}, TEMPLATE),
        ({"chat_template.jinja": "own", "chat_template.json": {"chat_template": "old"}}, "own"),
        ({"chat_template.json": {"chat_template": None}}, None),
        ({"chat_template.json": {"other": TEMPLATE}}, None),
        ({"additional_chat_templates/rag.jinja": "rag"}, {"rag": "rag"}),
        (
            {
                "chat_template.json": {
                    "chat_template": [
                        {"name": "default", "template": TEMPLATE},
                        {"name": "tool_use", "template": "tools"},
                    ]
                }
            },
            {"default": TEMPLATE, "tool_use": "tools"},
        ),
    ],
)
def test_the_chat_template_is_found_wherever_it_is_kept(model_dir, tmp_path, files, template):
    for name, content in files.items():
        (model_dir / name).parent.mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (model_dir / name).write_text(text, encoding="utf-8")
    assert load_model(str(model_dir), tmp_path).tokenizer.chat_template == template


def test_the_tokenizers_own_template_goes_before_that_of_a_processor(model_dir, tmp_path):
    config = json.loads((model_dir / "tokenizer_config.json").read_text())
    write("tokenizer_config.json", json.dumps(config | {"chat_template": "own"}))(model_dir)
    write("chat_template.json", '{"chat_template": "old"}')(model_dir)
    assert load_model(str(model_dir), tmp_path).tokenizer.chat_template == "own"


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
