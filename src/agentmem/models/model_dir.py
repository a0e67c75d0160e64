"""What an MLX model directory says about itself in config.json and the headers of its weights."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import ModelError

_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
_MAX_SHARDS = 1000
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".npz", ".pt", ".pth")  # of this kind and others
_LISTED = 3  # file names that an error lists
DEFAULT_MAX_CONTEXT = 32_768  # tokens, where config.json names no limit


@dataclass(frozen=True)
class ModelDir:
    path: Path
    config: dict[str, Any]
    weight_files: tuple[Path, ...]
    model_type: str
    parameters: int  # a quantized matrix counts its codes, not its scales and biases
    dtype: str  # such as "F16", or "F16, 4-bit"
    max_context: int  # tokens
    bytes: int  # of the weight files
    modified: float  # Unix seconds, of the newest of them


def read_model_dir(path: Path) -> ModelDir:
    """Check that a directory holds a whole MLX model, and return what it says.

    Raises ModelError, in one line, with what is wrong with it.
    """
    try:
        return _read_model_dir(path)
    except OSError as e:
        raise ModelError(f"model {path} can't be read: {e.strerror}") from None


def _read_model_dir(path: Path) -> ModelDir:
    if not path.is_dir():
        what = "it is a file; name its directory" if path.is_file() else "no such directory"
        raise ModelError(f"model {path}: {what}")
    config = _read_config(path / "config.json")
    weights = _read_weights(path)
    tensors: dict[str, TensorHeader] = {}
    for headers in weights.values():
        tensors |= headers
    stats = [file.stat() for file in weights]
    return ModelDir(
        path=path,
        config=config,
        weight_files=tuple(weights),
        model_type=config["model_type"],
        parameters=_count_parameters(tensors, config),
        dtype=_dtype(tensors, config),
        max_context=max_context(config),
        bytes=sum(stat.st_size for stat in stats),
        modified=max(stat.st_mtime for stat in stats),
    )


def read_json(path: Path) -> Any:
    """Return what a JSON file holds, which may begin with a byte order mark.

    Raises OSError, ValueError and RecursionError.
    """
    return json.loads(path.read_text(encoding="utf-8-sig"))


def max_context(config: dict[str, Any]) -> int:
    """Return how many tokens the model was made for; multimodal ones say it in text_config."""
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        value = section.get("max_position_embeddings")
        if isinstance(value, int) and value > 0:
            return value
    return DEFAULT_MAX_CONTEXT


@dataclass(frozen=True)
class TensorHeader:
    dtype: str  # in safetensors' names: "F16", "U32"
    shape: tuple[int, ...]


def read_headers(path: Path) -> dict[str, TensorHeader]:
    """Return what a safetensors file says of its tensors, by name.

    Raises ModelError unless the file is as long as its header says: MLX maps weights lazily, so a
    file cut short would otherwise show up in the middle of a forward pass.
    """
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: TensorHeader(tensor.get_dtype(), tuple(tensor.get_shape()))
                for name, tensor in slices.items()
            }
    except SafetensorError as e:
        what = f"model file {path} of {path.stat().st_size:,} bytes"
        raise ModelError(f"{what} is broken ({e}); download it again") from None
    except OSError as e:
        raise ModelError(f"model file {path} is broken ({e}); download it again") from None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = read_json(path)
    except FileNotFoundError:
        what = "it has no config.json, so it is no MLX model directory"
        if snapshots := sorted(path.parent.glob("snapshots/*/config.json")):
            what = f"it is a cache of the hub; name {snapshots[-1].parent}"
        raise ModelError(f"model {path.parent}: {what}") from None
    except (OSError, ValueError, RecursionError) as e:
        raise ModelError(f"model {path.parent}: config.json can't be read: {e}") from None
    if not isinstance(config, dict):
        raise ModelError(f"model {path.parent}: config.json is no object; it names no model_type")
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"model {path.parent}: config.json names no model_type")
    return config


def _read_weights(path: Path) -> dict[Path, dict[str, TensorHeader]]:
    """Return the weight files that the model is made of, in order, and their headers.

    They are those that model.safetensors.index.json names, if any of them is there: it stays behind
    where a model was written anew. Else they are all that mlx-lm would load, but for what adds
    nothing to model.safetensors, or to its numbered shards: a copy, or what a download left over.
    """
    names = {file.name for file in path.iterdir() if file.suffix == ".safetensors"}
    indexed = _indexed_files(path)
    if any((path / name).exists() for name in indexed):
        if missing := sorted(name for name in indexed if not (path / name).exists()):
            raise _missing(path, missing)
        return {path / name: read_headers(path / name) for name in sorted(indexed)}
    own = sorted(name for name in names if name == "model.safetensors" or _SHARD.fullmatch(name))
    others = sorted(name for name in names if name.startswith("model") and name not in own)
    if missing := sorted(_shards(own) - names):
        raise _missing(path, missing)
    if not own and not others:
        raise _missing(path, sorted(indexed) or ["model.safetensors"])
    found: dict[Path, dict[str, TensorHeader]] = {}
    known: set[str] = set()
    for name in [*own, *others]:
        is_stray = bool(own) and name not in own
        headers = _headers_of_stray(path / name) if is_stray else read_headers(path / name)
        if found and headers.keys() <= known:
            continue
        found[path / name] = headers
        known |= headers.keys()
    return found


def _headers_of_stray(file: Path) -> dict[str, TensorHeader]:
    try:
        return read_headers(file)
    except ModelError:  # loading tells where the model lacks what was in it
        return {}


def _shards(names: Iterable[str]) -> set[str]:
    """Return the names of all shards of which some are there: 1 to 3 of model-00001-of-00003."""
    shards: set[str] = set()
    for match in filter(None, map(_SHARD.fullmatch, names)):
        digits = len(match[1])
        numbers = range(1, min(int(match[2]), _MAX_SHARDS) + 1)
        shards |= {f"model-{number:0{digits}}-of-{match[2]}.safetensors" for number in numbers}
    return shards


def _missing(path: Path, names: Sequence[str]) -> ModelError:
    """Return the error for weight files that are not there, with those that are there instead."""
    listed = ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
    verb = "is" if len(names) == 1 else "are"
    others = sorted(
        file.name
        for file in path.iterdir()
        if file.suffix in _WEIGHTS and not file.name.startswith(".")
    )
    instead = f" (there is {', '.join(others[:_LISTED])})" if others else ""
    return ModelError(f"model {path}: {listed} {verb} missing{instead}; download it again")


def _indexed_files(path: Path) -> set[str]:
    """Return the weight files that model.safetensors.index.json names, where a model is split."""
    try:
        index = read_json(path / "model.safetensors.index.json")
        names = set(index["weight_map"].values())
        if wrong := sorted(name for name in names if Path(name).name != name):
            raise ValueError(f"{wrong[0]!r} is no file of the directory")
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ModelError(
            f"model {path}: model.safetensors.index.json can't be read ({e})"
        ) from None
    return names


def _quantization(config: dict[str, Any]) -> dict[str, Any]:
    section = config.get("quantization")
    return section if isinstance(section, dict) else {}


def _count_parameters(tensors: dict[str, TensorHeader], config: dict[str, Any]) -> int:
    total = 0
    for name, entry in tensors.items():
        module, _, part = name.rpartition(".")
        quantized = f"{module}.scales" in tensors
        if quantized and part in ("scales", "biases"):
            continue
        count = math.prod(entry.shape)
        if quantized and entry.dtype == "U32":  # codes are packed into 32-bit words
            section = _quantization(config)
            own = section.get(module)
            bits = (own if isinstance(own, dict) else section).get("bits", 4)
            count = count * 32 // bits
        total += count
    return total


def _dtype(tensors: dict[str, TensorHeader], config: dict[str, Any]) -> str:
    """Name the commonest floating dtype by tensors, and the width of codes if there are any."""
    dtypes = [entry.dtype for entry in tensors.values()]
    floating = [dtype for dtype in dtypes if dtype in ("F16", "BF16", "F32")]
    names = [max(sorted(set(floating)), key=floating.count)] if floating else []
    if bits := _quantization(config).get("bits"):
        names.append(f"{bits}-bit")
    return ", ".join(names)
