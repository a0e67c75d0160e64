"""The settings of the service as a file: those that `install` was told, each with what it means."""

import json
import textwrap
from pathlib import Path
from typing import Any

from ..config import Settings

_COLUMNS = 100
_HEADER = """\
# What `agentmem service install` was told. `agentmem serve --help` lists all settings, which are
# named here with underscores. After a change: agentmem service restart
"""


def render(settings: Settings) -> str:
    """Return TOML of what was set, by flags, environment or a file. Paths are absolute."""
    values = settings.model_dump(mode="json", include=settings.model_fields_set)
    values |= _absolute_paths(settings)
    text = _HEADER
    for name, value in values.items():
        if value is not None:
            comment = textwrap.fill(
                f"{Settings.model_fields[name].description}.",
                width=_COLUMNS,
                initial_indent="# ",
                subsequent_indent="# ",
            )
            text += f"\n{comment}\n{name} = {_toml(value)}\n"
    return text


def _absolute_paths(settings: Settings) -> dict[str, str]:
    """Return paths as they are from another directory, where the service runs."""
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    paths = {name: value for name, value in given.items() if isinstance(value, Path)}
    if settings.model != "demo" and (model := Path(settings.model).expanduser()).exists():
        paths["model"] = model
    return {name: str(path.expanduser().absolute()) for name, path in paths.items()}


def _toml(value: Any) -> str:
    """Return a value as TOML. JSON's strings, numbers, booleans and lists are; infinity is not."""
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
