"""What commands print: tables, sizes, times, bars of progress and JSON."""

import json
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

_WIDE = 200  # columns where nobody looks: a program wants whole lines
# s
_MINUTE = 60
_HOUR = 60 * _MINUTE
_DAY = 24 * _HOUR


def size(nbytes: float) -> str:
    """Write a number of bytes in decimal units, such as "1.5 MB"."""
    for unit in ("B", "KB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} GB"


def ago(moment: float) -> str:
    """Write how long a Unix time is past, in its largest unit."""
    seconds = max(0, time.time() - moment)
    for unit, length in (("d", _DAY), ("h", _HOUR), ("min", _MINUTE)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def duration(seconds: float) -> str:
    """Write seconds in their two largest units."""
    minutes, hours, days = (int(seconds // length) for length in (_MINUTE, _HOUR, _DAY))
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {seconds % 60:.0f} s" if minutes else f"{seconds:.0f} s"


def counted(n: int, one: str, many: str = "") -> str:
    """Write "1 turn" or "2 turns"."""
    return f"{n:,} {one}" if n == 1 else f"{n:,} {many or one + 's'}"


def table(*names: str, left: int = 1) -> Table:
    """Make a table of these columns, the first `left` to the left, numbers to the right.

    The very first folds where a terminal is narrow.
    """
    made = Table(box=None, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    for i, name in enumerate(names):
        made.add_column(
            name, justify="left" if i < left else "right", overflow="fold", no_wrap=i > 0
        )
    return made


def progress_bar(*columns: ProgressColumn) -> Progress:
    """Make a bar on stderr: its description, then `columns`, by default rich's.

    It is silent where nobody looks: stderr is for errors.
    """
    text = TextColumn("{task.description}", markup=False)
    shown = console(stderr=True)
    # the time moves within a long step, too
    usual = (*Progress.get_default_columns()[1:], TimeElapsedColumn())
    rest = columns or usual
    return Progress(text, *rest, console=shown, transient=True, disable=not shown.is_terminal)


def console(*, stderr: bool = False) -> Console:
    """Make a console of the terminal's width, and a wide one where nobody looks."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _WIDE
    return Console(stderr=stderr, width=width, markup=False)


def print_json(answer: Any) -> None:
    print(json.dumps(answer, indent=2, ensure_ascii=False))
