"""The weights that agentmem computes with on a CPU, as a model directory that other servers load
too.
"""

import shutil
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import save_config, save_model

from ..linux_cpu.allocator import release_freed_memory
from ..models.loading import load_model

_REPLACED = ("*.safetensors", "*.safetensors.index.json", "config.json")


def on_cpu() -> bool:
    """Where float32 alone is fast, and load_model dequantizes."""
    return bool(mx.default_device().type == mx.DeviceType.cpu)


def write_float32(model: Path, home: Path, to: Path) -> Path:
    """Dequantized, in float32, with the tokenizer's files as they are. Raises ModelError."""
    shutil.copytree(model, to, ignore=shutil.ignore_patterns(*_REPLACED))
    loaded = load_model(str(model), home)
    config = {
        k: v for k, v in loaded.config.items() if k not in ("quantization", "quantization_config")
    }
    save_model(to, loaded.model, donate_model=True)
    save_config(config, to / "config.json", keep_vision_config=True)
    del loaded
    mx.clear_cache()
    release_freed_memory()
    return to
