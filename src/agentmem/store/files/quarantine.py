"""The quarantine: files that failed verification, kept for a look at what went wrong."""

from .layout import Layout
from .segment import remove_file

MAX_QUARANTINE = 64 << 20  # bytes; the oldest go


def trim_quarantine(layout: Layout, limit: int = MAX_QUARANTINE) -> int:
    """Delete the oldest files until `limit` bytes are left; return the bytes that became free."""
    found = [(path, path.stat()) for path in layout.quarantine.iterdir()]
    found.sort(key=lambda file: -file[1].st_mtime)
    kept = freed = 0
    for path, stat in found:
        kept += stat.st_size
        if kept > limit:
            freed += remove_file(path) or 0
    return freed


def empty_quarantine(layout: Layout) -> int:
    """Delete all files; return the bytes that became free."""
    return trim_quarantine(layout, -1)
