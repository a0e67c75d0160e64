"""The config.json of a model to look into: of a file, a directory, a built-in, a model's name."""

from pathlib import Path
from typing import Any

from ...errors import ModelError
from ...models.model_dir import read_json

BUILT_IN = Path(__file__).parent / "configs"


def built_in_names() -> list[str]:
    return sorted(file.stem for file in BUILT_IN.glob("*.json"))


def find(name: str, home: Path) -> Path:
    """Return the config.json that `name` stands for.

    It is a file, a directory, a built-in, or a model as serve takes it. Of a hub name that is not
    on this machine the config alone is downloaded. Raises ModelError.
    """
    from ...models.loading import find_config

    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return path / "config.json"
    if name in built_in_names():
        return BUILT_IN / f"{name}.json"
    try:
        return find_config(name, home)
    except ModelError as e:
        names = ", ".join(built_in_names())
        raise ModelError(f"{e.message}; a config.json or one of {names} will do too") from None


def read_config(path: Path) -> dict[str, Any]:
    """Read a model's config. Raises ModelError, in one line, for what is none."""
    try:
        config = read_json(path)
    except OSError as e:
        raise ModelError(f"{path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise ModelError(f"{path} is no JSON: {e}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path} is no model's config: it names no model_type")
    return config
