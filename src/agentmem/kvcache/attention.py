"""The one seam between mlx-lm's model files and our caches, and attention over them.

mlx-lm's model files import `scaled_dot_product_attention` by name; it knows neither rotated caches
nor sequences of unequal length. `install_seam` replaces that name in the modules of one loaded
model by a function that hands the call to the cache object if it has an `attend` method, and to
mlx-lm's own function otherwise. `verify_seam` then checks the model's numbers, so that a model
whose attention we do not understand is refused instead of served wrongly.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import mlx.core as mx
from mlx_lm.models import base
from mlx_lm.models.cache import make_prompt_cache

from ..errors import ModelError
from .backend import AttentionBackend
from .quantize import Codes
from .spec import LayerSpec, coded_shape

_original = base.scaled_dot_product_attention
# up to here attention on codes reads them in place; beyond, it dequantizes them once for all
# queries
FEW_QUERIES = 16
Observer = Callable[
    [mx.array, mx.array, Any, Any, bool], None
]  # keys, values, cache, mask, whether there are sinks
_observers: ContextVar[tuple[Observer, ...]] = ContextVar("observers", default=())  # of this thread


def _dispatch(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
) -> mx.array:
    for observer in _observers.get():
        observer(keys, values, cache, mask, sinks is not None)
    out: mx.array
    if hasattr(cache, "attend"):
        out = cache.attend(queries, scale, sinks)
    else:
        out = _original(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
    return out


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Tell `observer` of every call of the seam that this thread makes meanwhile."""
    token = _observers.set((*_observers.get(), observer))
    try:
        yield
    finally:
        _observers.reset(token)


def install_seam(model: Any) -> None:
    """Route the attention of `model`'s modules through their cache objects.

    Only attention that is mlx-lm's is routed. A second call changes nothing.
    """
    for name in {type(module).__module__ for _, module in model.named_modules()}:
        module = sys.modules[name]
        if getattr(module, "scaled_dot_product_attention", None) in (_original, _dispatch):
            module.scaled_dot_product_attention = _dispatch  # type: ignore[attr-defined]


def verify_seam(model: Any, forward: Callable[[mx.array], mx.array], vocab_size: int) -> None:
    """Compare logits of `forward` with those over mlx-lm's caches.

    `forward` runs tokens [1, L] over an unquantized cache of ours. Raises ModelError where they
    differ by more than TOLERANCE.
    """
    tokens = mx.array([[(7919 * i + 13) % vocab_size for i in range(24)]])
    theirs = make_prompt_cache(model)
    for part in (tokens[:, :15], tokens[:, 15:23], tokens[:, 23:]):
        expected, got = model(part, cache=theirs), forward(part)
        error = relative_error(got, expected)
        if not error < TOLERANCE:
            raise ModelError(
                f"the model's attention is not understood: logits differ by {error:.1%}"
            )


# of the largest logit: 16-bit rounding stays under it; a wrong mask or scale does not
TOLERANCE = 0.02


def relative_error(got: mx.array, expected: mx.array) -> float:
    """Return the largest difference of two arrays, by the largest value; nan where either is."""
    return cast(
        float, (mx.abs(expected - got).max() / mx.maximum(mx.abs(expected).max(), 1e-6)).item()
    )


def attend_dense(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    sinks: mx.array | None,
    layer: LayerSpec,
    first: int,
    backend: AttentionBackend,
) -> mx.array:
    """Attend causally from the last n positions, q [1, Hq, n, D].

    k, v [1, H, T, D], T >= n, are those of positions `first` to `first` + T - 1: all that any of
    the queries sees.
    """
    n, stop = q.shape[2], first + k.shape[2]
    mask: Any = "causal" if n > 1 else None
    if n > 1 and layer.first_visible(stop - 1) > first:
        rows, columns = mx.arange(stop - n, stop)[:, None], mx.arange(first, stop)[None]
        mask = layer.sees(rows, columns)
    return backend.attend(q, k, v, scale=scale, mask=mask, sinks=sinks)


def attend_codes(
    q: mx.array,
    k_codes: Codes,
    v_codes: Codes,
    k_first: mx.array,
    v_first: mx.array,
    k_open: mx.array,
    v_open: mx.array,
    scale: float,
    bits: tuple[int, int],
) -> mx.array:
    """Attend causally, reading sealed codes in place; return [1, Hq, n, Dv].

    q [1, Hq, n, D]: the last n positions, all in the open block. Codes [1, H, S, ...]: sealed
    tokens; the first `k_first.shape[2]` of them are taken from k_first, v_first (full precision)
    instead. k_open, v_open [1, H, m, D]: the open block, the queries' own keys included. `bits` are
    those of keys and of values.
    """
    _, heads_q, n, dim = q.shape
    heads, m = k_open.shape[1], k_open.shape[2]
    first, sealed = k_first.shape[2], k_codes.packed.shape[2]
    rows = (q * scale).reshape(1, heads, heads_q // heads * n, dim)
    padded, group = coded_shape(dim)
    on_codes = mx.quantized_matmul(
        rows if padded == dim else mx.pad(rows, [(0, 0)] * 3 + [(0, padded - dim)]),
        k_codes.packed,
        k_codes.scales.astype(q.dtype),
        k_codes.biases.astype(q.dtype),
        transpose=True,
        group_size=group,
        bits=bits[0],
    )[..., first:]
    on_open = rows @ k_open.swapaxes(-1, -2)
    if n > 1:
        seen = mx.arange(m)[None] <= mx.arange(m - n, m)[:, None]
        masked = mx.where(seen, on_open.reshape(1, heads, -1, n, m), mx.finfo(q.dtype).min)
        on_open = masked.reshape(on_open.shape)
    scores = mx.concatenate([rows @ k_first.swapaxes(-1, -2), on_codes, on_open], axis=-1)
    weights = mx.softmax(scores, axis=-1, precise=True)
    on_sealed = mx.concatenate(
        [mx.zeros_like(weights[..., :first]), weights[..., first:sealed]], axis=-1
    )
    v_dim = v_open.shape[-1]
    out = mx.quantized_matmul(
        on_sealed,
        v_codes.packed,
        v_codes.scales.astype(q.dtype),
        v_codes.biases.astype(q.dtype),
        transpose=False,
        group_size=coded_shape(v_dim)[1],
        bits=bits[1],
    )[..., :v_dim]
    out = out + weights[..., :first] @ v_first + weights[..., sealed:] @ v_open
    return out.reshape(1, heads_q, n, v_dim)
