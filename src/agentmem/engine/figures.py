"""What the engine's parts count, for /metrics. Bytes are of caches."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily as Counted
from prometheus_client.core import GaugeMetricFamily as Gauge
from prometheus_client.core import Metric

from .sequence import Status
from .startup import Core


def figures(core: Core, preemptions: int, ram_bytes: int, reserved_bytes: int) -> Iterator[Metric]:
    """Called on the event loop: reads counts that the engine thread changes, each whole."""
    statuses = [seq.status for seq in list(core.scheduler.active)]
    restoring, store = statuses.count(Status.RESTORING), core.store.stats()
    yield Gauge("agentmem_running_requests", "requests running", len(statuses) - restoring)
    yield Gauge("agentmem_waiting_requests", "requests waiting", len(core.scheduler.waiting))
    yield Gauge("agentmem_restoring_requests", "requests restoring", restoring)
    yield Gauge("agentmem_ram_bytes", "caches in RAM, and reserved; within kv_budget", ram_bytes)
    text = "of agentmem_ram_bytes: working copies, what running requests may still take, reads in flight"
    yield Gauge("agentmem_reserved_bytes", text, reserved_bytes)
    yield Gauge(
        "agentmem_disk_bytes",
        "blocks and tails on disk",
        store["block_bytes"] + store["tail_bytes"],
    )
    yield Counted("agentmem_written_bytes", "bytes written to disk", store["bytes_written"])
    yield Counted(
        "agentmem_restored_bytes", "bytes restored from disk to RAM", core.restorer.restored_bytes
    )
    yield Counted(
        "agentmem_evicted_bytes", "bytes evicted from RAM", core.prefix_cache.pool.evicted_bytes
    )
    yield Counted("agentmem_preemptions", "times a request gave up its RAM to others", preemptions)
    yield Gauge("agentmem_store_bytes", "disk it takes, within store_quota", store["disk_bytes"])
    text = "bytes written to disk in the last hour"
    yield Gauge("agentmem_written_bytes_last_hour", text, store["bytes_written_last_hour"])
    yield Counted(
        "agentmem_trimmed_bytes",
        "bytes that left a full store, used longest ago",
        store["trimmed_bytes"],
    )
    yield Counted("agentmem_quarantined_files", "stored files found damaged", store["quarantined"])
