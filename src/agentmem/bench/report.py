"""Result files to one HTML page that needs nothing else.

It has tables, pictures, and the files themselves.
"""

import base64
import importlib
import json
import re
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from jinja2 import Environment
from pydantic import ValidationError
from rich.table import Table

from ..errors import StartupError
from .harness.options import Shown, check_writable, plotter, tables
from .harness.plot import Plotter
from .harness.schemas import RESULTS, result_class

_OF_DICTS = ("perplexity", "capacity")  # whose files have no class
_MACHINE = "{cpu}, {cores} cores, {ram_gib} GiB of RAM"
_NOISE = "a fixed computation took {probe_before_ms:.0f} ms before, {probe_after_ms:.0f} after"


@dataclass(frozen=True)
class Column:
    name: str
    left: bool


@dataclass(frozen=True)
class HtmlTable:
    columns: list[Column]
    rows: list[list[str]]


@dataclass(frozen=True)
class Section:
    name: str  # of the benchmark
    file: str
    head: dict[str, str]
    warning: str | None
    method: list[str | list[str]]
    parts: list[str | HtmlTable]
    picture: str | None  # a data URL
    json: str


def section(file: str, result: dict[str, Any], shown: list[Shown], plot: Plotter | None) -> Section:
    """Make the section of one result. `shown`: what its command prints.

    Raises KeyError where the result is not whole.
    """
    return Section(
        name=result["benchmark"],
        file=file,
        head=_head(result),
        warning=_warning(result),
        method=_method(result["benchmark"]),
        parts=[_html_table(part) if isinstance(part, Table) else part for part in shown],
        picture=_picture(plot, result) if plot else None,
        json=json.dumps(result, indent=1),
    )


def page(sections: list[Section]) -> str:
    text = (files(__package__) / "report.html").read_text("utf-8")
    return Environment(autoescape=True).from_string(text).render(sections=sections)


def _head(result: dict[str, Any]) -> dict[str, str]:
    machine = result.get("machine") or {}
    noise = result.get("noise")
    settings = result.get("settings") or {}
    versions = []
    if "agentmem" in result:
        versions.append(f"agentmem {result['agentmem']}")
    if machine:
        versions.append("MLX {mlx}, mlx-lm {mlx_lm}, Python {python}".format(**machine))
    parts = {
        "model": result.get("model"),
        "settings": ", ".join(f"{name} = {value}" for name, value in settings.items()),
        "date": result.get("date") or machine.get("date"),
        "machine": machine and _MACHINE.format(**machine),
        "system": machine and "{platform}, {device}".format(**machine),
        "versions": ", ".join(versions),
        "passes": result.get("passes"),
        "spread": _spread(sorted(_widths(result))),
        "noise": noise and _NOISE.format(**noise),
    }
    return {name: str(value) for name, value in parts.items() if value}


def _widths(part: Any) -> Iterator[float]:
    """Yield the width of every figure with several values: most less least, over the median."""
    inner = []
    if isinstance(part, dict):
        values = part.get("values") or part.get("values_ms") or []
        if len(values) > 1:
            middle = statistics.median(values)
            if middle:
                yield (max(values) - min(values)) / abs(middle)
        inner = list(part.values())
    elif isinstance(part, list):
        inner = part
    for child in inner:
        yield from _widths(child)


def _spread(widths: list[float]) -> str | None:
    if not widths:
        return None
    half = f"{100 * widths[len(widths) // 2]:.0f} %"
    widest = f"{100 * widths[-1]:.0f} %"
    return (
        f"from a figure's least value to its most: {half} of the median "
        f"in half of the figures, {widest} at most"
    )


def _method(benchmark: str) -> list[str | list[str]]:
    """Return the docstring of its module: paragraphs, and lists.

    The items of a list are lines such as "- ITEM" and "NAME   WHAT IT IS".
    """
    text = importlib.import_module(f".{benchmark}", __package__).__doc__
    assert text
    made: list[str | list[str]] = []
    for part in text.strip().split("\n\n"):
        made.append(_items(part) if re.match(_ITEM, part) else " ".join(part.split()))
    return made


_ITEM = r"- |\w+ {2,}"


def _items(paragraph: str) -> list[str]:
    items = []
    for item in re.split(rf"\n(?={_ITEM})", paragraph):
        text = re.sub(r"^(\w+) {2,}", r"\1: ", item.removeprefix("- "))
        items.append(" ".join(text.split()))
    return items


def _warning(result: dict[str, Any]) -> str | None:
    noise = result.get("noise")
    if noise is None or noise["quiet"]:
        return None
    change = f"{100 * noise['change']:+.0f} %"
    return f"Not a quiet run: a fixed computation's time changed by {change}. Measure again."


def _html_table(shown: Table) -> HtmlTable:
    columns = [Column(str(column.header), column.justify == "left") for column in shown.columns]
    cells = []
    for column in shown.columns:
        cells.append([str(cell) for cell in column.cells])
    return HtmlTable(columns, [list(row) for row in zip(*cells, strict=True)])


def _picture(plot: Plotter, result: dict[str, Any]) -> str:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "picture.svg"
        plot(result, path)
        return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()


Directory = Annotated[
    Path, typer.Argument(help="directory with result files (*.json)", metavar="DIR")
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="the page (default: DIR/report.html)")
]


def report(directory: Directory, output: Output = None) -> None:
    """One self-contained HTML page of all result files in a directory, with pictures where
    matplotlib is installed.
    """
    output = output or directory / "report.html"
    check_writable(output)
    pictures = find_spec("matplotlib") is not None
    sections = []
    for file in sorted(directory.glob("*.json")):
        result = _read(file)
        if result is None:
            print(f"{file.name}: left out: not a result of agentmem bench, or of an older one")
            continue
        plot = plotter(result["benchmark"]) if pictures else None
        sections.append(_section_of(file, result, plot))
    if not sections:
        raise StartupError(
            f"{directory}: no results of agentmem bench there; write some with --json"
        )
    order = [*RESULTS, *_OF_DICTS]
    sections.sort(key=lambda of: order.index(of.name))
    output.write_text(page(sections), encoding="utf-8")
    hint = "" if pictures else "; pip install 'agentmem[bench]' adds pictures"
    print(f"{output}: {len(sections)} results{hint}")


def _read(file: Path) -> dict[str, Any] | None:
    """Read a result; None where it is something else.

    Raises StartupError where it can't be read.
    """
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise StartupError(f"{file}: {e}") from None
    if not isinstance(result, dict):
        return None
    name = str(result.get("benchmark"))
    known = name in _OF_DICTS or (name in RESULTS and "agentmem" in result)
    return result if known else None


def _section_of(file: Path, result: dict[str, Any], plot: Plotter | None) -> Section:
    name = result["benchmark"]
    broken = f"{file}: not a whole result of agentmem bench {name}"
    try:
        read = result_class(name)(**result) if name in RESULTS else result
        return section(file.name, result, tables(name, read), plot)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise StartupError(f"{broken}: {where}: {first['msg']}") from None
    except (KeyError, TypeError, IndexError, AttributeError, StartupError) as e:
        raise StartupError(f"{broken}: {e!r}") from None
