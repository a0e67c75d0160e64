"""Key centres: the mean key of each layer, KV head and channel over a short, fixed text.

They are computed once for each model.
"""

from collections.abc import Callable
from importlib.resources import files

import mlx.core as mx

from .sequence import SequenceCache
from .spec import KVCacheSpec

NUM_TOKENS = 512


def calibration_tokens(encode: Callable[[str], list[int]]) -> list[int]:
    """Return 512 tokens of the text that comes with the package.

    It is repeated where a tokenizer makes fewer tokens of it.
    """
    tokens = encode(files(__package__).joinpath("calibration.txt").read_text(encoding="utf-8"))
    return (tokens * -(-NUM_TOKENS // len(tokens)))[:NUM_TOKENS]


def key_centres(
    spec: KVCacheSpec,
    cache: SequenceCache,
    forward: Callable[[mx.array, SequenceCache], object],
    tokens: list[int],
) -> list[mx.array]:
    """Return a centre for each layer, [num_kv_heads, 1, k_dim] float32; [0] of recurrent ones.

    `spec` must be unquantized, `cache` an empty one of it; `forward` runs tokens [1, L] over it.
    The first tokens (attention sinks, whose keys are unlike all others) don't count.
    """
    forward(mx.array([tokens]), cache)
    keys = cache.kept_keys()
    centres = [
        _centre(keys[i], spec.num_sinks) if i in keys else mx.zeros(1)
        for i in range(len(spec.layers))
    ]
    mx.eval(centres)
    return centres


def _centre(keys: mx.array, skipped: int) -> mx.array:
    return keys[0, :, skipped:].astype(mx.float32).mean(axis=1, keepdims=True)
