"""What the engine counts, for /metrics and the dashboard."""

from ..metrics import EngineFigures
from .sequence import Status
from .startup import Core


def figures(core: Core, suspensions: int, ram_bytes: int, reserved_bytes: int) -> EngineFigures:
    """Called on the event loop: reads counts that the engine thread changes, each whole."""
    statuses = [seq.status for seq in list(core.scheduler.active)]
    store = core.store.stats()
    return EngineFigures(
        running=sum(status is not Status.RESTORING for status in statuses),
        waiting=len(core.scheduler.waiting),
        restoring=sum(status is Status.RESTORING for status in statuses),
        ram_bytes=ram_bytes,
        reserved_bytes=reserved_bytes,
        disk_bytes=store["block_bytes"] + store["tail_bytes"],
        written_bytes=store["bytes_written"],
        restored_bytes=core.restorer.restored_bytes,
        evicted_bytes=core.contexts.pool.evicted_bytes,
        suspensions=suspensions,
        quarantined=store["quarantined"],
        trimmed_bytes=store["trimmed_bytes"],
        store_bytes=store["disk_bytes"],
        written_last_hour=store["bytes_written_last_hour"],
    )
