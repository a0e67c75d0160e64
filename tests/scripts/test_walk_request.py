"""Tests of scripts/walk_request.py: where a chat request goes, and that the page tells so."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
SCRIPT = TOP / "scripts" / "walk_request.py"
walk_request = runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def walk() -> dict:
    """What the script prints as JSON."""
    command = [sys.executable, str(SCRIPT), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_a_chat_request_enters_packages_in_one_direction(walk):
    packages = walk["packages"]
    order = [name for name in packages if name not in ("agentmem", "transcripts", "linux_cpu")]
    assert order == ["server", "chat", "engine", "prefix_cache", "kvcache", "store"]
    assert walk["files"] == sum(map(len, packages.values()))
    paths = [TOP / "src" / "agentmem" / name / file for name in order for file in packages[name]]
    assert paths and all(path.is_file() for path in paths)


def test_the_page_shows_the_files_that_a_request_runs_through(walk):
    page = (TOP / "docs" / "architecture.md").read_text()
    (block,) = walk_request["BLOCK"].findall(page)
    anew = "scripts/walk_request.py --write docs/architecture.md writes it anew"
    assert block[1] == walk_request["table"](walk["packages"]), anew


def test_the_block_of_a_page_is_written_and_nothing_else_of_it(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- walk: by hand -->\nold\n<!-- /walk -->\nafter\n")
    walk_request["write"](page, {"server": ["sse.py", "answer.py"], "chat": ["dates.py"]})
    assert page.read_text() == (
        "before\n<!-- walk: by hand -->\n"
        "| package | files |\n"
        "|---|---|\n"
        "| `server` (2) | `answer.py`, `sse.py` |\n"
        "| `chat` (1) | `dates.py` |\n"
        "\n"
        "3 files in 2 packages.\n"
        "<!-- /walk -->\nafter\n"
    )


def test_a_page_without_a_block_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("no block\n")
    with pytest.raises(SystemExit, match="has no block"):
        walk_request["write"](page, {"chat": ["dates.py"]})
    assert page.read_text() == "no block\n"


def test_another_direction_is_a_fault():
    is_in_direction = walk_request["is_in_direction"]
    names = ["server", "transcripts", "chat", "engine", "prefix_cache", "kvcache", "store"]
    assert is_in_direction(dict.fromkeys(names))
    assert not is_in_direction(dict.fromkeys(reversed(names)))
    assert not is_in_direction(dict.fromkeys(names[:-1]))
