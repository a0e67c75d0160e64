"""`agentmem bench report`: result files to one page."""

import importlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import StartupError
from .common import Shown, check_writable

Directory = Annotated[Path, typer.Argument(help="directory with result files (*.json)", metavar="DIR")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="the page (default: DIR/report.html)")]

# benchmark: name of its result's class in bench/, whether bench/plot.py has a picture of it
_KNOWN = {
    "ttft": ("TtftResult", True),
    "throughput": ("ThroughputResult", True),
    "staggered": ("StaggeredResult", True),
    "persistence": ("PersistenceResult", False),
    "restore": ("RestoreResult", False),
    "write": ("WriteResult", True),
    "ablation": ("AblationResult", False),
    "scenario": ("ScenarioResult", True),
    "compare": ("CompareResult", True),
}


def report(directory: Directory, output: Output = None) -> None:
    """One self-contained HTML page of all result files in a directory, with pictures where matplotlib is installed."""
    from importlib.util import find_spec

    from ..bench.report import page, section

    output = output or directory / "report.html"
    check_writable(output)
    pictures = find_spec("matplotlib") is not None
    sections = []
    for file in sorted(directory.glob("*.json")):
        result = _read(file)
        if result is None:
            print(f"{file.name}: left out: not a result of agentmem bench")
            continue
        plot = _plotter(result["benchmark"]) if pictures else None
        sections.append(section(file.name, result, _tables(file, result), plot))
    if not sections:
        raise StartupError(f"{directory}: no results of agentmem bench there; write some with --json")
    output.write_text(page(sections), encoding="utf-8")
    print(f"{output}: {len(sections)} results" + ("" if pictures else "; pip install 'agentmem[bench]' adds pictures"))


def _read(file: Path) -> dict[str, Any] | None:
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise StartupError(f"{file}: {e}") from None
    if not isinstance(result, dict) or result.get("benchmark") not in _KNOWN | _DICTS:
        return None
    return result


_DICTS = {"perplexity": True, "capacity": False}  # whose tables are made of the file as it is; whether with a picture


def _tables(file: Path, result: dict[str, Any]) -> list[Shown]:
    from pydantic import ValidationError

    name = result["benchmark"]
    command = importlib.import_module(f".{name}", __package__)
    try:
        read = result
        if name in _KNOWN:
            read = getattr(importlib.import_module(f"..bench.{name}", __package__), _KNOWN[name][0])(**result)
        shown: list[Shown] = command.tables(read)
    except (ValidationError, KeyError, TypeError) as e:
        raise StartupError(f"{file}: not a whole result of agentmem bench {name}: {e}") from None
    return shown


def _plotter(name: str) -> Any:
    from ..bench import plot

    return getattr(plot, f"plot_{name}") if _KNOWN.get(name, ("", False))[1] or _DICTS.get(name) else None
