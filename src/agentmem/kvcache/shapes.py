"""Shapes that the arrays of a block or a tail must have, where caches come from outside."""

import math
from collections.abc import Collection, Iterable
from dataclasses import replace

import mlx.core as mx

from ..tensors import TensorName, stack_part, state_part
from .block import STORABLE
from .spec import KVCacheSpec, coded_shape

Shapes = dict[str, tuple[str, tuple[int, ...]]]  # by name: dtype as in HostTensor, shape


def block_shapes(
    spec: KVCacheSpec, num_tokens: int, parts: Collection[str], *, first: bool
) -> Shapes:
    """Return the shapes of a sealed block, or of the first tokens of one, that has `parts`.

    `first`: it is a sequence's first block, so that it has sinks. The stacks of layers that see
    everything must be there. Parts that there can't be are left out.
    """
    there = spec.lasting_parts.union(parts)
    wanted = [s for s in range(len(spec.stacks)) if stack_part(s) in there]
    stacks = (
        _codes(spec, wanted, num_tokens, first)
        if spec.bits is not None
        else _full(spec, wanted, num_tokens)
    )
    return stacks | _states(spec, num_tokens, parts)


def tail_shapes(
    spec: KVCacheSpec, num_tokens: int, prefix_len: int, parts: Collection[str], *, first: bool
) -> Shapes:
    """Return the shapes of a tail that starts with the codes of `prefix_len` tokens.

    Of `parts`, only snapshots count: of the stacks it always has all.
    """
    stacks = {stack_part(s) for s in range(len(spec.stacks))}
    full = _full(spec, range(len(spec.stacks)), num_tokens - prefix_len)
    codes = block_shapes(spec, prefix_len, stacks, first=first) if prefix_len else {}
    prefix = {
        str(replace(TensorName.parse(n), in_prefix=True)): shape for n, shape in codes.items()
    }
    shapes = {name: shape for name, shape in full.items() if math.prod(shape[1])}
    return shapes | prefix | _states(spec, num_tokens, parts)


def _full(spec: KVCacheSpec, stacks: Iterable[int], num_tokens: int) -> Shapes:
    dtype = STORABLE[spec.dtype]
    shapes: Shapes = {}
    for s in stacks:
        layer = spec.layers[spec.stacks[s][0]]
        for part, dim in zip("kv", layer.dims, strict=True):
            name = TensorName(part, stack_part(s), "full")
            shapes[str(name)] = (
                dtype,
                (len(spec.stacks[s]), layer.num_kv_heads, num_tokens, dim),
            )
    return shapes


def _codes(spec: KVCacheSpec, stacks: Iterable[int], num_tokens: int, first: bool) -> Shapes:
    assert spec.bits is not None
    dtype = STORABLE[spec.dtype]
    shapes: Shapes = {}
    scale = "BF16" if dtype == "BF16" else "F16"
    for s in stacks:
        layer = spec.layers[spec.stacks[s][0]]
        where = len(spec.stacks[s]), layer.num_kv_heads
        for part, dim, bits in zip("kv", layer.dims, spec.bits, strict=True):
            padded, group = coded_shape(dim)
            fields = {
                "packed": ("U32", (*where, num_tokens, padded * bits // 32)),
                "scales": (scale, (*where, num_tokens, padded // group)),
                "biases": (scale, (*where, num_tokens, padded // group)),
            }
            if first:
                fields["sinks"] = dtype, (*where, min(num_tokens, spec.num_sinks), dim)
            for field, shape in fields.items():
                shapes[str(TensorName(part, stack_part(s), field))] = shape
    return shapes


def _states(spec: KVCacheSpec, num_tokens: int, parts: Collection[str]) -> Shapes:
    offsets = [n for n in range(1, num_tokens + 1) if state_part(n) in parts]
    shapes: Shapes = {}
    for s, stack in enumerate(spec.state_stacks):
        for i, (shape, dtype) in enumerate(spec.layers[stack[0]].state):
            for offset in offsets:
                name = TensorName("s", stack_part(s), str(i), offset)
                shapes[str(name)] = STORABLE[getattr(mx, dtype)], (len(stack), *shape[1:])
    return shapes
