"""Models, ready to run, from their names."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HTTPError,
    RevisionResolutionError,
    StrictDataclassError,
    XetDownloadError,
)
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import _download, dequantize_model, load_tokenizer
from mlx_lm.utils import load_model as load_mlx_model

from ..errors import ModelError, program
from ..linux_cpu.demo_model import Progress, pull_demo
from .generation import end_tokens, read_generation_config, sampling_defaults
from .model_dir import ModelDir, read_model_dir
from .model_view import PREFIX, model_view
from .weights_hash import weights_hash

_T = TypeVar("_T")
_VIEW = re.compile(rf"\S*{PREFIX}\w+")
_ECHO = 200  # characters of a name that an error repeats
_PART = r"\w[\w.-]*"  # of a hub name, org/model


@dataclass(frozen=True)
class LoadedModel:
    name: str  # as asked for
    path: Path
    model: nn.Module  # evaluated; on a CPU in float32, elsewhere in its own dtypes
    tokenizer: TokenizerWrapper
    config: dict[
        str, Any
    ]  # config.json as it stands: `quantization` is of the file, not of a dequantized model
    max_context: int  # tokens
    weights_hash: str
    directory: ModelDir  # what its files say of it
    # how tokens are chosen where a request is silent, by SamplingParams' names
    sampling: dict[str, float | int] = field(default_factory=dict)


def resolve_model(name: str, home: Path, progress: Progress = print) -> Path:
    """Return the directory of 'demo', of a model under `home`/models, a path, or a hub name.

    'demo' and hub names are downloaded where they are not on this machine yet. Raises ModelError.
    """
    if name == "demo":
        return pull_demo(home, progress)
    return _directory(name, home) or _download_from_hub(name)


def find_local(name: str, home: Path) -> Path | None:
    """Do what resolve_model does without downloading: None for what is not here yet."""
    if name == "demo":
        path = home / "models" / "demo"
        return path if path.is_dir() else None
    if directory := _directory(name, home):
        return directory
    config = try_to_load_from_cache(name, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def find_config(name: str, home: Path) -> Path:
    """Return a model's config.json, which of a hub name is downloaded alone.

    Raises ModelError.
    """
    found = find_local(name, home)
    if found is not None:
        return found / "config.json"
    if name == "demo":
        hint = f"{program()} pull demo"
        raise ModelError(f"model 'demo' is not on this machine yet: {hint}")
    return Path(_from_hub(name, lambda: hf_hub_download(name, "config.json")))


def _directory(name: str, home: Path) -> Path | None:
    """Return the directory that `name` is, or None for a hub name.

    Raises ModelError for what is neither.
    """
    path = Path(name).expanduser()
    try:
        if path.exists():
            return path
    except OSError as e:
        raise ModelError(f"model {name[:_ECHO]!r} can't be read: {e.strerror}") from None
    if Path(name).name == name and (home / "models" / name).is_dir():
        return home / "models" / name
    if re.fullmatch(f"{_PART}/{_PART}", name):
        return None
    raise ModelError(
        f"model {name!r}: no such directory; "
        "name 'demo', an MLX model directory, or a hub name (org/model)"
    )


def load_model(name: str, home: Path, progress: Progress = print) -> LoadedModel:
    """Load model and tokenizer and evaluate the weights, on MLX's default device.

    On a CPU only float32 is fast (bfloat16, float16 and quantized products are scalar loops), so
    there the weights are dequantized. Raises ModelError, in one line, for a model that is missing,
    broken or of an unknown type.
    """
    path = resolve_model(name, home, progress)
    found = read_model_dir(path)
    if found.bytes > 1 << 30:
        progress(f"Loading {name} ({found.bytes / 1e9:.1f} GB) ...")
    model, tokenizer = _load(found)
    if mx.default_device().type == mx.DeviceType.cpu:
        model.set_dtype(
            mx.float32
        )  # scales first, so that codes * scales is not rounded to float16 on the way
        dequantize_model(model)
    mx.eval(model.parameters())
    generation = read_generation_config(found.path)
    tokenizer.eos_token_ids = end_tokens(tokenizer, found.config, generation)
    return LoadedModel(
        name=name,
        path=path,
        model=model,
        tokenizer=tokenizer,
        config=found.config,
        max_context=found.max_context,
        weights_hash=weights_hash(found, home / "cache"),
        directory=found,
        sampling=sampling_defaults(generation),
    )


_LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    StrictDataclassError,  # transformers', of a config field of a wrong type
)


def _load(found: ModelDir) -> tuple[nn.Module, TokenizerWrapper]:
    """Load as mlx-lm does.

    It never sets a wired limit: kernel panics are reported with one (mlx issue 3186).
    """
    try:
        with model_view(found) as view:
            model, config = load_mlx_model(view, lazy=True)
            tokenizer = load_tokenizer(view, eos_token_ids=config.get("eos_token_id"))
    except _LOAD_ERRORS as e:
        why = _VIEW.sub(str(found.path), _one_line(e))
        raise ModelError(f"model {found.path} can't be loaded: {why}") from e
    return model, tokenizer


def _download_from_hub(name: str) -> Path:
    path: Path = _from_hub(name, lambda: _download(name))
    return path


def _from_hub(name: str, download: Callable[[], _T]) -> _T:
    try:
        return download()
    except (HTTPError, RevisionResolutionError, XetDownloadError, OSError, ValueError) as e:
        raise ModelError(
            f"model {name!r} is no directory here and can't be had from the hub ({_one_line(e)}). "
            "Check the name and the network, or give --model a directory"
        ) from e


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]
