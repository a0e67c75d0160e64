"""What a result was measured on."""

import os
import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal


def describe_machine() -> dict[str, Any]:
    """Return what a result says of its machine, and the date."""
    import mlx.core as mx  # loaded after its BLAS

    return {
        "date": datetime.now(UTC).date().isoformat(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "device": str(mx.default_device()),
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "python": platform.python_version(),
    }


def process_writes(pid: int | Literal["self"]) -> int | None:
    """Return the bytes that a process gave to the disk so far; None where only Linux tells."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/io").read_text().split("write_bytes: ")[1].split()[0])
    return None


def _cpu_name() -> str:
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
