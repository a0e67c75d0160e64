"""The idle forms of a cache: sealed blocks, the tail, and a snapshot of both. Immutable; arrays are evaluated.

Worked example, block_size 256, SmolLM2 (30 equal layers, 3 KV heads, head dim 64, 4 bits), 600 tokens:

    blocks[0]  tokens   0..255   k0.packed [30, 3, 256, 8] uint32, k0.scales and k0.biases [30, 3, 256, 1] float16, the
                                 same for v0, and k0.sinks, v0.sinks [30, 3, 4, 64]: the first tokens as they are
    blocks[1]  tokens 256..511   the same without sinks
    tail       tokens 512..599   k0.full, v0.full [30, 3, 88, 64], in the model's dtype

"0" is the index of a stack (layers of one shape). Where a block was cut inside, the tail starts with the codes it had:
`tail.prefix` holds them, and they are never quantized again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ..tensors import HostTensor
from .quantize import Codes, decode
from .spec import KVCacheSpec

Arrays = dict[str, mx.array]
RawArrays = dict[str, tuple[str, mx.array]]  # dtype as in HostTensor, array
TOKENS = 2  # the token axis of every array here


@dataclass(frozen=True, eq=False)
class SealedBlock:
    arrays: Arrays

    @cached_property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays.values())

    def cut(self, num_tokens: int) -> "SealedBlock":
        """The first `num_tokens` tokens, codes as they are."""
        return SealedBlock({name: a[:, :, :num_tokens] for name, a in self.arrays.items()})


@dataclass(frozen=True, eq=False)
class Tail:
    """The open block of a sequence: `prefix_len` tokens as codes (of a block that was cut), the others in full."""

    num_tokens: int
    full: Arrays
    prefix: SealedBlock | None = None
    prefix_len: int = 0

    @cached_property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.full.values()) + (self.prefix.nbytes if self.prefix else 0)

    def cut(self, num_tokens: int) -> "Tail | None":
        if num_tokens == 0:
            return None
        if num_tokens >= self.num_tokens:
            return self
        keep = min(self.prefix_len, num_tokens)
        prefix = self.prefix.cut(keep) if self.prefix and keep else None
        full = {name: a[:, :, : num_tokens - keep] for name, a in self.full.items()}
        return Tail(num_tokens, full, prefix, keep)

    def to_arrays(self) -> Arrays:
        """One flat dict, for a file; empty arrays are left out."""
        prefix = self.prefix.arrays if self.prefix else {}
        return {n: a for n, a in self.full.items() if a.size} | {f"prefix.{n}": a for n, a in prefix.items()}

    @staticmethod
    def from_arrays(arrays: Arrays, num_tokens: int, prefix_len: int, spec: KVCacheSpec) -> "Tail":
        codes = {n.removeprefix("prefix."): a for n, a in arrays.items() if n.startswith("prefix.")}
        full = {n: a for n, a in arrays.items() if not n.startswith("prefix.")}
        if not codes:
            return Tail(num_tokens, full)
        prefix = SealedBlock(codes)
        return Tail(num_tokens, full or Tail.of_cut_block(prefix, prefix_len, spec).full, prefix, prefix_len)

    @staticmethod
    def of_cut_block(block: SealedBlock, num_tokens: int, spec: KVCacheSpec) -> "Tail":
        """The open block after `block` was cut to `num_tokens` >= 1 tokens: all of them codes."""
        full = {}
        for s, stack in enumerate(spec.stacks):
            layer = spec.layers[stack[0]]
            for part, dim in (("k", layer.k_dim), ("v", layer.v_dim)):
                full[f"{part}{s}.full"] = mx.zeros((len(stack), layer.num_kv_heads, 0, dim), spec.dtype)
        return Tail(num_tokens, full, block.cut(num_tokens), num_tokens)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """All of one sequence's cache: whole blocks, then the open one."""

    blocks: Sequence[SealedBlock] = field(default_factory=tuple)
    tail: Tail | None = None


def values(sources: Sequence[Mapping[str, mx.array]], part: str, spec: KVCacheSpec) -> list[mx.array]:
    """What one layer's part of consecutive blocks stands for, in cache space: pieces [1, H, n, D], in order.

    `part` is "k" or "v"; names come without the stack ("k.packed"). The first of `sources` may carry sinks.
    """
    if spec.bits is None:
        return [s[f"{part}.full"] for s in sources]
    dense = decode(concatenate_codes(sources, part), spec.bits["kv".index(part)], spec.dtype)
    sinks = sources[0].get(f"{part}.sinks")
    return [dense] if sinks is None else [sinks, dense[:, :, sinks.shape[TOKENS] :]]


def concatenate_codes(blocks: Sequence[Mapping[str, mx.array]], name: str) -> Codes:
    parts = (mx.concatenate([b[f"{name}.{field}"] for b in blocks], axis=TOKENS) for field in Codes._fields)
    return Codes(*parts)


_HOST_DTYPES = {mx.uint32: "U32", mx.float16: "F16", mx.float32: "F32", mx.bfloat16: "BF16"}
_NUMPY_DTYPES = {"U32": np.uint32, "F16": np.float16, "F32": np.float32, "BF16": np.uint16}


def to_host(arrays: Arrays) -> dict[str, HostTensor]:
    """Evaluate, and hand out views of the memory that keep the arrays alive: nothing is copied. Engine thread only."""
    raw = {n: mx.contiguous(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a) for n, a in arrays.items()}
    mx.eval(raw)
    return {n: HostTensor(_HOST_DTYPES[a.dtype], a.shape, memoryview(cast(Any, raw[n]))) for n, a in arrays.items()}


def copy_host(tensors: Mapping[str, HostTensor]) -> RawArrays:
    """Arrays that own their memory, evaluated, bfloat16 as uint16. Any thread: no stream is used."""
    return {
        name: (t.dtype, mx.array(np.frombuffer(t.data, _NUMPY_DTYPES[t.dtype]).reshape(t.shape)))
        for name, t in tensors.items()
    }


def from_raw(raw: RawArrays) -> Arrays:
    """Engine thread only."""
    arrays = {name: a.view(mx.bfloat16) if dtype == "BF16" else a for name, (dtype, a) in raw.items()}
    mx.eval(arrays)
    return arrays


def from_host(tensors: Mapping[str, HostTensor]) -> Arrays:
    """The inverse of `to_host`. Engine thread only."""
    return from_raw(copy_host(tensors))
