"""A model directory as mlx-lm and transformers can read it, whatever else lies in it."""

import json
import tempfile
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .model_dir import ModelDir, read_json

PREFIX = "agentmem-model-"  # of a view's name
_TEMPLATES = "additional_chat_templates"  # a folder that transformers reads
_WITH_TEXT = (".json", ".jinja", ".txt")


@contextmanager
def model_view(found: ModelDir) -> Iterator[Path]:
    """Yield a directory of links to what a model is loaded from, and to nothing else.

    mlx-lm loads every file that matches model*.safetensors, and takes the directory's own name for
    a part of the pattern. Neither reader takes a byte order mark, a generation_config.json that is
    no object, or the chat template in chat_template.json, so there are changed copies of these. The
    directory goes afterwards: weights that are not evaluated yet keep their files open.
    """
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        view = Path(name)
        for file in found.weight_files:
            linked = file.name if file.name.startswith("model") else f"model-{file.name}"
            (view / linked).symlink_to(file.resolve())
        _link_files(found.path, view)
        if (found.path / _TEMPLATES).is_dir():
            (view / _TEMPLATES).mkdir()
            _link_files(found.path / _TEMPLATES, view / _TEMPLATES)
        if not isinstance(_json(view / "generation_config.json"), dict):
            (view / "generation_config.json").unlink(missing_ok=True)
        _add_chat_template(view)
        yield view


def _link_files(source: Path, view: Path) -> None:
    """Link the files of a directory, but for weights and what macOS leaves beside files."""
    for file in source.iterdir():
        if file.name.startswith(".") or ".safetensors" in file.name or not file.is_file():
            continue
        if file.suffix in _WITH_TEXT and _has_bom(file):
            (view / file.name).write_bytes(file.read_bytes().removeprefix(BOM_UTF8))
        else:
            (view / file.name).symlink_to(file.resolve())


def _has_bom(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(BOM_UTF8)) == BOM_UTF8


def _add_chat_template(view: Path) -> None:
    """Give the tokenizer the template of chat_template.json, where it has none of its own."""
    legacy = _json(view / "chat_template.json")
    path = view / "tokenizer_config.json"
    config = _json(path) if path.exists() else {}
    if not isinstance(legacy, dict) or not isinstance(config, dict):
        return
    has_own = (view / "chat_template.jinja").exists() or config.get("chat_template") is not None
    if not has_own and isinstance(legacy.get("chat_template"), str | list):
        path.unlink(missing_ok=True)
        path.write_text(json.dumps(config | {"chat_template": legacy["chat_template"]}))


def _json(path: Path) -> Any:
    """Return what a JSON file holds; None where it is not there, or is no JSON."""
    try:
        return read_json(path)
    except (OSError, ValueError, RecursionError):
        return None
