"""The settings of the service as a file: those that `install` was told, each with what it means."""

import json
from pathlib import Path
from typing import Any

from ..config import Settings

_HEADER = """\
# What `agentmem service install` was told. `agentmem serve --help` lists all settings, which are named here with
# underscores. After a change: agentmem service restart
"""


def render(settings: Settings) -> str:
    """TOML of what was set, by flags, environment or a file: not of defaults. Paths are absolute."""
    values = settings.model_dump(mode="json", include=settings.model_fields_set) | _absolute_paths(
        settings
    )
    lines = [
        f"\n# {Settings.model_fields[name].description}\n{name} = {_toml(value)}\n"
        for name, value in values.items()
        if value is not None
    ]
    return _HEADER + "".join(lines)


def _absolute_paths(settings: Settings) -> dict[str, str]:
    """The service runs in another directory."""
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    paths = {name: value for name, value in given.items() if isinstance(value, Path)}
    if settings.model != "demo" and (model := Path(settings.model).expanduser()).exists():
        paths["model"] = model
    return {name: str(path.expanduser().absolute()) for name, path in paths.items()}


def _toml(value: Any) -> str:
    """JSON's strings, numbers, booleans and lists are TOML's; its infinity is not."""
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
