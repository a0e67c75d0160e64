"""What an MLX model directory says about itself in config.json and the headers of its weights."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import ModelError

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
    if not path.is_dir():
        raise ModelError(f"model {path}: no such directory")
    config = _read_config(path / "config.json")
    files = tuple(sorted(path.glob("*.safetensors")))
    missing = sorted(_indexed_files(path) - {file.name for file in files})
    if not files or missing:
        names = ", ".join(missing) or "model.safetensors"
        raise ModelError(f"model {path}: {names} is missing; download it again")
    tensors: dict[str, TensorHeader] = {}
    for file in files:
        tensors |= read_headers(file)
    stats = [file.stat() for file in files]
    return ModelDir(
        path=path,
        config=config,
        weight_files=files,
        model_type=config["model_type"],
        parameters=_count_parameters(tensors, config),
        dtype=_dtype(tensors, config),
        max_context=max_context(config),
        bytes=sum(stat.st_size for stat in stats),
        modified=max(stat.st_mtime for stat in stats),
    )


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
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"model {path.parent}: it has no config.json, so it is no MLX model directory"
        ) from None
    except (OSError, ValueError) as e:
        raise ModelError(f"model {path.parent}: config.json can't be read: {e}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"model {path.parent}: config.json names no model_type")
    return config


def _indexed_files(path: Path) -> set[str]:
    """Return the weight files that model.safetensors.index.json names, where a model is split."""
    try:
        index = json.loads((path / "model.safetensors.index.json").read_text(encoding="utf-8"))
        return set(index["weight_map"].values())
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ModelError(
            f"model {path}: model.safetensors.index.json can't be read ({e})"
        ) from None


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
