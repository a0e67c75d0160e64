"""The figures and pictures in README.md and docs/, each from a result file.

What stands between `<!-- figures: NAME -->` and `<!-- /figures -->` is made from
figures/NAME.md.j2, and a picture such as docs/ttft.svg from figures/ttft.svg.j2. A template gets
`result("FILE.json")`, a parsed file of results/, and `link("FILE.json")`, a link to it, which a
page owes its reader for every file that it reads. tests/bench/test_figures.py checks both, and
that no measured figure stands elsewhere.

    python benchmarks/figures.py            # writes all blocks anew
    python benchmarks/figures.py --check    # writes nothing; exits with 1 where one is stale
"""

import argparse
import json
import os
import re
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

ROOT = Path(__file__).parent.parent
TEMPLATES, RESULTS = ROOT / "benchmarks/figures", ROOT / "benchmarks/results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PICTURES = [ROOT / "docs/ttft.svg"]
BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n?)(.*?)(<!-- /figures -->)", re.DOTALL)


@dataclass
class Block:
    """One rendered template, and which files it used."""

    page: Path
    template: str  # its file in figures/
    read: set[str] = field(default_factory=set)
    linked: set[str] = field(default_factory=set)
    text: str = ""

    def result(self, file: str) -> Any:
        self.read.add(file)
        found = json.loads((RESULTS / file).read_text(encoding="utf-8"))
        assert not found.get("failures"), f"{file} tells of failures: no figure may come from it"
        return found

    def link(self, file: str) -> str:
        """Return a link to a file, with a word of warning where the machine was not quiet."""
        self.linked.add(file)
        noise = self.result(file).get("noise")
        disturbed = ", not a quiet run" if noise and not noise["quiet"] else ""
        return f"[{file}]({os.path.relpath(RESULTS / file, self.page.parent)}){disturbed}"


def render(page: Path, template: str) -> Block:
    """Make what `template` says of the result files, with links as they are on `page`."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"n": number, "x": factor, "size": size}
    block = Block(page, template)
    source = environment.get_template(template)
    rendered = source.render(result=block.result, link=block.link).strip()
    block.text = re.sub(r"\n{3,}", "\n\n", rendered)
    return block


def factor(ratio: float, digits: int = 1) -> str:
    return f"{ratio:.{digits}f}x"


def number(value: float, digits: int = 0) -> str:
    return f"{round(value, digits) + 0.0:,.{digits}f}"  # + 0.0: no minus sign before a zero


def size(nbytes: float) -> str:
    """Format bytes in powers of ten."""
    units = (("GB", 1e9), ("MB", 1e6), ("KB", 1e3), ("B", 1))
    unit, per = next((unit, per) for unit, per in units if nbytes >= 0.9995 * per)
    return f"{nbytes / per:.1f} GB" if unit == "GB" else f"{nbytes / per:.0f} {unit}"


def rewritten(page: Path) -> str:
    """Return a picture anew, or a page's text with all blocks anew.

    A block that begins and ends within a line stays within it; prose of any other is wrapped.
    """
    if page.suffix == ".svg":
        return render(page, f"{page.name}.j2").text + "\n"

    def anew(found: re.Match[str]) -> str:
        text = render(page, f"{found[2]}.md.j2").text
        if not found[1].endswith("\n"):
            return found[1] + " ".join(text.split()) + found[4]
        return found[1] + "\n".join(map(wrapped, text.splitlines())) + "\n" + found[4]

    return BLOCK.sub(anew, page.read_text(encoding="utf-8"))


def wrapped(line: str) -> str:
    """Wrap a paragraph that is one line; a table's rows stay whole."""
    if line.startswith("|"):
        return line
    return textwrap.fill(line, width=100, break_long_words=False, break_on_hyphens=False)


def written(page: Path) -> str:
    return page.read_text(encoding="utf-8") if page.exists() else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = [page for page in (*PAGES, *PICTURES) if rewritten(page) != written(page)]
    for page in stale:
        if check:
            name = page.relative_to(ROOT)
            print(f"{name}: not as the result files have it: python benchmarks/figures.py")
        else:
            page.write_text(rewritten(page), encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: written")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
