"""What the operating system charges this process for, and what the machine has left."""

import ctypes
import os
import sys
from pathlib import Path

import mlx.core as mx

# <sys/resource.h>: uuid[16], then 64-bit fields, the eighth of them ri_phys_footprint
_RUSAGE_INFO_V0 = 0
_PHYS_FOOTPRINT = 16 + 7 * 8
_RUSAGE_SIZE = 16 + 10 * 8


def process_footprint() -> int:
    """Return the bytes of this process.

    They are phys_footprint on macOS (what Activity Monitor shows, GPU buffers included), else the
    resident set.
    """
    if sys.platform == "darwin":
        usage = ctypes.create_string_buffer(_RUSAGE_SIZE)
        if ctypes.CDLL(None).proc_pid_rusage(os.getpid(), _RUSAGE_INFO_V0, usage) != 0:
            raise OSError("proc_pid_rusage failed")
        return int.from_bytes(usage.raw[_PHYS_FOOTPRINT : _PHYS_FOOTPRINT + 8], sys.byteorder)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def physical_memory() -> int:
    """Return the bytes of RAM, or of this process' control group where that has less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such group; "max"
        return total


def room_for_caches() -> int:
    """Return the bytes that are free with the model loaded.

    They are of the GPU's recommended working set, or on a CPU of the available RAM.
    """
    info = mx.device_info()
    for name in ("max_recommended_working_set_size", "total_memory"):  # Metal, CUDA
        if mx.default_device() != mx.Device(mx.cpu) and name in info:
            return int(info[name]) - mx.get_active_memory()
    free = physical_memory() - process_footprint()
    if sys.platform != "linux":
        return free
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return min(free, int(fields["MemAvailable"].split()[0]) * 1024)
