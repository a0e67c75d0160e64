"""Tests of the floors that lint-imports keeps, and of scripts/import_chains.py."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
chains = runpy.run_path(str(TOP / "scripts" / "import_chains.py"))
RUN_LINTER = "from importlinter.cli import lint_imports_command; lint_imports_command()"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The package and its floors, to be changed."""
    shutil.copy(TOP / "pyproject.toml", tmp_path)
    shutil.copytree(TOP / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def run(tree: Path, *command: str) -> tuple[int, str]:
    """Run Python on the package of `tree`; returns its exit code and what it says."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree / "src"), "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout


def test_the_tree_keeps_to_its_floors(tree):
    code, said = run(tree, "-c", RUN_LINTER, "--no-cache", "--no-logo")
    assert code == 0, said


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("kvcache", "store"),
        ("store", "kvcache"),
        ("errors", "models"),
        ("engine", "chat"),
        ("prefix_cache", "engine"),
        ("chat", "server"),
    ],
)
def test_an_import_against_the_floors_is_refused(tree, importer, imported):
    package = tree / "src" / "agentmem" / importer
    file = package / "added.py" if package.is_dir() else package.with_suffix(".py")
    with file.open("a") as text:
        text.write(f"\nif False:\n    import agentmem.{imported}  # noqa\n")
    code, said = run(tree, "-c", RUN_LINTER, "--no-cache", "--no-logo")
    assert code == 1
    assert f"agentmem.{importer} is not allowed to import agentmem.{imported}" in said


def test_a_package_without_a_floor_is_refused(tree):
    (tree / "src" / "agentmem" / "attic.py").touch()
    code, said = run(tree, "-c", RUN_LINTER, "--no-cache", "--no-logo")
    assert code == 1 and "- agentmem.attic" in said


def test_a_chain_is_counted_in_modules_of_one_package():
    imports = {
        "a.x.one": {"a.x.two", "a.x.three", "a.y.one"},
        "a.x.two": {"a.x.three"},
        "a.x.three": set(),
        "a.y.one": {"a.z"},
        "a.z": set(),
    }
    longest = chains["longest_chains"](imports)
    assert longest["a.x"] == ["a.x.one", "a.x.two", "a.x.three"]
    assert longest["a.y"] == ["a.y.one"]


def test_every_cycle_is_found_and_broken():
    imports = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"e"}, "e": {"d", "a"}}
    cycles = chains["break_cycles"](imports)
    assert sorted(sorted(set(cycle)) for cycle in cycles) == [["a", "b", "c"], ["d", "e"]]
    assert chains["break_cycles"](imports) == []


def test_too_long_a_chain_and_a_cycle_for_types_alone_are_faults(tree):
    script = str(TOP / "scripts" / "import_chains.py")
    package = tree / "src" / "agentmem" / "transcripts"
    package.mkdir(exist_ok=True)
    for i in range(1, 9):
        (package / f"link{i}.py").write_text(f"from . import link{i + 1}\n" if i < 8 else "")
    code, said = run(tree, script)
    assert code == 1 and "8  transcripts.link1 -> transcripts.link2 -> " in said
    text = "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from . import link7\n"
    (package / "link8.py").write_text(text)
    code, said = run(tree, script)
    assert code == 1 and "a cycle: transcripts.link" in said
    assert run(tree, script, "--report")[0] == 0
