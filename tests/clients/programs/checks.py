"""What each program here does: one client's five ways to ask, told as JSON.

A program is run with the Python of the clients' environment, by `test_clients.py`: it is given the
server's URL, an agent's id and a file for its report, and uses the client as its own documentation
does.
"""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

URL, _agent_id, _file = sys.argv[1:]  # the URL has no path
AGENT = {"X-Agent-Id": _agent_id}  # header of every request
QUESTION = "What is the weather in Oslo?"
KEY = "none"


class Weather(BaseModel):
    """What an answer in a schema looks like."""

    city: str
    degrees: int
    is_raining: bool


def get_weather(city: str) -> str:
    """Return the weather in a city."""
    _asked.append(city)
    return "rain"


_asked: list[str] = []


def report(**checks: Callable[[], Any]) -> None:
    """Run each check, and write what each one returned, or how it failed, as JSON."""
    told = {}
    for name, check in checks.items():
        _asked.clear()
        try:
            value = check()
            told[name] = value.model_dump() if isinstance(value, BaseModel) else value
        except Exception:
            told[name] = traceback.format_exc()[-2000:]
        if _asked:
            told[f"{name}: asked for"] = list(_asked)
    Path(_file).write_text(json.dumps(told))
