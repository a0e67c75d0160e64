"""Result files to one HTML page that needs nothing else: tables, pictures, and the files
themselves.
"""

import base64
import importlib
import json
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment
from rich.table import Table

Plotter = Callable[[dict[str, Any], Path], None]


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


def section(
    file: str, result: dict[str, Any], shown: list[str | Table], plot: Plotter | None
) -> Section:
    """`shown`: what the command prints. Raises KeyError where the result is not whole."""
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
    template = Environment(autoescape=True).from_string(
        (files(__package__) / "report.html").read_text("utf-8")
    )
    return template.render(sections=sections)


def _head(result: dict[str, Any]) -> dict[str, str]:
    machine, noise = result.get("machine") or {}, result.get("noise")
    settings = [f"{name} = {value}" for name, value in (result.get("settings") or {}).items()]
    versions = [f"agentmem {result['agentmem']}"] if "agentmem" in result else []
    if machine:
        versions += [
            f"MLX {machine['mlx']}",
            f"mlx-lm {machine['mlx_lm']}",
            f"Python {machine['python']}",
        ]
    parts = {
        "model": result.get("model"),
        "settings": ", ".join(settings),
        "date": result.get("date") or machine.get("date"),
        "machine": machine
        and f"{machine['cpu']}, {machine['cores']} cores, {machine['ram_gib']} GiB of RAM",
        "system": machine and f"{machine['platform']}, {machine['device']}",
        "versions": ", ".join(versions),
        "passes": result.get("passes"),
        "spread": _spread(sorted(_widths(result))),
        "noise": noise
        and "a fixed computation took {probe_before_ms:.0f} ms before, {probe_after_ms:.0f} after".format(
            **noise
        ),
    }
    return {name: str(value) for name, value in parts.items() if value}


def _widths(part: Any) -> Iterator[float]:
    """Of every figure in a result with several values: most less least, over the median."""
    if isinstance(part, dict):
        values = part.get("values") or part.get("values_ms") or []
        if len(values) > 1 and (middle := statistics.median(values)):
            yield (max(values) - min(values)) / abs(middle)
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    for child in inner:
        yield from _widths(child)


def _spread(widths: list[float]) -> str | None:
    if not widths:
        return None
    half, widest = (f"{100 * width:.0f} %" for width in (widths[len(widths) // 2], widths[-1]))
    return f"from a figure's least value to its most: {half} of the median in half of the figures, {widest} at most"


def _method(benchmark: str) -> list[str | list[str]]:
    """The docstring of its module: paragraphs, and lists of lines such as "- ITEM" and "NAME   WHAT
    IT IS".
    """
    text = importlib.import_module(f".{benchmark}", __package__).__doc__
    assert text
    return [
        _items(part) if re.match(_ITEM, part) else " ".join(part.split())
        for part in text.strip().split("\n\n")
    ]


_ITEM = r"- |\w+ {2,}"


def _items(paragraph: str) -> list[str]:
    items = re.split(rf"\n(?={_ITEM})", paragraph)
    return [
        " ".join(re.sub(r"^(\w+) {2,}", r"\1: ", item.removeprefix("- ")).split()) for item in items
    ]


def _warning(result: dict[str, Any]) -> str | None:
    noise = result.get("noise")
    if noise is None or noise["quiet"]:
        return None
    return f"Not a quiet run: a fixed computation's time changed by {100 * noise['change']:+.0f} %. Measure again."


def _html_table(table: Table) -> HtmlTable:
    columns = [Column(str(column.header), column.justify == "left") for column in table.columns]
    cells = ([str(cell) for cell in column.cells] for column in table.columns)
    return HtmlTable(columns, [list(row) for row in zip(*cells, strict=True)])


def _picture(plot: Plotter, result: dict[str, Any]) -> str:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "picture.svg"
        plot(result, path)
        return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()
