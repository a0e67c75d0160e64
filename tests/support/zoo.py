"""A tiny model with random weights for every model type of the installed mlx-lm, built by mlx-lm's
own classes.
"""

import importlib
import pkgutil
import re
import sys
import tomllib
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import MODEL_REMAPPING

from agentmem.models.loading import LoadedModel
from support.fake_engine import NOWHERE, tiny_tokenizer
from support.tiny import VOCAB

_CONFIGS = tomllib.loads((Path(__file__).parent / "zoo.toml").read_text())
_HAS_MODEL = re.compile(r"^class Model\(|^from \..* import .*\bModel\b", re.MULTILINE)


def _model_modules() -> tuple[str, ...]:
    """Read off the sources: importing all of them takes seconds, and one of them exits the
    interpreter.
    """
    found = []
    for info in pkgutil.iter_modules(mlx_lm.models.__path__):
        source = Path(mlx_lm.models.__path__[0], f"{info.name}.py")
        if _HAS_MODEL.search(source.read_text()) and "class ModelArgs" in source.read_text():
            found.append(info.name)
    return tuple(sorted(found))


MODEL_TYPES = _model_modules()
ALIASES = tuple(
    sorted(set(MODEL_REMAPPING) - set(MODEL_TYPES))
)  # types that share another one's module

_METAL = "its kernel is written for Metal alone"
UNBUILDABLE = {
    "olmo": "adds a mask, the word 'causal', to scores: ValueError, Cannot perform inplace addition"
}
if not mx.metal.is_available():
    UNBUILDABLE |= {
        "bitnet": f"{_METAL} (bitlinear_layers.py): RuntimeError, No Metal back-end",
        "muse_spark": f"{_METAL} (kernels/qk_norm_rope.py): RuntimeError, No Metal back-end",
    }


def module_of(model_type: str) -> ModuleType:
    if (
        model_type == "olmo"
    ):  # it exits the interpreter where the package of that checkpoint's format is missing
        sys.modules.setdefault("hf_olmo", ModuleType("hf_olmo"))
    return importlib.import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(model_type, model_type)}")


def config_of(model_type: str) -> dict[str, Any]:
    """What a config.json of that type would hold; text_config repeats it, for the types that look
    there.
    """
    module = MODEL_REMAPPING.get(model_type, model_type)
    entry = dict(_CONFIGS["types"].get(module, {}))
    like = entry.pop("like", model_type)
    shared = _CONFIGS["types"].get(like, {}) if like != model_type else {}
    config = {"rope_scaling": None, **_CONFIGS["common"], **shared, **entry}
    return deepcopy(
        {**config, "model_type": model_type, "text_config": {**config, "model_type": like}}
    )


def tiny(model_type: str, seed: int = 0) -> nn.Module:
    """One to four layers, one of each kind the architecture has; float32, evaluated."""
    mx.random.seed(seed)
    module = module_of(model_type)
    model = module.Model(module.ModelArgs.from_dict(config_of(model_type)))
    if (
        model_type == "phi3small"
    ):  # it writes -inf over ids of its own vocabulary: here, past the end of the logits
        model._dummy_tokenizer_ids = mx.array([], mx.int32)
    _randomize(model)
    mx.eval(model.parameters())
    return model


def _randomize(model: nn.Module) -> None:
    """No parameter stays constant, so that none hides a mistake behind a factor of zero or one, and
    what a recurrence keeps fades over hundreds of tokens, not two.
    """
    fresh = [(name, _random_like(name, value)) for name, value in tree_flatten(model.parameters())]
    model.update(tree_unflatten(fresh))


# name, mean, deviation: decay rates near one; the grids of quantized keys, values and weights not
# too coarse
_CHOSEN = [
    (re.compile(r"(^|\.)A_log$"), 0.0, 0.3),
    (
        re.compile(r"(^|\.)(dt_bias|dt_proj\.bias|recurrent_param|w_lora\.lora\.2\.bias)$"),
        -5.0,
        0.5,
    ),
    (re.compile(r"(^|\.)quant_(key|value)_scale$"), 0.02, 0.002),
    (re.compile(r"(^|\.)scales$"), 0.06, 0.01),
    (re.compile(r"(^|\.)biases$"), -0.09, 0.01),
]


def _random_like(name: str, value: mx.array) -> mx.array:
    noise = mx.random.normal(value.shape)
    if not mx.issubdtype(value.dtype, mx.floating):  # codes of quantized weights
        return mx.random.randint(0, 2**30, value.shape).astype(value.dtype)
    for pattern, mean, deviation in _CHOSEN:
        if pattern.search(name):
            return mean + deviation * noise
    value = value.astype(mx.float32)
    first = value.reshape(-1)[0].item()
    if (value != first).any().item():
        is_table = value.ndim < 2 or "embed" in name or "wte" in name
        return value if is_table else value * 3**0.5  # mlx.nn's layers shrink what they get by that
    if first != 0.0:
        return first * (1 + 0.1 * noise)
    if value.ndim < 2:
        return 0.1 * noise
    return noise if "norm" in name else noise * value.shape[-1] ** -0.5


def zoo_loader(model_type: str) -> Callable[[], LoadedModel]:
    """What makes such a model for an engine, with a tokenizer of as many words as it has tokens."""
    tokenizer = tiny_tokenizer(size=VOCAB)
    return lambda: LoadedModel(
        f"tiny-{model_type}",
        Path("/nowhere"),
        tiny(model_type),
        tokenizer,
        {},
        1024,
        f"{model_type}-0",
        NOWHERE,
    )


INCONSISTENT = {
    "phi3small": (
        "adds its boolean mask to the scores of the block-sparse layers, so a prompt sees what "
        "comes after it"
    ),
    "plamo3": (
        "masks window_size + 1 tokens, but its caches keep window_size, so a window depends on the "
        "chunks"
    ),
}
