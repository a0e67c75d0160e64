"""mlx_lm.server over the BLAS and allocator of agentmem's own server.

A CPU is 85 times slower without them.

python -m agentmem.bench.harness.mlx_lm_server HOME [OPTIONS OF mlx_lm.server]
"""

import sys
from pathlib import Path

from ...linux_cpu.prepare import prepare_mlx


def main() -> None:
    prepare_mlx(Path(sys.argv.pop(1)))
    from mlx_lm.server import main as serve

    serve()


if __name__ == "__main__":
    main()
