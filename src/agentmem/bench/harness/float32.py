"""The weights that agentmem computes with on a CPU, as a model directory for other servers too."""

import shutil
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import save_config, save_model

from ...linux_cpu.allocator import release_freed_memory
from ...models.loading import load_model

_REPLACED = ("*.safetensors", "*.safetensors.index.json", "config.json")
_QUANTIZED = ("quantization", "quantization_config")


def on_cpu() -> bool:
    """Tell whether float32 alone is fast, so that load_model dequantizes."""
    return bool(mx.default_device().type == mx.DeviceType.cpu)


def write_float32(model: Path, home: Path, to: Path) -> Path:
    """Write the model to `to`, dequantized, in float32, with the tokenizer's files as they are.

    Raises ModelError.
    """
    shutil.copytree(model, to, ignore=shutil.ignore_patterns(*_REPLACED))
    loaded = load_model(str(model), home)
    config = {name: value for name, value in loaded.config.items() if name not in _QUANTIZED}
    save_model(to, loaded.model, donate_model=True)
    save_config(config, to / "config.json", keep_vision_config=True)
    del loaded
    mx.clear_cache()
    release_freed_memory()
    return to
