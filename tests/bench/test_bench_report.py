"""`agentmem bench report`: the committed results on one page that needs nothing else."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from agentmem.bench.harness.schemas import RESULTS
from agentmem.bench.report import _widths

COMMITTED = Path(__file__).parents[2] / "benchmarks/results"
FAULT = 2  # exit code
MARKUP = "<script>alert('&')</script>, $x_{$"  # of HTML, and of matplotlib's formulas


class Page(HTMLParser):
    """What a browser would fetch, and the text of tables' cells, by section."""

    def __init__(self, text: str):
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.sections: list[list[str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [
            value or ""
            for name, value in attrs
            if name in ("src", "href", "srcset", "action", "data")
        ]
        if tag == "section":
            self.sections.append([])

    def handle_data(self, data):
        self.text += data
        if self.sections and data.strip():
            self.sections[-1].append(data.strip())


def report(directory: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "agentmem", "bench", "report", str(directory)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A copy of the committed files, one of them with markup in its model's name."""
    directory = shutil.copytree(COMMITTED, tmp_path_factory.mktemp("report") / "results")
    write = json.loads((directory / "write-demo.json").read_text())
    (directory / "odd.json").write_text(json.dumps(write | {"model": MARKUP}))
    return directory


@pytest.fixture(scope="module")
def page(results) -> Page:
    done = report(results)
    assert done.returncode == 0, done.stderr
    return Page((results / "report.html").read_text(encoding="utf-8"))


def test_a_page_fetches_nothing(page, results):
    assert all(re.match(r"#s\d+$|data:image/svg\+xml;base64,", target) for target in page.fetched)
    css = (results / "report.html").read_text().partition("</style>")[0]
    assert "url(" not in css and "@import" not in css


def test_every_result_of_a_benchmark_has_its_part_and_its_figures(page, results):
    files = [json.loads(path.read_text()) for path in results.glob("*.json")]
    known = [r for r in files if r.get("benchmark") in RESULTS and "agentmem" in r]
    known += [r for r in files if r.get("benchmark") in ("perplexity", "capacity")]
    assert len(page.sections) == len(known) > 4
    shown = {section[1]: section for section in page.sections}
    persistence = json.loads((results / "persistence-demo.json").read_text())
    for row in persistence["rows"]:
        cells = shown["persistence-demo.json"]
        assert {
            row["ending"],
            f"{row['cold']['ttft_ms']:,.0f}",
            f"{row['lost_tokens']['median']:,.0f}",
        } <= {*cells}
    perplexity = json.loads((results / "perplexity-demo-wikitext.json").read_text())
    for row in perplexity["presets"]:
        assert {row["kv_bits"], f"{row['ppl']:.3f}", f"{row['kl']:.5f}"} <= {
            *shown["perplexity-demo-wikitext.json"]
        }


def test_every_part_says_by_what_method_on_which_machine_and_how_quiet_it_was(page, results):
    for section in page.sections:
        result = json.loads((results / section[1]).read_text())
        text = " ".join(section)
        assert len(section[2]) > 40  # what the benchmark measures
        if "machine" in result:
            assert result["machine"]["cpu"] in text and f"MLX {result['machine']['mlx']}" in text
        if "noise" in result:
            assert f"{result['noise']['probe_before_ms']:.0f} ms before" in text
            assert ("Not a quiet run" in text) is not result["noise"]["quiet"]


def test_the_file_itself_is_in_the_page_whole(page, results):
    for section in page.sections:
        assert json.loads(section[-1]) == json.loads((results / section[1]).read_text())


def test_how_far_the_values_of_a_figure_lie_apart_is_said():
    row = {
        "a": {"median": 10.0, "values": [8.0, 10.0, 12.0]},
        "b": [{"ttft_ms": 4.0, "values_ms": [4.0, 4.0]}],
    }
    assert sorted(_widths({"rows": [row], "c": {"values": [7.0]}})) == [0.0, 0.4]


def test_what_a_file_says_is_text_not_markup(page):
    assert "script" not in page.tags
    assert MARKUP in page.text


def test_other_files_are_left_out_by_name(results):
    left_out = [line for line in report(results).stdout.splitlines() if "left out" in line]
    assert any(line.startswith("splice.json: ") for line in left_out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:100], "broken.json: "),
        (
            lambda text: text.replace('"turn"', '"tern"', 1),
            "broken.json: not a whole result of agentmem bench write: rows.0",
        ),
        (lambda text: text.replace('"kept_bytes"', '"kept"'), "kept_bytes: Field required"),
        (lambda text: text.replace('"mlx"', '"xlm"'), "KeyError('mlx')"),
        (
            lambda text: json.dumps(json.loads(text) | {"rows": []}),
            "broken.json: not a whole result",
        ),
        (lambda text: "[" * 100_000, "broken.json: "),
        (lambda text: '{"benchmark": ["write"]}', "no results"),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(tmp_path, change, message):
    (tmp_path / "broken.json").write_text(change((COMMITTED / "write-demo.json").read_text()))
    done = report(tmp_path)
    assert done.returncode == FAULT
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "report.html").exists()


def test_a_directory_without_results_is_one_line(tmp_path):
    done = report(tmp_path)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (FAULT, 1)
    assert "no results" in done.stderr
