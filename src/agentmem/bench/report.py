"""Result files to one HTML page that needs nothing else: tables, pictures, and the files themselves."""

import base64
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment
from rich.table import Table

Plotter = Callable[[dict[str, Any], Path], None]


@dataclass(frozen=True)
class HtmlTable:
    names: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Section:
    name: str  # of the benchmark
    file: str
    head: str
    warning: str | None
    parts: list[str | HtmlTable]
    picture: str | None  # a data URL
    json: str


def section(file: str, result: dict[str, Any], shown: list[str | Table], plot: Plotter | None) -> Section:
    return Section(
        name=result["benchmark"],
        file=file,
        head=_head(result),
        warning=_warning(result),
        parts=[_html_table(part) if isinstance(part, Table) else part for part in shown],
        picture=_picture(plot, result) if plot else None,
        json=json.dumps(result, indent=1),
    )


def page(sections: list[Section]) -> str:
    template = Environment(autoescape=True).from_string((files(__package__) / "report.html").read_text("utf-8"))
    return template.render(sections=sections)


def _head(result: dict[str, Any]) -> str:
    machine = result.get("machine") or {}
    parts = [
        result.get("model"),
        result.get("date") or machine.get("date"),
        machine.get("cpu") and f"{machine['cpu']}, {machine['cores']} cores, {machine['ram_gib']} GiB",
        machine.get("platform"),
        machine.get("device"),
        machine.get("mlx") and f"MLX {machine['mlx']}, mlx-lm {machine['mlx_lm']}",
        result.get("agentmem") and f"agentmem {result['agentmem']}",
    ]
    told = [f"{name} = {value}" for name, value in (result.get("settings") or {}).items()]
    return "; ".join(str(part) for part in (*parts, *told) if part)


def _warning(result: dict[str, Any]) -> str | None:
    noise = result.get("noise")
    if noise is None or noise["quiet"]:
        return None
    return (
        f"Not a quiet run: a fixed computation took {noise['probe_before_ms']:.0f} ms before it "
        f"and {noise['probe_after_ms']:.0f} ms after it."
    )


def _html_table(table: Table) -> HtmlTable:
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    return HtmlTable(
        [str(column.header) for column in table.columns], [list(row) for row in zip(*columns, strict=True)]
    )


def _picture(plot: Plotter, result: dict[str, Any]) -> str:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "picture.svg"
        plot(result, path)
        return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()
