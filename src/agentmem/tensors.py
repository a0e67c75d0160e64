"""A tensor as bytes in host memory: what the cache hands to the store and gets back."""

import math
from dataclasses import dataclass

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


@dataclass(frozen=True)
class HostTensor:
    """`data` is C-contiguous and little-endian; as a memoryview, of any item format."""

    dtype: str  # a key of ITEM_BYTES
    shape: tuple[int, ...]
    data: memoryview | bytes

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def part_of(name: str) -> str:
    """The part of a block that a tensor belongs to; a part is kept and read as a whole.

    "k0.packed", "v0.sinks": part "0", a stack of layers. "s1.0@137": part "@137", recurrent state
    after 137 tokens.
    """
    at = name.find("@")
    return name[at:] if at >= 0 else name.removeprefix("prefix.")[1:].partition(".")[0]


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Items at the beginning that are the same."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
