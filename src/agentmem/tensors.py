"""A tensor as bytes in host memory: what the cache hands to the store and gets back."""

import math
from dataclasses import dataclass

ITEM_BYTES = {"F32": 4, "U32": 4, "I32": 4, "F16": 2, "BF16": 2, "U8": 1}  # by dtype, in safetensors' names


@dataclass(frozen=True)
class HostTensor:
    """`data` is C-contiguous and little-endian; as a memoryview, of any item format."""

    dtype: str  # a key of ITEM_BYTES
    shape: tuple[int, ...]
    data: memoryview | bytes

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]
