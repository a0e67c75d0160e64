"""What an MLX model directory says about itself, read from config.json and the safetensors headers
alone.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def read_model_dir(path: Path) -> ModelDir:
    """Check that a directory holds a whole MLX model. Raises ModelError, in one line, with what is
    wrong with it.
    """
    if not path.is_dir():
        raise ModelError(f"model {path}: no such directory")
    config = _read_config(path / "config.json")
    files = tuple(sorted(path.glob("*.safetensors")))
    missing = sorted(_indexed_files(path) - {file.name for file in files})
    if not files or missing:
        raise ModelError(
            f"model {path}: {', '.join(missing) or 'model.safetensors'} is missing; download it again"
        )
    tensors = {
        name: entry for file in files for name, entry in read_safetensors_header(file).items()
    }
    return ModelDir(
        path=path,
        config=config,
        weight_files=files,
        model_type=config["model_type"],
        parameters=_count_parameters(tensors, config),
        dtype=_dtype(tensors, config),
        max_context=max_context(config),
        bytes=sum(file.stat().st_size for file in files),
    )


def max_context(config: dict[str, Any]) -> int:
    """Positions the model was made for, in tokens; multimodal models keep it in text_config."""
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        value = section.get("max_position_embeddings")
        if isinstance(value, int) and value > 0:
            return value
    return DEFAULT_MAX_CONTEXT


def read_safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Name to dtype, shape and data_offsets. Raises ModelError unless the file is as long as its
    header says.

    MLX maps weights lazily, so a file cut short would otherwise show up in the middle of a forward
    pass.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            size = path.stat().st_size
            if length > size:
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (
        OSError,
        struct.error,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
    ) as e:
        raise ModelError(f"model file {path} is broken ({e}); download it again") from None
    if size != end:
        raise ModelError(
            f"model file {path} has {size} bytes, its header says {end}; download it again"
        )
    return header


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
    """Weight files that model.safetensors.index.json names, where a model is split."""
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


def _count_parameters(tensors: dict[str, dict[str, Any]], config: dict[str, Any]) -> int:
    total = 0
    for name, entry in tensors.items():
        module, _, part = name.rpartition(".")
        quantized = f"{module}.scales" in tensors
        if quantized and part in ("scales", "biases"):
            continue
        count = math.prod(entry["shape"])
        if quantized and entry["dtype"] == "U32":  # codes are packed into 32-bit words
            section = _quantization(config)
            own = section.get(module)
            bits = (own if isinstance(own, dict) else section).get("bits", 4)
            count = count * 32 // bits
        total += count
    return total


def _dtype(tensors: dict[str, dict[str, Any]], config: dict[str, Any]) -> str:
    """The commonest floating dtype by tensors, and the width of the codes where there are any."""
    floating = [
        entry["dtype"] for entry in tensors.values() if entry["dtype"] in ("F16", "BF16", "F32")
    ]
    names = [max(sorted(set(floating)), key=floating.count)] if floating else []
    if bits := _quantization(config).get("bits"):
        names.append(f"{bits}-bit")
    return ", ".join(names)
