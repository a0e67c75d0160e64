"""Tensors as bytes in host memory, which the cache hands to the store, and their names."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

ITEM_BYTES = {
    "I64": 8,
    "F32": 4,
    "U32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "U8": 1,
}  # by dtype, in safetensors' names
_PREFIX = "prefix."
_STATE = "@"


@dataclass(frozen=True)
class HostTensor:
    """A tensor in host memory: `data` is C-contiguous, little-endian, of any item format."""

    dtype: str  # a key of ITEM_BYTES
    shape: tuple[int, ...]
    data: memoryview | bytes

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class TensorName:
    """The name of a tensor in a block or a tail, taken apart. `str` puts it together again.

        k0.packed          keys ("k") of stack 0, a stack of layers: their packed codes
        v1.sinks           values ("v") of stack 1: the sequence's first tokens as they are
        s0.1@137           recurrent state ("s") of state stack 0: its second array, 137 tokens on
        prefix.k0.packed   in a tail: the codes of a cut block that the tail starts with

    A tensor belongs to a part of its block, which is kept and read as a whole: part "0" is stack 0,
    part "@137" the recurrent state after 137 tokens.
    """

    role: str  # "k", "v" or "s"
    stack: str  # its index in decimal; "" where only one layer is spoken of
    field: str  # which of the tensors of this role
    offset: int | None = None  # tokens of the block after which the state was taken
    in_prefix: bool = False

    @staticmethod
    @lru_cache(maxsize=1 << 14)
    def parse(name: str) -> "TensorName":
        """Take `name` apart. Raises ValueError where an offset is no number."""
        bare = name.removeprefix(_PREFIX)
        head, at, offset = bare.partition(_STATE)
        stack, _, field = head[1:].partition(".")
        return TensorName(
            role=head[:1],
            stack=stack,
            field=field,
            offset=int(offset) if at else None,
            in_prefix=bare != name,
        )

    def __str__(self) -> str:
        prefix = _PREFIX if self.in_prefix else ""
        field = f".{self.field}" if self.field else ""
        offset = "" if self.offset is None else state_part(self.offset)
        return f"{prefix}{self.role}{self.stack}{field}{offset}"

    @property
    def part(self) -> str:
        """The part of the block that the tensor belongs to."""
        return self.stack if self.offset is None else state_part(self.offset)


def part_of(name: str) -> str:
    """Return the part of a block that the tensor called `name` belongs to, see TensorName."""
    return TensorName.parse(name).part


def stack_part(stack: int) -> str:
    """Name the part that is a stack of layers."""
    return str(stack)


def state_part(offset: int) -> str:
    """Name the part that is the recurrent state after `offset` tokens of a block."""
    return f"{_STATE}{offset}"


def is_state(part: str) -> bool:
    """Tell whether a part is recurrent state."""
    return part.startswith(_STATE)


def state_offset(part: str) -> int:
    """Return after how many tokens of the block the state was taken that `part` names."""
    assert is_state(part), part
    return int(part.removeprefix(_STATE))


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Count the items at the beginning of two arrays that are the same."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
