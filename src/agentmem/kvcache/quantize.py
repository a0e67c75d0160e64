"""Codes of keys and values, and back: centre (keys), rotate, affine codes in groups along the head.

`q.k` is unchanged up to one constant per query when a vector is subtracted from every key, and
unchanged when q and k are both rotated; values are rotated back once, after attention (QuaRot,
arXiv 2404.00456). So everything the cache of a layer behind the attention seam holds, codes and
full precision alike, lives in centred and rotated space ("cache space"). Of a layer whose model
computes with what the cache returns, only the codes do.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx

from .spec import KVCacheSpec, coded_shape

ROTATION_GROUP = 64
TOKENS = 2  # the token axis of every array of keys, values or codes
Stored = tuple[mx.array, ...]  # keys and values in one array, or apart: see `join`


class Codes(NamedTuple):
    """The triple of `mx.quantize`.

    packed is uint32 [..., D * bits / 32], scales and biases are 16-bit [..., D / group]; D is the
    head dim, padded to whole groups.
    """

    packed: mx.array
    scales: mx.array
    biases: mx.array


def concatenate_codes(blocks: Sequence[Mapping[str, mx.array]], part: str) -> Codes:
    """Join the codes of one layer's keys ("k") or values ("v") of consecutive blocks."""
    fields = (
        mx.concatenate([block[f"{part}.{field}"] for block in blocks], axis=TOKENS)
        for field in Codes._fields
    )
    return Codes(*fields)


def sealed_bytes(spec: KVCacheSpec, num_tokens: int) -> int:
    """Count the bytes of the first `num_tokens` tokens of a sequence in sealed blocks.

    All layers and parts count, the sinks included.
    """
    sinks = min(num_tokens, spec.num_sinks) if spec.bits is not None else 0
    states = num_tokens // spec.state_interval * spec.state_bytes
    return num_tokens * spec.sealed_bytes + sinks * spec.dense_bytes + states


def encode(x: mx.array, bits: int) -> Codes:
    """Make affine codes of x [..., D].

    Scales are 16-bit whatever x is, so that 4 bits are 4.5 and not 5.
    """
    padded, group = coded_shape(x.shape[-1])
    if padded != x.shape[-1]:
        x = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padded - x.shape[-1])])
    packed, scales, biases = mx.quantize(x, group_size=group, bits=bits)
    if x.dtype == mx.float32:
        scales, biases = scales.astype(mx.float16), biases.astype(mx.float16)
    return Codes(packed, scales, biases)


def decode(codes: Codes, bits: int, dtype: mx.Dtype, dim: int) -> mx.array:
    """Return the value of sealed codes: [..., dim] in `dtype`."""
    _, group = coded_shape(dim)
    scales, biases = codes.scales.astype(dtype), codes.biases.astype(dtype)
    return mx.dequantize(codes.packed, scales, biases, group_size=group, bits=bits)[..., :dim]


def join(k: mx.array, v: mx.array) -> Stored:
    """Put k, v [B, H, L, D] into the form of a working copy.

    That is ([B, 2 H, L, D],), or both apart where their dims differ. One update instead of two, for
    each layer of each sequence, is 4 % of a decode step of four on a CPU.
    """
    return (mx.concatenate([k, v], axis=1),) if k.shape[-1] == v.shape[-1] else (k, v)


def hadamard(dim: int) -> mx.array:
    """Return an orthonormal, symmetric matrix that mixes `dim` channels, float32.

    Hadamard matrices lie along its diagonal. Where `dim` is a multiple of 64, one of [64, 64]
    stands for all groups; else it is [dim, dim] and its pieces are powers of two.
    """
    if dim % ROTATION_GROUP == 0:
        return _hadamard(ROTATION_GROUP)
    matrix, at = mx.zeros((dim, dim)), 0
    while at < dim:
        size = min(ROTATION_GROUP, 1 << ((dim - at).bit_length() - 1))
        matrix[at : at + size, at : at + size] = _hadamard(size)
        at += size
    return matrix


def _hadamard(size: int) -> mx.array:
    return mx.hadamard_transform(mx.eye(size), scale=size**-0.5)


class CacheSpace:
    """The way of queries, keys and values into cache space, and of attention's output out of it."""

    def __init__(self, spec: KVCacheSpec, key_centres: list[mx.array] | None = None):
        """Take `key_centres` of each layer, [num_kv_heads, 1, k_dim], of recurrent ones anything.

        None: keys are not centred. With an unquantized spec nothing is done to anything.
        """
        self.identity = spec.bits is None
        dims = {d for layer in spec.layers for d in layer.dims if d}
        self._rotations = {d: hadamard(d).astype(spec.dtype) for d in dims}
        self._centres: list[mx.array | None] = [None] * len(spec.layers)
        if key_centres is not None:
            self._centres = [
                centre.astype(spec.dtype) if layer.centred else None
                for layer, centre in zip(spec.layers, key_centres, strict=True)
            ]
        mx.eval(list(self._rotations.values()), [c for c in self._centres if c is not None])

    def enter(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, Stored]:
        """Rotate q [B, Hq, L, Dk], k [B, H, L, Dk], v [B, H, L, Dv], with keys centred first.

        Return q, and `join` of k and v.
        """
        if self.identity:
            return q, join(k, v)
        centre = self._centres[layer]
        if centre is not None:
            k = k - centre
        if k.shape[-1] != v.shape[-1]:
            return self._rotate(q), (self._rotate(k), self._rotate(v))
        qkv = self._rotate(
            mx.concatenate([q, k, v], axis=1)
        )  # one call for three: decode is bound by launches
        return qkv[:, : q.shape[1]], (qkv[:, q.shape[1] :],)

    def leave(self, out: mx.array) -> mx.array:
        """Return attention's output [B, Hq, L, Dv] to the model's space.

        The rotation is its own inverse.
        """
        return out if self.identity else self._rotate(out)

    def enter_part(self, layer: int, part: str, x: mx.array) -> mx.array:
        """Move keys (part "k") or values ("v") [1, H, n, D] into cache space, to be encoded.

        They are of a layer whose model attends by itself.
        """
        centre = self._centres[layer] if part == "k" else None
        return self._rotate(x if centre is None else x - centre)

    def leave_part(self, layer: int, part: str, x: mx.array) -> mx.array:
        """Undo `enter_part`."""
        centre, x = self._centres[layer] if part == "k" else None, self._rotate(x)
        return x if centre is None else x + centre

    def _rotate(self, x: mx.array) -> mx.array:
        matrix = self._rotations[x.shape[-1]]
        if matrix.shape[0] == x.shape[-1]:
            return x @ matrix
        return (x.reshape(*x.shape[:-1], -1, matrix.shape[0]) @ matrix).reshape(x.shape)


class LayerCodec:
    """Codes of one layer and back, of keys and values that are in cache space already."""

    def __init__(self, spec: KVCacheSpec, space: CacheSpace, index: int):
        self.space, self.index = space, index
        self.layer = spec.layers[index]
        self._spec = spec

    def encode(self, part: str, x: mx.array) -> Codes:
        """Make the codes of `part` "k" or "v" of one block, x [1, H, n, D]."""
        assert self._spec.bits is not None
        return encode(x, self._spec.bits["kv".index(part)])

    def decode(self, part: str, codes: Codes) -> mx.array:
        """Return what codes stand for: [1, H, n, D], as the running cache holds it."""
        assert self._spec.bits is not None
        i = "kv".index(part)
        return decode(codes, self._spec.bits[i], self._spec.dtype, self.layer.dims[i])

    def decode_blocks(self, part: str, blocks: Sequence[Mapping[str, mx.array]]) -> list[mx.array]:
        """Decode consecutive blocks of this layer: pieces [1, H, n, D], in order."""
        return [self.decode(part, concatenate_codes(blocks, part))]


class ModelSpaceCodec(LayerCodec):
    """Codes of a layer whose running cache holds keys and values as the model made them."""

    def encode(self, part: str, x: mx.array) -> Codes:
        return super().encode(part, self.space.enter_part(self.index, part, x))

    def decode(self, part: str, codes: Codes) -> mx.array:
        return self.space.leave_part(self.index, part, super().decode(part, codes))

    def decode_blocks(self, part: str, blocks: Sequence[Mapping[str, mx.array]]) -> list[mx.array]:
        """Decode one block a call: a product's rounding may depend on its number of rows."""
        return [self.decode(part, concatenate_codes([block], part)) for block in blocks]
