"""The cache to compare with: affine 4-bit codes as in the paper and in mlx-lm.

Nothing is rotated, centred or kept.
"""

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache, make_prompt_cache

from ..errors import ModelError

_BITS = 4
_GROUP = 64


def _round_trip(x: mx.array) -> mx.array:
    if x.shape[-1] % _GROUP:
        raise ModelError(f"a head dim of {x.shape[-1]} is no multiple of {_GROUP}, mlx-lm's group")
    codes = mx.quantize(x, group_size=_GROUP, bits=_BITS)
    return mx.dequantize(*codes, group_size=_GROUP, bits=_BITS)


class _PlainQ4:
    """Every token becomes what its codes stand for before anything attends to it.

    The numbers are those of mlx-lm's QuantizedKVCache(group_size=64, bits=4), up to rounding; that
    one's attention is a scalar loop on a CPU, and takes neither sliding windows nor sinks.
    """

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        keys = _round_trip(keys)
        values = _round_trip(values)
        return super().update_and_fetch(keys, values)  # type: ignore[misc, no-any-return]


class _PlainQ4KVCache(_PlainQ4, KVCache):  # type: ignore[misc]
    pass


class _PlainQ4RotatingKVCache(_PlainQ4, RotatingKVCache):  # type: ignore[misc]
    pass


def plain_cache(model: Any) -> list[Any]:
    """Make what the model takes as its cache. As in mlx-lm, recurrent state stays what it is.

    Raises ModelError, with the reason, where nothing can be quantized that way.
    """
    made = [_of_layer(cache) for cache in make_prompt_cache(model)]
    parts: list[Any] = []
    for cache in made:
        parts += getattr(cache, "caches", (cache,))
    if not any(isinstance(part, _PlainQ4) for part in parts):
        raise ModelError("mlx-lm quantizes no layer of this model")
    return made


def _of_layer(made: Any) -> Any:
    if type(made) is KVCache:
        return _PlainQ4KVCache()
    if type(made) is RotatingKVCache:
        return _PlainQ4RotatingKVCache(made.max_size, keep=made.keep)
    if type(made) is CacheList:
        return CacheList(*map(_of_layer, made.caches))
    if type(made) is ArraysCache:
        return made
    raise ModelError(f"mlx-lm does not quantize a {type(made).__name__}")
