"""Every figure in README.md and docs/ comes from the committed result file named beside it."""

import json
import re
import subprocess
import sys
from xml.etree import ElementTree

import figures
import pytest

from agentmem.bench.app import COMMANDS, command_of

IDS = [page.name for page in figures.PAGES]
BLOCKS = [
    (page, found[2]) for page in figures.PAGES for found in figures.BLOCK.finditer(page.read_text())
]

# a number with a unit, or with a decimal point
UNITS = "ms|s|seconds|minutes|tokens/s|tok/s|%|[KMGT]i?B|nats|times"
MEASURED = re.compile(rf"\d[\d.,]*(?:x|\s?(?:{UNITS}))(?!\w)|\d\.\d+")
VERSION = re.compile(
    r"(?:mlx-lm|MLX|Llama|Python|Apache|arxiv\.org/abs)[ /-]\d+(?:\.\d+)+(?: to 3\.\d+)?"
)

# what has a unit and was not measured: settings, limits, sizes of the design, names
NOT_MEASURED = [
    "which takes about 650 MB, and puts the demo model (SmolLM2-135M, about 100 MB)",
    "# 4.5 GB to download",
    "about 300 MB to download on Linux, about 650 MB on disk",
    "a wheel on PyPI, about 100 MB, in",
    "about 4.5 GB for Llama 3.1 8B, 8 GB for Gemma 3 12B and 9 GB for DeepSeek-Coder-V2-Lite",
    "127.0.0.1",
    "The default is 60 %",
    "| `60%` |",
    "| `90%` |",
    "| `20%` |",
    "| `1.25` |",
    "| 256 MB, or a quarter",
    "`--write-amplification` (1.25)",
    "| 20 % of the disk |",
    "| 1 GiB |",
    "64 MB are kept, and the oldest go",
    "RAM holds the trees in use, and 64 MB of idle ones",
    "Prefill waits up to 100 ms for them",
    "From 95 % of `--memory-limit`",
    "40 MB at most",
    "are the grace time plus 60 s",
    "with its 95 % interval",
    "one 2 seconds after the other",
]


@pytest.mark.parametrize("page", figures.PAGES, ids=IDS)
def test_every_block_is_what_its_template_makes_of_the_result_files(page):
    assert page.read_text() == figures.rewritten(page), "python benchmarks/figures.py"


@pytest.mark.parametrize("picture", figures.PICTURES, ids=lambda picture: picture.name)
def test_a_picture_is_what_its_template_makes_of_a_result_file_that_is_linked_below_it(picture):
    assert picture.read_text() == figures.rewritten(picture), "python benchmarks/figures.py"
    drawn = ElementTree.parse(picture).getroot()
    assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
    block = figures.render(picture, f"{picture.name}.j2")
    readme = figures.ROOT / "README.md"
    below = readme.read_text().split(f"]({picture.relative_to(figures.ROOT)})")[1]
    first = figures.BLOCK.search(below)
    assert block.read <= figures.render(readme, f"{first[2]}.md.j2").linked


def test_a_bar_of_the_picture_is_as_long_as_its_time():
    picture = figures.ROOT / "docs/ttft.svg"
    rows = json.loads((figures.RESULTS / "ttft-demo.json").read_text())["rows"]
    times = [row[state]["ttft_ms"] for row in rows for state in ("cold", "warm", "hot")]
    drawn = ElementTree.parse(picture).getroot()
    bars = [bar for bar in drawn if bar.get("class") in ("cold", "warm", "hot")]
    scale = max(float(bar.get("width")) for bar in bars) / max(times)
    assert [float(bar.get("width")) for bar in bars] == pytest.approx(
        [scale * ms for ms in times], abs=0.06
    )


@pytest.mark.parametrize(
    ("page", "name"), BLOCKS, ids=[f"{page.name}-{name}" for page, name in BLOCKS]
)
def test_a_block_links_every_file_that_it_reads_and_has_something_of_it(page, name):
    block = figures.render(page, f"{name}.md.j2")
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
    pictures = {f"{picture.name}.j2" for picture in figures.PICTURES}
    blocks = {f"{name}.md.j2" for _, name in BLOCKS}
    assert {path.name for path in figures.TEMPLATES.iterdir()} == blocks | pictures


def test_every_opened_block_is_closed():
    for page in figures.PAGES:
        assert "figures" not in re.findall(r"<!-- /?(\w+)", figures.BLOCK.sub("", page.read_text()))


def test_nothing_is_excused_that_is_not_there():
    texts = [
        in_one_line(path.read_text()) for path in (*figures.PAGES, *figures.TEMPLATES.iterdir())
    ]
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
    """Check a copy of the tree, with one digit changed."""
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
    stale = re.sub(r"(<!-- figures: headline -->\n.*?)\d", r"\g<1>777", page.read_text(), count=1)
    page.write_text(stale)
    done = subprocess.run([*command, "--check"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.partition(":")[0]) == (1, "README.md")
    assert page.read_text() == stale
    assert subprocess.run(command).returncode == 0
    assert page.read_text() == (root / "README.md").read_text()


def in_one_line(text: str) -> str:
    return " ".join(text.split())


def measured(text: str) -> list[str]:
    text = in_one_line(text)
    for excuse in NOT_MEASURED:
        text = text.replace(excuse, "")
    return [found[0] for found in MEASURED.finditer(VERSION.sub("", text))]


def commands() -> dict[str, str]:
    """Map each result file to the command that benchmarks/README.md names for it."""
    text = (figures.ROOT / "benchmarks/README.md").read_text()
    return dict(
        re.findall(r"^\| \[([\w.-]+\.json)\]\(results/\1\) \| `([^`]*)` \|$", text, re.MULTILINE)
    )


def test_every_committed_result_has_a_command_that_there_is():
    assert commands().keys() == {path.name for path in figures.RESULTS.iterdir()}
    for command in commands().values():
        words = command.split()
        options = {word for word in words if word.startswith("--")} | {"--json"}
        if words[0] == "python":
            script = (figures.ROOT / words[1]).read_text()
            assert all(f'"{option}"' in script for option in options), command
        else:
            assert words[:2] == ["agentmem", "bench"]
            parameters = command_of(words[2]).params
            assert options <= {name for one in parameters for name in one.opts}, command


def test_every_benchmark_and_script_is_explained():
    text = (figures.ROOT / "docs/benchmarks.md").read_text()
    assert all(f"`bench {name}`" in text for name in COMMANDS if name != "report")
    helpers = {"machine.py", "control.py", "persisted.py", "figures.py"}
    text = (figures.ROOT / "benchmarks/README.md").read_text()
    scripts = {path.name for path in (figures.ROOT / "benchmarks").glob("*.py")}
    assert all(f"`{name}`" in text for name in scripts - helpers)
