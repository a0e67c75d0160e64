#!/usr/bin/env python3
"""Check what ruff does not: how docstrings begin, starred displays in calls, and columns.

Usage: check_style.py PATH...            print `file:line: message` for each finding; 1 if any
       check_style.py --report [PATH...] print sizes and densities, by default of src/agentmem

A folder stands for the Python and Markdown files in it that git does not ignore.
"""

import argparse
import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COLUMNS = 100
PREPOSITION = re.compile(
    r"(about|above|across|after|against|along|among|around|as|at|before|behind|below|beneath"
    r"|beside|besides|between|beyond|by|despite|during|except|for|from|in|inside|into|near|of|on"
    r"|onto|outside|over|per|since|through|throughout|to|toward|towards|under|underneath|until"
    r"|upon|via|where|whose|with|within|without)(?![\w-])",
    re.IGNORECASE,
)
Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = ast.Module | ast.ClassDef | Function
Display = ast.Tuple | ast.List | ast.Set
Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
BENCH = "bench"  # the package
GENERATED = re.compile(r"<!-- (\w+)(?:: [^>]*)? -->.*?<!-- /\1 -->", re.DOTALL)
LINK_TARGET = re.compile(r"\]\([^)\s]*\)|<?https?://[^\s)>]+>?")


@dataclass(frozen=True)
class Finding:
    line: int
    message: str


def check_file(path: Path) -> list[Finding]:
    """Return what is wrong with a .py or .md file, by line."""
    text = path.read_text(encoding="utf-8")
    findings = check_markdown(text) if path.suffix == ".md" else check_python(text)
    return sorted(findings, key=lambda finding: finding.line)


def check_python(text: str) -> Iterator[Finding]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, Documented):
            yield from _check_docstring(node)
        if isinstance(node, ast.Call):
            yield from _check_arguments(node)
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > COLUMNS and not _is_one_word(line):
            yield _too_long(number, len(line))


def check_markdown(text: str) -> Iterator[Finding]:
    """Yield prose lines that are too long: no code fence, table or generated block.

    Targets of links count nothing, since they cannot be broken.
    """
    text = GENERATED.sub(lambda block: "\n" * block[0].count("\n"), text)
    in_fence = False
    for number, line in enumerate(text.splitlines(), 1):
        is_fence = line.lstrip().startswith(("```", "~~~"))
        if is_fence:
            in_fence = not in_fence
        if in_fence or is_fence or line.lstrip().startswith("|"):
            continue
        width = len(LINK_TARGET.sub("", line))
        if width > COLUMNS:
            yield _too_long(number, width)


def _check_docstring(node: Documented) -> Iterator[Finding]:
    first = PREPOSITION.match(ast.get_docstring(node) or "")
    if first:
        yield Finding(node.body[0].lineno, f"docstring begins with a preposition: {first[0]!r}")


def _check_arguments(call: ast.Call) -> Iterator[Finding]:
    for argument in call.args:
        if isinstance(argument, ast.Starred) and isinstance(argument.value, Display):
            yield Finding(argument.lineno, "starred tuple, list or set in a call: write its items")


def _is_one_word(line: str) -> bool:
    """Return whether nothing in a line could move to the next one, such as a URL in a comment."""
    return len(line.strip().removeprefix("#").split()) <= 1


def _too_long(number: int, width: int) -> Finding:
    return Finding(number, f"{width} columns, {COLUMNS} at most")


def files_of(paths: list[Path]) -> list[Path]:
    """Return the .py and .md files among and below `paths`, in order; exit where one is missing."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    command += ["--error-unmatch", "--", *map(str, paths)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)  # git has said which
    files = [Path(name) for name in sorted(set(done.stdout.split("\0")))]
    return [path for path in files if path.suffix in (".py", ".md") and path.exists()]


def report(paths: list[Path]) -> None:
    """Print sizes and densities, less those of bench. They are outcomes to look at, not aims."""
    files: list[tuple[int, str]] = []
    functions: list[tuple[int, str]] = []
    comprehensions = lines_with_text = 0
    for path in files_of(paths):
        if path.suffix != ".py" or BENCH in path.parts:
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        files.append((len(lines), str(path)))
        lines_with_text += sum(1 for line in lines if line.strip())
        for node in ast.walk(ast.parse("\n".join(lines))):
            comprehensions += isinstance(node, Comprehension)
            if isinstance(node, Function):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                functions.append((length, f"{path}:{node.lineno} {node.name}"))
    density = 1000 * comprehensions / lines_with_text
    lengths = sorted(length for length, _ in functions)
    percentile_95 = lengths[len(lengths) * 95 // 100]
    print(f"{sum(length for length, _ in files):,} lines in {len(files)} files, without bench")
    print(f"{density:.1f} comprehensions in 1,000 lines that are not blank ({comprehensions})")
    print(f"functions: {statistics.median(lengths):.0f} lines at the median,", end=" ")
    print(f"{percentile_95} at the 95th percentile, {lengths[-1]} at most")
    _print_longest("functions", functions)
    _print_longest("files", files)


def _print_longest(what: str, sizes: list[tuple[int, str]]) -> None:
    print(f"longest {what}:")
    for length, name in sorted(sizes, reverse=True)[:5]:
        print(f"  {length:4} {name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH")
    parser.add_argument("--report", action="store_true", help="print sizes and densities instead")
    arguments = parser.parse_args()
    if arguments.report:
        report(arguments.paths or [Path("src/agentmem")])
        return 0
    if not arguments.paths:
        parser.error("which files or folders?")
    found = 0
    for path in files_of(arguments.paths):
        for finding in check_file(path):
            print(f"{path}:{finding.line}: {finding.message}")
            found += 1
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
