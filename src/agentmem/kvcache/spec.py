"""KVCacheSpec: what a model's cache is made of, read off the cache objects it makes and one traced forward pass."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import mlx.core as mx
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from ..errors import ModelError

LayerKind = Literal["global", "sliding"]
KVBits = Literal["4", "k5v4", "8", "16"]

QUANT_GROUP = 64
_BITS: dict[KVBits, tuple[int, int] | None] = {"4": (4, 4), "k5v4": (5, 4), "8": (8, 8), "16": None}


def quant_group(dim: int) -> int:
    """Values of a head that share a scale and a bias, 16 bits each."""
    return QUANT_GROUP if dim % QUANT_GROUP == 0 else 32


@dataclass(frozen=True)
class LayerSpec:
    kind: LayerKind
    num_kv_heads: int
    k_dim: int
    v_dim: int
    window: int | None = None  # tokens a sliding layer sees, itself included
    attention_sinks: bool = False  # the layer hands sink logits to its softmax (gpt-oss)

    @property
    def dims(self) -> tuple[int, int]:
        return self.k_dim, self.v_dim

    @property
    def stack_key(self) -> tuple[int, int, int]:
        return self.num_kv_heads, self.k_dim, self.v_dim


@dataclass(frozen=True)
class KVCacheSpec:
    """Shapes and precision of one model's cache. Layers of one shape are stacked in one tensor, RAM and disk alike."""

    layers: tuple[LayerSpec, ...]
    dtype: mx.Dtype  # of keys and values as the model makes them
    kv_bits: KVBits = "4"
    block_size: int = 256
    num_sinks: int = 4  # first tokens of a sequence, kept in full precision

    @cached_property
    def bits(self) -> tuple[int, int] | None:
        """Bits of (keys, values); None where blocks keep the model's dtype."""
        return _BITS[self.kv_bits] if not self.unquantized_reason else None

    @cached_property
    def unquantized_reason(self) -> str | None:
        """In words, why blocks stay in full precision although fewer bits were asked for; else None."""
        odd = {d for layer in self.layers for d in (layer.k_dim, layer.v_dim) if d % 32}
        if self.kv_bits == "16" or not odd:
            return None
        return f"head dims {sorted(odd)} are not multiples of 32: blocks keep the model's dtype"

    @cached_property
    def dense_bytes(self) -> int:
        """Of one token in the model's dtype, all layers."""
        return sum(layer.num_kv_heads * (layer.k_dim + layer.v_dim) for layer in self.layers) * self.dtype.size

    @cached_property
    def sealed_bytes(self) -> int:
        """Of one token in a sealed block, all layers; sinks come on top."""
        if self.bits is None:
            return self.dense_bytes
        sizes = (
            (layer.num_kv_heads, d, b) for layer in self.layers for d, b in zip(layer.dims, self.bits, strict=True)
        )
        return sum(heads * (dim * bits // 8 + dim // quant_group(dim) * 4) for heads, dim, bits in sizes)

    @cached_property
    def stacks(self) -> tuple[tuple[int, ...], ...]:
        """Layer indices by shape, in order of first appearance: Gemma's 48 equal layers give one stack of 48."""
        by_shape: dict[tuple[int, int, int], list[int]] = {}
        for index, layer in enumerate(self.layers):
            by_shape.setdefault(layer.stack_key, []).append(index)
        return tuple(tuple(stack) for stack in by_shape.values())

    @cached_property
    def position_in_stack(self) -> tuple[tuple[int, int], ...]:
        """For each layer: (index of its stack, index within the stack)."""
        where = {layer: (s, i) for s, stack in enumerate(self.stacks) for i, layer in enumerate(stack)}
        return tuple(where[i] for i in range(len(self.layers)))

    def identity(self) -> str:
        """Everything that gives a stored byte its meaning, as text for the fingerprint."""
        return repr((self.layers, str(self.dtype), self.kv_bits, self.block_size, self.num_sinks))


class _TracedCache(KVCache):
    """A layer's plain cache that notes what passes through it."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        self.dtype: mx.Dtype | None = None
        self.through_seam = False
        self.attention_sinks = False

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.shapes, self.dtype = (keys.shape, values.shape), keys.dtype
        return super().update_and_fetch(keys, values)

    def attend(self, queries: mx.array, scale: float, sinks: mx.array | None) -> mx.array:
        self.through_seam, self.attention_sinks = True, sinks is not None
        keys, values = self.keys_and_values()
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, sinks=sinks)


def read_spec(model: Any, *, kv_bits: KVBits = "4", block_size: int = 256) -> KVCacheSpec:
    """Trace one token through `model`, its attention seam installed. Raises ModelError for unsupported layers."""
    made = make_prompt_cache(model)
    for index, cache in enumerate(made):
        if type(cache) not in (KVCache, RotatingKVCache) or getattr(cache, "keep", False):
            raise ModelError(f"layer {index} uses a {type(cache).__name__} cache, which agentmem does not support yet")
    traced = [_TracedCache() for _ in made]
    mx.eval(model(mx.array([[0]]), cache=traced))
    layers = tuple(_layer_spec(i, cache, trace) for i, (cache, trace) in enumerate(zip(made, traced, strict=True)))
    dtypes = {trace.dtype for trace in traced}
    if len(dtypes) != 1:
        raise ModelError(f"layers of different dtypes {sorted(map(str, dtypes))} are not supported yet")
    dtype = dtypes.pop()
    assert dtype is not None
    return KVCacheSpec(layers, dtype, kv_bits, block_size)


def _layer_spec(index: int, cache: Any, trace: _TracedCache) -> LayerSpec:
    if trace.shapes is None or not trace.through_seam:
        raise ModelError(f"layer {index} computes attention outside scaled_dot_product_attention: not supported yet")
    keys, values = trace.shapes
    window = cache.max_size if isinstance(cache, RotatingKVCache) else None
    kind: LayerKind = "sliding" if window else "global"
    return LayerSpec(kind, keys[1], keys[3], values[3], window, trace.attention_sinks)
