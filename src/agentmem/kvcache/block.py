"""The idle forms of a cache: sealed blocks, the tail, and a snapshot of both.

All are immutable, and their arrays are evaluated.

Worked example, block_size 256, SmolLM2 (30 equal layers, 3 KV heads, head dim 64, 4 bits), 600
tokens:

    blocks[0]  tokens   0..255   k0.packed [30, 3, 256, 8] uint32,
                                 k0.scales, k0.biases [30, 3, 256, 1] float16,
                                 the same for v0, and the first tokens as they are:
                                 k0.sinks, v0.sinks [30, 3, 4, 64]
    blocks[1]  tokens 256..511   the same without sinks
    tail       tokens 512..599   k0.full, v0.full [30, 3, 88, 64], in the model's dtype

"0" is the index of a stack (layers of one kind and shape). A sliding-window layer's part of a block
is there only as long as a sequence needs it. Recurrent state is there where a snapshot was taken:
s0.1@137 [layers, ...] is the second array of state stack 0 after 137 tokens of the block. Where a
block was cut inside, the tail starts with the codes it had: `tail.prefix` holds them, and they are
never quantized again.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ..tensors import HostTensor, TensorName, part_of, stack_part
from .spec import KVCacheSpec

Arrays = dict[str, mx.array]
RawArrays = dict[str, tuple[str, mx.array]]  # dtype as in HostTensor, array


def states_until(arrays: Arrays, num_tokens: int) -> Arrays:
    """Return the snapshots of recurrent state in the first `num_tokens` tokens of a block."""
    return {
        name: a
        for name, a in arrays.items()
        if (offset := TensorName.parse(name).offset) is not None and offset <= num_tokens
    }


@dataclass(frozen=True, eq=False)
class SealedBlock:
    """A full block, or the first tokens of one that was cut: codes of all layers or some."""

    arrays: Arrays

    @cached_property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays.values())

    @cached_property
    def parts(self) -> frozenset[str]:
        """The parts that are here, see tensors.TensorName."""
        return frozenset(map(part_of, self.arrays))

    def only(self, parts: Container[str]) -> "SealedBlock":
        """Return the block with none but these parts."""
        return SealedBlock({name: a for name, a in self.arrays.items() if part_of(name) in parts})

    def with_arrays(self, more: Arrays) -> "SealedBlock":
        """Return the block with `more` beside what it has."""
        return SealedBlock(self.arrays | more)

    def cut(self, num_tokens: int) -> "SealedBlock":
        """Return the first `num_tokens` tokens, codes as they are, without states."""
        stacks = {n: a for n, a in self.arrays.items() if TensorName.parse(n).offset is None}
        return SealedBlock({name: a[:, :, :num_tokens] for name, a in stacks.items()})


@dataclass(frozen=True, eq=False)
class Tail:
    """The open block of a sequence, `num_tokens` long.

    Its first `prefix_len` tokens are codes, of a block that was cut; the others are in full
    precision.
    """

    num_tokens: int
    full: Arrays
    prefix: SealedBlock | None = None
    prefix_len: int = 0
    states: Arrays = field(default_factory=dict)  # of recurrent layers, named as in a block

    @cached_property
    def nbytes(self) -> int:
        arrays = (*self.full.values(), *self.states.values())
        return sum(a.nbytes for a in arrays) + (self.prefix.nbytes if self.prefix else 0)

    @cached_property
    def parts(self) -> frozenset[str]:
        """Its snapshots of recurrent state; of the layers' stacks it always has all."""
        return frozenset(map(part_of, self.states))

    def cut(self, num_tokens: int) -> "Tail | None":
        """Return the first `num_tokens` tokens; None where that is none."""
        if num_tokens == 0:
            return None
        if num_tokens >= self.num_tokens:
            return self
        keep = min(self.prefix_len, num_tokens)
        prefix = self.prefix.cut(keep) if self.prefix and keep else None
        full = {name: a[:, :, : num_tokens - keep] for name, a in self.full.items()}
        return Tail(num_tokens, full, prefix, keep, states_until(self.states, num_tokens))

    def compact(self) -> "Tail":
        """Return a copy that is no view of what it was cut from."""
        prefix = SealedBlock(compact(self.prefix.arrays)) if self.prefix else None
        return replace(self, full=compact(self.full), prefix=prefix, states=compact(self.states))

    def to_arrays(self) -> Arrays:
        """Return one flat dict, for a file; empty arrays are left out."""
        prefix = self.prefix.arrays if self.prefix else {}
        codes = {str(replace(TensorName.parse(n), in_prefix=True)): a for n, a in prefix.items()}
        return {n: a for n, a in self.full.items() if a.size} | codes | self.states

    @staticmethod
    def from_arrays(arrays: Arrays, num_tokens: int, prefix_len: int, spec: KVCacheSpec) -> "Tail":
        """Make a tail of what `to_arrays` returned."""
        states = states_until(arrays, num_tokens)
        codes: Arrays = {}
        full: Arrays = {}
        for text, array in arrays.items():
            name = TensorName.parse(text)
            if name.in_prefix:
                codes[str(replace(name, in_prefix=False))] = array
            elif text not in states:
                full[text] = array
        prefix = SealedBlock(codes) if codes else None
        return Tail(num_tokens, full or _no_tokens(spec), prefix, prefix_len, states)

    @staticmethod
    def of_cut_block(block: SealedBlock, num_tokens: int, spec: KVCacheSpec) -> "Tail":
        """Make the open block after `block` was cut to `num_tokens` >= 1 tokens, all codes."""
        states = states_until(block.arrays, num_tokens)
        return Tail(num_tokens, _no_tokens(spec), block.cut(num_tokens), num_tokens, states)


def _no_tokens(spec: KVCacheSpec) -> Arrays:
    full = {}
    for s, stack in enumerate(spec.stacks):
        layer = spec.layers[stack[0]]
        for part, dim in (("k", layer.k_dim), ("v", layer.v_dim)):
            name = TensorName(part, stack_part(s), "full")
            full[str(name)] = mx.zeros((len(stack), layer.num_kv_heads, 0, dim), spec.dtype)
    return full


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One sequence's cache at rest: whole blocks, then the open one."""

    blocks: Sequence[SealedBlock] = field(default_factory=tuple)
    tail: Tail | None = None


def compact(arrays: Arrays) -> Arrays:
    """Return evaluated copies of what may be views.

    A view of a few tokens would keep a whole buffer in RAM.
    """
    copies = {name: mx.contiguous(a) for name, a in arrays.items()}
    mx.eval(copies)
    return copies


STORABLE = {  # dtypes of arrays that a file can hold
    mx.int64: "I64",
    mx.int32: "I32",
    mx.uint32: "U32",
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
}
_NUMPY_DTYPES = {
    "I64": np.int64,
    "I32": np.int32,
    "U32": np.uint32,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
}


def to_host(arrays: Arrays) -> dict[str, HostTensor]:
    """Evaluate, and return views of the memory that keep the arrays alive: nothing is copied.

    Engine thread only.
    """
    raw = {
        n: mx.contiguous(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a)
        for n, a in arrays.items()
    }
    mx.eval(raw)
    return {
        n: HostTensor(STORABLE[a.dtype], a.shape, memoryview(cast(Any, raw[n])))
        for n, a in arrays.items()
    }


def copy_host(tensors: Mapping[str, HostTensor]) -> RawArrays:
    """Return arrays that own their memory, evaluated, bfloat16 as uint16.

    Any thread may call it: no stream is used.
    """
    return {
        name: (t.dtype, mx.array(np.frombuffer(t.data, _NUMPY_DTYPES[t.dtype]).reshape(t.shape)))
        for name, t in tensors.items()
    }


def from_raw(raw: RawArrays) -> Arrays:
    """Return what `copy_host` made, in the arrays' own dtypes. Engine thread only."""
    arrays = {
        name: a.view(mx.bfloat16) if dtype == "BF16" else a for name, (dtype, a) in raw.items()
    }
    mx.eval(arrays)
    return arrays


def from_host(tensors: Mapping[str, HostTensor]) -> Arrays:
    """Undo `to_host`. Engine thread only."""
    return from_raw(copy_host(tensors))
