"""`agentmem bench report`: result files to one page."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import StartupError
from .common import check_writable, tables

if TYPE_CHECKING:
    from ..bench.report import Plotter, Section

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
    from importlib.util import find_spec

    from ..bench import plot as plots
    from ..bench.report import page
    from ..bench.schemas import RESULTS

    output = output or directory / "report.html"
    check_writable(output)
    pictures = find_spec("matplotlib") is not None
    sections = []
    for file in sorted(directory.glob("*.json")):
        result = _read(file)
        if result is None:
            print(f"{file.name}: left out: not a result of agentmem bench, or of an older one")
            continue
        name = result["benchmark"]
        plot = getattr(plots, f"plot_{name}", None) if pictures else None
        sections.append(_section(file, result, plot))
    if not sections:
        raise StartupError(
            f"{directory}: no results of agentmem bench there; write some with --json"
        )
    sections.sort(key=lambda of: [*RESULTS, *_OF_DICTS].index(of.name))
    output.write_text(page(sections), encoding="utf-8")
    print(
        f"{output}: {len(sections)} results"
        + ("" if pictures else "; pip install 'agentmem[bench]' adds pictures")
    )


_OF_DICTS = ("perplexity", "capacity")  # whose files have no class


def _read(file: Path) -> dict[str, Any] | None:
    """None where it is something else. Raises StartupError where it can't be read."""
    from ..bench.schemas import RESULTS

    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise StartupError(f"{file}: {e}") from None
    name = str(result.get("benchmark")) if isinstance(result, dict) else None
    return result if name in _OF_DICTS or (name in RESULTS and "agentmem" in result) else None


def _section(file: Path, result: dict[str, Any], plot: "Plotter | None") -> "Section":
    from pydantic import ValidationError

    from ..bench.report import section
    from ..bench.schemas import RESULTS, result_class

    name = result["benchmark"]
    try:
        read = result_class(name)(**result) if name in RESULTS else result
        return section(file.name, result, tables(name, read), plot)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise StartupError(
            f"{file}: not a whole result of agentmem bench {name}: {where}: {first['msg']}"
        ) from None
    except (KeyError, TypeError, IndexError, AttributeError, StartupError) as e:
        raise StartupError(f"{file}: not a whole result of agentmem bench {name}: {e!r}") from None
