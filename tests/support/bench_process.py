"""`agentmem bench` as a process, on a tiny model and a text of words that it knows."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema

from agentmem.bench.harness.schemas import RESULTS, schema
from support.tiny import random_tokens

BENCH = (sys.executable, "-m", "agentmem", "bench")
FAULT = 2  # exit code


def environment(temporary: Path) -> dict[str, str]:
    """`temporary` gets the benchmark's directory and lock: what a person measures meanwhile is no
    business of tests.
    """
    return {k: v for k, v in os.environ.items() if not k.startswith("AGENTMEM_")} | {
        "TMPDIR": str(temporary)
    }


def write_words(path: Path, count: int = 20_000) -> Path:
    path.write_text(" ".join(f"w{token}" for token in random_tokens(count, seed=3)))
    return path


def run_bench(temporary: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [*BENCH, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(temporary), timeout=240
    )


def result_of(directory: Path, name: str, model: Path, *arguments: object) -> dict[str, Any]:
    """What the benchmark wrote; its files are in `directory`, the table's text in
    `result["shown"]`.
    """
    words, file = write_words(directory / "words.txt"), directory / f"{name}.json"
    inputs = ("--home", directory / "home", "--model", model, "--corpus", words, "--json", file)
    done = run_bench(directory, name, *arguments, *inputs)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(file.read_text())
    assert result["benchmark"] == name
    if name in RESULTS:
        jsonschema.validate(result, schema(name))
    assert result["noise"]["probe_before_ms"] > 0
    return result | {"shown": done.stdout}
