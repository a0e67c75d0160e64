"""glibc's allocator, told to keep what MLX frees (Linux CPU builds; elsewhere nothing is done).

MLX allocates each result anew on the CPU. By default glibc maps large blocks from the kernel and
unmaps them when they are freed, so that every working copy of a cache is touched for the first time
again, 2 to 18 us a page in a virtual machine: with that, a warm start of 1,000 tokens took 110 to
420 ms, without it 105 to 180 (benchmarks/ttft.py).
"""

import ctypes
import sys

# malloc.h: parameter numbers of mallopt
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
KEPT_BYTES = 512 << 20  # free memory at the heap's end that stays with the process
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc takes no more


def release_freed_memory() -> None:
    """Give back what `keep_freed_memory` keeps."""
    if (
        sys.platform == "linux"
        and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None
    ):
        trim(0)


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory, and return whether it took it.

    Call it before threads start: each would otherwise get a heap of its own.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return False
    options = (
        (_M_ARENA_MAX, 1),
        (_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD),
        (_M_TRIM_THRESHOLD, KEPT_BYTES),
        (_M_TOP_PAD, 16 << 20),
    )
    return all(mallopt(option, value) == 1 for option, value in options)
