"""Keys and values to 4-bit codes and back: centre (keys), rotate, affine codes in groups along the head dim.

`q.k` is unchanged up to one constant per query when a vector is subtracted from every key, and unchanged when q and k
are both rotated; values are rotated back once, after attention (QuaRot, arXiv 2404.00456). So everything the cache
holds, codes and full precision alike, lives in centred and rotated space ("cache space").
"""

from typing import NamedTuple

import mlx.core as mx

from .spec import KVCacheSpec, quant_group

ROTATION_GROUP = 64


class Codes(NamedTuple):
    """`mx.quantize`'s triple: packed uint32 [..., D * bits / 32], scales and biases [..., D / group], 16-bit."""

    packed: mx.array
    scales: mx.array
    biases: mx.array


def sealed_bytes(spec: KVCacheSpec, num_tokens: int) -> int:
    """Of the first `num_tokens` tokens of a sequence in sealed blocks, all layers, the sinks included."""
    sinks = min(num_tokens, spec.num_sinks) if spec.bits is not None else 0
    return num_tokens * spec.sealed_bytes + sinks * spec.dense_bytes


def encode(x: mx.array, bits: int) -> Codes:
    """Affine codes of x [..., D]. Scales are 16-bit whatever x is, so that 4 bits are 4.5 and not 5."""
    packed, scales, biases = mx.quantize(x, group_size=quant_group(x.shape[-1]), bits=bits)
    if x.dtype == mx.float32:
        scales, biases = scales.astype(mx.float16), biases.astype(mx.float16)
    return Codes(packed, scales, biases)


def decode(codes: Codes, bits: int, dtype: mx.Dtype) -> mx.array:
    """The value of sealed codes: [..., D] in `dtype`."""
    dim = codes.packed.shape[-1] * 32 // bits
    scales, biases = codes.scales.astype(dtype), codes.biases.astype(dtype)
    return mx.dequantize(codes.packed, scales, biases, group_size=quant_group(dim), bits=bits)


def hadamard(dim: int) -> mx.array:
    """Orthonormal, symmetric Hadamard matrix of the largest power of two that divides `dim`, at most 64. float32."""
    size = min(dim & -dim, ROTATION_GROUP)
    return mx.hadamard_transform(mx.eye(size), scale=size**-0.5)


class CacheSpace:
    """Moves queries, keys and values of each layer into cache space, and attention's output out of it."""

    def __init__(self, spec: KVCacheSpec, key_centres: list[mx.array] | None = None):
        """`key_centres`: per layer [num_kv_heads, 1, k_dim], or None for no centring. Unquantized specs do nothing."""
        self.identity = spec.bits is None
        dims = {d for layer in spec.layers for d in (layer.k_dim, layer.v_dim)}
        self._rotations = {d: hadamard(d).astype(spec.dtype) for d in dims}
        self._centres: list[mx.array | None] = [None] * len(spec.layers)
        if key_centres is not None:
            # where sink logits join the softmax, a constant per query does not cancel
            self._centres = [
                None if layer.attention_sinks else centre.astype(spec.dtype)
                for layer, centre in zip(spec.layers, key_centres, strict=True)
            ]
        mx.eval(list(self._rotations.values()), [c for c in self._centres if c is not None])

    def enter(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """q [B, Hq, L, Dk], k [B, H, L, Dk], v [B, H, L, Dv], rotated; keys centred first."""
        if self.identity:
            return q, k, v
        centre = self._centres[layer]
        if centre is not None:
            k = k - centre
        if k.shape[-1] != v.shape[-1]:
            return self._rotate(q), self._rotate(k), self._rotate(v)
        heads_q, heads = q.shape[1], k.shape[1]
        qkv = self._rotate(mx.concatenate([q, k, v], axis=1))  # one call for three: decode is bound by launches
        return qkv[:, :heads_q], qkv[:, heads_q : heads_q + heads], qkv[:, heads_q + heads :]

    def leave(self, out: mx.array) -> mx.array:
        """Attention's output [B, Hq, L, Dv], back in the model's space: the Hadamard matrix is its own inverse."""
        return out if self.identity else self._rotate(out)

    def _rotate(self, x: mx.array) -> mx.array:
        matrix = self._rotations[x.shape[-1]]
        if matrix.shape[0] == x.shape[-1]:
            return x @ matrix
        return (x.reshape(*x.shape[:-1], -1, matrix.shape[0]) @ matrix).reshape(x.shape)
