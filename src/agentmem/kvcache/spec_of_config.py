"""The KVCacheSpec of a model's cache, read off its config.json, without weights."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.utils import _get_classes  # all that is public wants a directory with weights

from ..errors import ModelError
from .attention import install_seam
from .spec import KVBits, KVCacheSpec
from .trace import read_spec

_CONFIG_ERRORS = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    RuntimeError,
    ArithmeticError,
)


def spec_of_config(
    config: dict[str, Any],
    *,
    kv_bits: KVBits = "4",
    block_size: int = 256,
    state_interval: int | None = None,
) -> KVCacheSpec:
    """Return the spec that loading the model in bfloat16 would give.

    What a load checks beyond, that logits agree with mlx-lm's own, needs weights. Raises ModelError
    for a config that mlx-lm can't make a model of.
    """
    try:
        model_class, args_class = _get_classes(config)
        model = model_class(args_class.from_dict(config))
        model.update(tree_map(_stand_in, model.parameters()))
        install_seam(model)
        spec = read_spec(
            model, kv_bits=kv_bits, block_size=block_size, state_interval=state_interval
        )
    except _CONFIG_ERRORS as e:
        raise ModelError(
            f"mlx-lm can't make a {config['model_type'][:80]} model of it: "
            f"{type(e).__name__}: {_first_line(e)}"
        ) from e
    return replace(
        spec, dtype=mx.bfloat16
    )  # a few models compute keys in float32, whatever their weights are


def _stand_in(parameter: mx.array) -> mx.array:
    """Return an array of the same shape that is one value in memory.

    So even a model that computes while it is traced stays small.
    """
    of = mx.bfloat16 if mx.issubdtype(parameter.dtype, mx.floating) else parameter.dtype
    return mx.broadcast_to(mx.zeros((), of), parameter.shape)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]
