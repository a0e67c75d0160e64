"""Scripts of benchmarks/ that reach into the product, on a tiny model: it changes, and nothing else
runs them.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.tiny_model_dir import write_tiny_model

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def result_of(script: str, *args: object, directory: Path, missed: str = "") -> dict:
    """What it writes. `missed`: the demand that a model this small does not meet."""
    file = directory / "result.json"
    command = [sys.executable, str(SCRIPTS / script), *map(str, args), "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 or (missed and missed in done.stdout + done.stderr), (
        done.stdout + done.stderr
    )
    return json.loads(file.read_text())


def test_attention(tmp_path, model):
    result = result_of("attention.py", "--model", model, "--contexts", "512", directory=tmp_path)
    (row,) = result["rows"]
    assert row["context"] == 512 and row["dequantized"] > 0 and row["codes"] > 0


def test_batch_attention_computes_the_same_in_every_way(tmp_path, model):
    result = result_of(
        "batch_attention.py", "--model", model, "--batches", "1,3", "--steps", 4, directory=tmp_path
    )
    assert {row["way"] for row in result["rows"]} == {"per sequence", "merged", "grouped"}
    assert max(row["logits_differ_by"] for row in result["rows"]) < 1e-4


def test_sealing(tmp_path, model):
    args = ("--model", model, "--answer-tokens", 300)
    result = result_of(
        "sealing.py", *args, directory=tmp_path, missed="sealing costs more than a decode step"
    )
    assert [row["agents"] for row in result["rows"]] == [1, 4]
    assert all(row["seals"] > 0 for row in result["rows"])


def test_streams(tmp_path):
    result = result_of("streams.py", "--streams", 4, "--seconds", 2, directory=tmp_path)
    assert result["failures"] == []
