"""The figures in README.md and docs/, each from a result file.

What stands between `<!-- figures: NAME -->` and `<!-- /figures -->` is made from
figures/NAME.md.j2. A template gets `result("FILE.json")`, a parsed file of results/, and
`link("FILE.json")`, a link to it, which it owes the reader for every file that it reads.
tests/bench/test_figures.py checks both, and that no measured figure stands elsewhere.

    python benchmarks/figures.py            # writes all blocks anew
    python benchmarks/figures.py --check    # writes nothing, exits with 1 where a block is not up to date
"""

import argparse
import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

ROOT = Path(__file__).parent.parent
TEMPLATES, RESULTS = ROOT / "benchmarks/figures", ROOT / "benchmarks/results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n?)(.*?)(<!-- /figures -->)", re.DOTALL)


@dataclass
class Block:
    """One rendered template, and which files it used."""

    page: Path
    name: str
    read: set[str] = field(default_factory=set)
    linked: set[str] = field(default_factory=set)
    text: str = ""

    def result(self, file: str) -> Any:
        self.read.add(file)
        found = json.loads((RESULTS / file).read_text(encoding="utf-8"))
        assert not found.get("failures"), f"{file} tells of failures: no figure may come from it"
        return found

    def link(self, file: str) -> str:
        """With a word of warning where the machine was not quiet."""
        self.linked.add(file)
        noise = self.result(file).get("noise")
        disturbed = ", not a quiet run" if noise and not noise["quiet"] else ""
        return f"[{file}]({os.path.relpath(RESULTS / file, self.page.parent)}){disturbed}"


def render(page: Path, name: str) -> Block:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "n": number,
        "x": lambda ratio, digits=1: f"{ratio:.{digits}f}x",
        "size": size,
    }
    block = Block(page, name)
    template = environment.get_template(f"{name}.md.j2")
    rendered = template.render(result=block.result, link=block.link).strip()
    block.text = re.sub(r"\n{3,}", "\n\n", rendered)
    return block


def number(value: float, digits: int = 0) -> str:
    return f"{round(value, digits) + 0.0:,.{digits}f}"  # + 0.0: no minus sign before a zero


def size(nbytes: float) -> str:
    """In powers of ten."""
    unit, per = next(
        (u, p) for u, p in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3), ("B", 1)) if nbytes >= 0.9995 * p
    )
    return f"{nbytes / per:.1f} GB" if unit == "GB" else f"{nbytes / per:.0f} {unit}"


def rewritten(page: Path) -> str:
    """Its text with all blocks anew. One that begins and ends within a line stays within it."""

    def anew(found: re.Match[str]) -> str:
        text, end = render(page, found[2]).text, "\n" if found[1].endswith("\n") else ""
        return found[1] + (text if end else " ".join(text.split())) + end + found[4]

    return BLOCK.sub(anew, page.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = [page for page in PAGES if rewritten(page) != page.read_text(encoding="utf-8")]
    for page in stale:
        if check:
            print(
                f"{page.relative_to(ROOT)}: figures are not those of the result files: python benchmarks/figures.py"
            )
        else:
            page.write_text(rewritten(page), encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: written")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
