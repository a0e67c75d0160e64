"""Every figure in README.md and docs/ comes from the committed result file that is named beside it."""

import re
import subprocess
import sys

import figures
import pytest
from typer.main import get_command

from agentmem.cli_bench import app

IDS = [page.name for page in figures.PAGES]
BLOCKS = [
    (page, found[2]) for page in figures.PAGES for found in figures.BLOCK.finditer(page.read_text())
]

# a number with a unit, or with a decimal point
MEASURED = re.compile(
    r"\d[\d.,]*(?:x|\s?(?:ms|s|seconds|minutes|tokens/s|tok/s|%|[KMGT]i?B|nats|times))(?!\w)|\d\.\d+"
)
VERSION = re.compile(r"(?:mlx-lm|MLX|Llama|Python)[ -]\d+(?:\.\d+)+")

# what has a unit and was not measured: settings and their defaults, limits, sizes of the design,
# names
NOT_MEASURED = [
    "(SmolLM2-135M, 100 MB)",
    "127.0.0.1",
    "(or `60%`, the default:",
    "of all 256 MB, the least recently used agents' go first",
    "`--write-amplification` (1.25)",
    "`--store-quota`** (20 % of the disk)",
    "a damaged manifest too; 64 MB at most",
    "1,000 off the newest path of an agent, 256 MB in all",
    "RAM holds the trees in use (64 MB of idle ones)",
    "prefill waits up to 100 ms for them",
    "From 95 % of `--memory-limit`",
    "and its log, 40 MB at most",
    "are the grace time plus 60 s",
    "with its 95 % interval",
    "one 2 seconds after the other",
]


@pytest.mark.parametrize("page", figures.PAGES, ids=IDS)
def test_every_block_is_what_its_template_makes_of_the_result_files(page):
    assert page.read_text() == figures.rewritten(page), "python benchmarks/figures.py"


@pytest.mark.parametrize(
    ("page", "name"), BLOCKS, ids=[f"{page.name}-{name}" for page, name in BLOCKS]
)
def test_a_block_links_every_file_that_it_reads_and_has_something_of_it(page, name):
    block = figures.render(page, name)
    assert block.read == block.linked != set()
    assert re.search(r"\d", block.text)
    for _, target in re.findall(r"\[([^]]*)\]\(([^)]*)\)", block.text):
        assert (page.parent / target).is_file()


@pytest.mark.parametrize("page", figures.PAGES, ids=IDS)
def test_no_measured_figure_stands_outside_of_a_block(page):
    assert measured(figures.BLOCK.sub("", page.read_text())) == []


@pytest.mark.parametrize("path", sorted(figures.TEMPLATES.iterdir()), ids=lambda path: path.name)
def test_a_template_has_no_figure_of_its_own(path):
    assert measured(re.sub(r"{%.*?%}|{{.*?}}", "", path.read_text(), flags=re.DOTALL)) == []


def test_every_template_is_used():
    assert {path.name for path in figures.TEMPLATES.iterdir()} == {
        f"{name}.md.j2" for _, name in BLOCKS
    }


def test_every_opened_block_is_closed():
    for page in figures.PAGES:
        assert "figures" not in re.findall(r"<!-- /?(\w+)", figures.BLOCK.sub("", page.read_text()))


def test_nothing_is_excused_that_is_not_there():
    texts = [path.read_text() for path in (*figures.PAGES, *figures.TEMPLATES.iterdir())]
    for excuse in NOT_MEASURED:
        assert any(excuse in text for text in texts), excuse
        assert MEASURED.search(excuse), excuse


@pytest.mark.parametrize(
    "text",
    [
        "takes 113 ms",
        "43x faster",
        "1.25 s",
        "3,440 tokens/s",
        "12 %",
        "it is 95% of it",
        "31 MB",
        "0.004 nats",
        "100 times",
    ],
)
def test_a_figure_is_seen(text):
    assert measured(f"So it {text}, and so on.")


def test_the_check_says_which_page_is_stale_and_changes_nothing(tmp_path):
    """On a copy of the tree, with one digit changed."""
    root = figures.ROOT
    for part in (
        "README.md",
        "docs",
        "benchmarks/figures",
        "benchmarks/figures.py",
        "benchmarks/results",
    ):
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-r", root / part, tmp_path / part], check=True)
    command = [sys.executable, tmp_path / "benchmarks/figures.py"]
    assert subprocess.run([*command, "--check"]).returncode == 0
    page = tmp_path / "README.md"
    stale = re.sub(r"(<!-- figures: write -->\n.*?)\d", r"\g<1>777", page.read_text(), count=1)
    page.write_text(stale)
    done = subprocess.run([*command, "--check"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.partition(":")[0]) == (1, "README.md")
    assert page.read_text() == stale
    assert subprocess.run(command).returncode == 0
    assert page.read_text() == (root / "README.md").read_text()


def measured(text: str) -> list[str]:
    for excuse in NOT_MEASURED:
        text = text.replace(excuse, "")
    return [found[0] for found in MEASURED.finditer(VERSION.sub("", text))]


def commands() -> dict[str, str]:
    """From benchmarks/README.md: result file to the command that writes it."""
    text = (figures.ROOT / "benchmarks/README.md").read_text()
    return dict(
        re.findall(r"^\| \[([\w.-]+\.json)\]\(results/\1\) \| `([^`]*)` \|$", text, re.MULTILINE)
    )


def test_every_committed_result_has_a_command_that_there_is():
    assert commands().keys() == {path.name for path in figures.RESULTS.iterdir()}
    known = get_command(app).commands
    for command in commands().values():
        words = command.split()
        options = {word for word in words if word.startswith("--")} | {"--json"}
        if words[0] == "python":
            script = (figures.ROOT / words[1]).read_text()
            assert all(f'"{option}"' in script for option in options), command
        else:
            assert words[:2] == ["agentmem", "bench"]
            assert options <= {
                name for parameter in known[words[2]].params for name in parameter.opts
            }, command


def test_every_benchmark_and_script_is_explained():
    text = (figures.ROOT / "benchmarks/README.md").read_text()
    assert all(f"`bench {name}`" in text for name in get_command(app).commands if name != "report")
    helpers = {"machine.py", "control.py", "persisted.py", "figures.py"}
    scripts = {path.name for path in (figures.ROOT / "benchmarks").glob("*.py")}
    assert all(f"`{name}`" in text for name in scripts - helpers)
