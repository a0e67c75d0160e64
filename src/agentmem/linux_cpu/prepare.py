"""What comes before the first import of MLX: that is why commands import it inside."""

import sys
from pathlib import Path

from .allocator import keep_freed_memory
from .blas import BlasInfo, load_fast_blas


def prepare_mlx(home: Path, *, warn: bool = True) -> BlasInfo:
    """Allocator and BLAS; a slow BLAS is one line on stderr."""
    keep_freed_memory()
    blas = load_fast_blas(home)
    if warn and blas.warning:
        print(f"agentmem: warning: {blas.warning}", file=sys.stderr)
    return blas
