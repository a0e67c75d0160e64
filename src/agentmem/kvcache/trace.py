"""KVCacheSpecs, read off the cache objects that models make and what they do with them.

A model is traced in a few passes. Nothing is computed: MLX's arrays are lazy, and their shapes are
enough. So it works on a model without weights too.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from .attention import observed
from .block import STORABLE
from .spec import (
    ChunkedAttention,
    FullAttention,
    KVBits,
    KVCacheSpec,
    LatentAttention,
    LayerSpec,
    OpaqueCaches,
    Recurrent,
    SlidingWindow,
    default_state_interval,
)

# what a model's code may raise over caches that it was not written for; MLX's RuntimeErrors are of
# any cache
MODEL_ERRORS = (
    AttributeError,
    TypeError,
    ValueError,
    LookupError,
    AssertionError,
    NameError,
    NotImplementedError,
)
_LENGTHS = (
    1,
    5,
    1,
)  # tokens of the traced passes: the shortest start, a prompt, and a step of decoding


class Untraceable(Exception):
    """A model's caches can't be held as blocks; the message says why."""


@dataclass
class _Use:
    """What a model did with one cache of keys and values in one pass."""

    updates: int = 0
    returned: tuple[mx.array, mx.array] | None = None
    attended: int = 0  # times that its own attention got exactly what it returned
    others: int = 0  # times that something else did
    asked: int = 0  # for what it holds
    window: int | None = None  # of the mask that came with its attention
    opaque_mask: bool = False
    sinks: bool = False


class _TracedKV(KVCache):  # type: ignore[misc]
    start_position = 0

    def __init__(self, trace: "_Trace", window: int | None, kind: type[LayerSpec]):
        super().__init__()
        self.trace, self.window, self.kind = trace, window, kind
        self.use = _Use()
        self.inside = False

    def maybe_trim_front(self) -> None: ...

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        window = window_size or (self.window if self.kind is SlidingWindow else None)
        if N == 1:
            return None
        mask = super().make_mask(N, return_array=return_array, window_size=window)
        self.trace.masks.append((mask, window))
        return mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.use.updates += 1
        self.new = keys, values
        self.inside = True
        self.use.returned = super().update_and_fetch(keys, values)
        self.inside = False
        return self.use.returned

    def keys_and_values(self) -> Any:
        self.use.asked += not self.inside
        return super().keys_and_values()


@dataclass
class _Trace:
    slots: list[int | tuple[int, ...]] = field(default_factory=list)
    caches: list[Any] = field(default_factory=list)
    masks: list[tuple[Any, int | None]] = field(
        default_factory=list
    )  # that were made, and for which window

    def stand_in(self, made: list[Any]) -> list[Any]:
        """Return caches that note what is done with them, in place of those the model made."""
        result: list[Any] = []
        for cache in made:
            if type(cache) is CacheList:
                indices = tuple(self._add(inner) for inner in cache.caches)
                self.slots.append(indices)
                result.append(CacheList(*(self.caches[i] for i in indices)))
            else:
                index = self._add(cache)
                self.slots.append(index)
                result.append(self.caches[index])
        return result

    def _add(self, cache: Any) -> int:
        if type(cache) is KVCache:
            new: Any = _TracedKV(self, None, FullAttention)
        elif type(cache) is RotatingKVCache and not cache.keep:
            new = _TracedKV(self, cache.max_size, SlidingWindow)
        elif type(cache) is ChunkedKVCache:
            new = _TracedKV(self, cache.chunk_size, ChunkedAttention)
        elif type(cache) is ArraysCache:
            new = ArraysCache(len(cache.cache))
        else:
            raise Untraceable(f"it uses a {type(cache).__name__} of its own")
        self.caches.append(new)
        return len(self.caches) - 1

    def seen(self, keys: mx.array, values: mx.array, cache: Any, mask: Any, sinks: bool) -> None:
        """Note a call of the attention seam."""
        for mine in self.caches:
            if not isinstance(mine, _TracedKV) or mine.use.returned is None:
                continue
            got = [a is b for a, b in zip(mine.use.returned, (keys, values), strict=True)]
            if cache is mine and all(got):
                mine.use.attended += 1
                mine.use.sinks = mine.use.sinks or sinks
                self._note_mask(mine, mask)
            elif any(got) or cache is mine:
                mine.use.others += 1

    def _note_mask(self, cache: _TracedKV, mask: Any) -> None:
        windows = [window for made, window in self.masks if made is mask and made is not None]
        if isinstance(mask, mx.array) and not windows:
            cache.use.opaque_mask = True
        elif isinstance(mask, mx.array):
            cache.use.window = windows[0]


def read_spec(
    model: Any, *, kv_bits: KVBits = "4", block_size: int = 256, state_interval: int | None = None
) -> KVCacheSpec:
    """Trace a few tokens through `model`, its attention seam installed.

    The spec's `opaque` says what could not be read.

    `state_interval`: tokens between two snapshots of recurrent state; None: see
    `default_state_interval`.
    """
    try:
        spec = _traced_spec(model, kv_bits, block_size)
        interval = state_interval or default_state_interval(spec)
        return replace(spec, state_interval=-(-interval // block_size) * block_size)
    except Untraceable as e:
        reason = str(e)
    except MODEL_ERRORS as e:
        reason = f"its code does not work with caches other than its own ({type(e).__name__}: {e})"
    return opaque_spec(model, reason, kv_bits, block_size)


def _traced_spec(model: Any, kv_bits: KVBits, block_size: int) -> KVCacheSpec:
    trace = _Trace()
    caches = trace.stand_in(make_prompt_cache(model))
    read: list[list[LayerSpec]] = []
    with observed(trace.seen):
        for n in _LENGTHS:
            logits = model(mx.zeros((1, n), mx.int32), cache=caches)
            read.append([_layer_spec(cache) for cache in trace.caches])
            for cache in trace.caches:
                if isinstance(cache, _TracedKV):
                    cache.use = _Use()
    layers = tuple(_agreed(*passes) for passes in zip(*read, strict=True))
    if any(hasattr(module, "kv_lora_rank") for module in model.modules()):
        layers = tuple(map(_latent, layers))
    dtypes = {cache.new[0].dtype for cache in trace.caches if isinstance(cache, _TracedKV)}
    dtypes |= {cache.new[1].dtype for cache in trace.caches if isinstance(cache, _TracedKV)}
    if len(dtypes) > 1:
        raise Untraceable(
            f"its keys and values are of different types: {', '.join(sorted(map(str, dtypes)))}"
        )
    dtype = dtypes.pop() if dtypes else logits.dtype
    return KVCacheSpec(layers, dtype, tuple(trace.slots), kv_bits, block_size)


def _layer_spec(cache: Any) -> LayerSpec:
    if isinstance(cache, ArraysCache):
        if any(a is None for a in cache.cache):
            raise Untraceable("a recurrent layer leaves a part of its state unset")
        if any(a.dtype not in STORABLE for a in cache.cache):
            raise Untraceable("a recurrent layer's state is of a type that a block can't hold")
        state = tuple((a.shape, str(a.dtype).removeprefix("mlx.core.")) for a in cache.cache)
        return Recurrent(state=state)
    use = cache.use
    if use.updates != 1:
        raise Untraceable(f"it writes to a cache {use.updates} times in a pass")
    keys, values = cache.new
    if not values.shape[3]:
        raise Untraceable("a cache holds keys without values, the index of a sparse attention")
    walked = use.attended == 1 and not use.others and not use.asked
    walked = walked and not (use.opaque_mask and cache.kind is not ChunkedAttention)
    window: int | None = cache.window
    kind: type[LayerSpec] = cache.kind
    if walked and use.window is not None:
        window, kind = use.window, SlidingWindow
    if kind is ChunkedAttention and not walked:
        raise Untraceable("it computes with a chunked cache by itself")
    return kind(
        num_kv_heads=keys.shape[1],
        k_dim=keys.shape[3],
        v_dim=values.shape[3],
        window=window,
        attention_sinks=use.sinks,
        model_attends=not walked,
    )


def _agreed(start: LayerSpec, prompt: LayerSpec, step: LayerSpec) -> LayerSpec:
    """Return what all passes say.

    Masks are the prompt's, since a single token needs none.
    """
    if isinstance(prompt, Recurrent):
        if not start == prompt == step:
            raise Untraceable(
                "a recurrent layer's state changes its shape with the number of tokens"
            )
        return prompt
    if start.model_attends or step.model_attends:
        return replace(prompt, model_attends=True)
    return prompt


def _latent(layer: LayerSpec) -> LayerSpec:
    """Return the layer as a latent one where it is: MLA's way.

    What is cached is then one latent vector for all heads (as "keys") and the keys' rotated part.
    """
    is_latent = type(layer) is FullAttention and layer.model_attends and layer.num_kv_heads == 1
    if not is_latent:
        return layer
    return LatentAttention(
        num_kv_heads=1,
        k_dim=layer.k_dim,
        v_dim=layer.v_dim,
        model_attends=True,
        attention_sinks=layer.attention_sinks,
    )


def all_model_attends(spec: KVCacheSpec) -> KVCacheSpec | None:
    """Return the spec with all keys and values handed to the model, which attends by itself.

    It is for a model whose attention is not plainly causal. None where that changes nothing, or
    where a layer is chunked.
    """
    if any(isinstance(layer, ChunkedAttention) for layer in spec.layers):
        return None
    layers = tuple(
        layer if isinstance(layer, Recurrent) else replace(layer, model_attends=True)
        for layer in spec.layers
    )
    return None if layers == spec.layers else replace(spec, layers=layers)


def opaque_spec(model: Any, reason: str, kv_bits: KVBits, block_size: int) -> KVCacheSpec:
    """Return the spec of a model that keeps mlx-lm's own caches.

    Their bytes are taken from two lengths of a sequence.
    """
    sizes = []
    for n in (8, 8 + 512):
        caches = make_prompt_cache(model)
        logits = model(mx.zeros((1, n), mx.int32), cache=caches)
        sizes.append(sum(cache.nbytes for cache in caches))
    per_token = -(-max(0, sizes[1] - sizes[0]) // 512)
    opaque = OpaqueCaches(reason, sizes[0], per_token)
    return KVCacheSpec((), logits.dtype, (), kv_bits, block_size, opaque=opaque)
