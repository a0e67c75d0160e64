"""Tests of scripts/check_style.py: each rule finds an example of what it forbids, and no more."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_style.py"
check_style = runpy.run_path(str(SCRIPT))
LONG = "word " * 20 + "end"  # 103 columns


def lines_of(text: str, kind: str = "python") -> list[int]:
    return [finding.line for finding in check_style[f"check_{kind}"](text)]


@pytest.mark.parametrize("first", ["Of", "By", "where", "Beside", "Whose", "Under"])
@pytest.mark.parametrize("start", ["", "class A:\n    ", "def f():\n    ", "async def f():\n    "])
def test_a_docstring_that_begins_with_a_preposition_is_found(start, first):
    text = f'{start}"""{first} a request that says it all."""\n'
    assert lines_of(text) == [start.count("\n") + 1]


@pytest.mark.parametrize("first", ["Return", "Tokens", "On-disk rows", "Format", "`of` is"])
def test_a_docstring_that_begins_with_a_verb_or_a_noun_is_not(first):
    assert lines_of(f'def f():\n    """{first} that."""\n') == []


@pytest.mark.parametrize("display", ["(a, b)", "[a, b]", "{a, b}"])
def test_a_starred_display_in_a_call_is_found(display):
    assert lines_of(f"x = 1\ncall(\n    *{display},\n    c,\n)\n") == [3]


def test_a_starred_name_and_a_starred_display_elsewhere_are_not():
    assert lines_of("call(*a, *f(b))\nx = [*(a, b), c]\n") == []


def test_a_line_of_more_than_100_columns_is_found():
    fits = "x" * 98 + " y"
    assert lines_of(f"# {fits[2:]}\n# {fits}\n") == [2]
    assert lines_of(f"{fits}\n{fits}y\n", "markdown") == [2]


def test_a_line_that_is_one_long_word_is_not():
    assert lines_of(f"# https://{'x' * 100}\n") == []


@pytest.mark.parametrize(
    "text",
    [
        f"| {LONG} | x |",
        f"```\n{LONG}\n```",
        f"[text](https://{'x' * 100}) and more",
        f"see https://{'x' * 100}",
        f"<!-- figures: ttft -->\n{LONG}\n<!-- /figures -->",
        f"short <!-- figures: ttft -->{LONG}<!-- /figures --> prose",
    ],
)
def test_tables_code_targets_of_links_and_generated_blocks_may_be_longer(text):
    assert lines_of(text, "markdown") == []
    assert lines_of(f"{text}\n\n{LONG}\n", "markdown") == [text.count("\n") + 3]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_it_says_file_and_line_of_what_git_does_not_ignore_and_exits_with_1(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text("ignored.py\n")
    for name in ("bad.py", "ignored.py"):
        (tmp_path / name).write_text("call(*(a, b))\n")
    (tmp_path / "good.py").write_text('"""Say what is good."""\n')
    done = run(tmp_path, ".")
    assert (done.returncode, done.stdout) == (
        1,
        "bad.py:1: starred tuple, list or set in a call: write its items\n",
    )
    assert run(tmp_path, "good.py").returncode == 0
    missing = run(tmp_path, "good.py", "gone.py")
    assert missing.returncode != 0 and "gone.py" in missing.stderr


def test_the_report_counts_lines_comprehensions_and_functions(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "left_out.py").write_text("x = 1\n" * 100)
    (tmp_path / "one.py").write_text("def f():\n    x = [a for a in b]\n\n    return {*x}\n")
    done = run(tmp_path, "--report", ".")
    assert done.returncode == 0, done.stderr
    assert "4 lines in 1 files" in done.stdout
    assert "333.3 comprehensions in 1,000 lines" in done.stdout
    assert "4 one.py:1 f" in done.stdout
