"""The one seam between mlx-lm's model files and our caches, and attention over sealed blocks plus an open one.

mlx-lm's model files import `scaled_dot_product_attention` by name; it knows neither rotated caches nor sequences of
unequal length. `install_seam` replaces that name in the modules of one loaded model by a function that hands the call
to the cache object if it has an `attend` method, and to mlx-lm's own function otherwise. `verify_seam` then checks the
model's numbers, so that a model whose attention we do not understand is refused instead of served wrongly.
"""

import sys
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
from mlx_lm.models import base
from mlx_lm.models.cache import make_prompt_cache

from ..errors import ModelError
from .quantize import Codes, quant_group

_original = base.scaled_dot_product_attention
FEW_QUERIES = 16  # up to here attention on codes reads them in place; beyond, it dequantizes them once for all queries


def _dispatch(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
) -> mx.array:
    if hasattr(cache, "attend"):
        return cache.attend(queries, scale, sinks)
    return _original(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)


def install_seam(model: Any) -> None:
    """Route the attention of `model`'s modules through their cache objects. Idempotent."""
    names = {type(module).__module__ for _, module in model.named_modules()}
    patched = 0
    for name in names:
        module = sys.modules[name]
        if getattr(module, "scaled_dot_product_attention", None) in (_original, _dispatch):
            module.scaled_dot_product_attention = _dispatch  # type: ignore[attr-defined]
            patched += 1
    if not patched:
        raise ModelError("the model's code does not use mlx-lm's scaled_dot_product_attention: not supported")


def verify_seam(model: Any, forward: Callable[[mx.array], mx.array], vocab_size: int) -> None:
    """Compare logits of `forward` (tokens [1, L] over an unquantized cache of ours) with those over mlx-lm's caches.

    Raises ModelError.
    """
    tokens = mx.array([[(7919 * i + 13) % vocab_size for i in range(24)]])
    theirs = make_prompt_cache(model)
    for part in (tokens[:, :15], tokens[:, 15:23], tokens[:, 23:]):
        expected, got = model(part, cache=theirs), forward(part)
        worst = mx.abs(expected - got).max() / mx.maximum(mx.abs(expected).max(), 1e-6)
        error = cast(float, worst.item())
        if not error < 0.02:  # 16-bit rounding stays under it; a wrong mask or scale does not
            raise ModelError(f"the model's attention is not understood: logits differ by {error:.1%}")


def attend_dense(
    q: mx.array, k: mx.array, v: mx.array, scale: float, window: int | None, sinks: mx.array | None
) -> mx.array:
    """Causal attention of the last n positions, q [1, Hq, n, D], over k, v [1, H, T, D], T >= n."""
    n, total = q.shape[2], k.shape[2]
    mask: Any = "causal" if n > 1 else None
    if window is not None and total > window:
        first = max(0, total - n - window + 1)  # oldest position that any of the queries sees
        k, v = k[..., first:, :], v[..., first:, :]
        if n > 1:
            rows, columns = mx.arange(total - n, total)[:, None], mx.arange(first, total)[None]
            mask = (columns <= rows) & (rows < columns + window)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)


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
    """Causal attention that reads sealed codes in place.

    q [1, Hq, n, D]: the last n positions, all in the open block. Codes [1, H, S, ...]: sealed tokens; the first
    `k_first.shape[2]` of them are taken from k_first, v_first (full precision) instead. k_open, v_open [1, H, m, D]:
    the open block, the queries' own keys included.
    """
    _, heads_q, n, dim = q.shape
    heads, first, sealed, m = k_open.shape[1], k_first.shape[2], k_codes.packed.shape[2], k_open.shape[2]
    rows = (q * scale).reshape(1, heads, heads_q // heads * n, dim)
    on_codes = mx.quantized_matmul(
        rows,
        k_codes.packed,
        k_codes.scales.astype(q.dtype),
        k_codes.biases.astype(q.dtype),
        transpose=True,
        group_size=quant_group(dim),
        bits=bits[0],
    )[..., first:]
    on_open = rows @ k_open.swapaxes(-1, -2)
    if n > 1:
        seen = mx.arange(m)[None] <= mx.arange(m - n, m)[:, None]
        masked = mx.where(seen, on_open.reshape(1, heads, -1, n, m), mx.finfo(q.dtype).min)
        on_open = masked.reshape(on_open.shape)
    scores = mx.concatenate([rows @ k_first.swapaxes(-1, -2), on_codes, on_open], axis=-1)
    weights = mx.softmax(scores, axis=-1, precise=True)
    on_sealed = mx.concatenate([mx.zeros_like(weights[..., :first]), weights[..., first:sealed]], axis=-1)
    out = mx.quantized_matmul(
        on_sealed,
        v_codes.packed,
        v_codes.scales.astype(q.dtype),
        v_codes.biases.astype(q.dtype),
        transpose=False,
        group_size=quant_group(v_open.shape[-1]),
        bits=bits[1],
    )
    out = out + weights[..., :first] @ v_first + weights[..., sealed:] @ v_open
    return out.reshape(1, heads_q, n, v_open.shape[-1])
