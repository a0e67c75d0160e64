"""Steps before the first import of MLX, which is why commands import MLX inside."""

import sys
from pathlib import Path

from .allocator import keep_freed_memory
from .blas import BlasInfo, load_fast_blas


def prepare_mlx(home: Path, *, warn: bool = True) -> BlasInfo:
    """Set up the allocator and the BLAS; a slow BLAS is one line on stderr."""
    keep_freed_memory()
    blas = load_fast_blas(home)
    if warn and blas.warning:
        print(f"agentmem: warning: {blas.warning}", file=sys.stderr)
    return blas
