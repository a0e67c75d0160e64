"""What /metrics shows, in Prometheus' text format. Counted on the engine thread, read on the event loop."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .engine.request import RequestStats

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


@dataclass(frozen=True)
class EngineFigures:
    """The engine's state at one moment; bytes of caches."""

    running: int
    waiting: int
    restoring: int
    ram_bytes: int
    reserved_bytes: int
    disk_bytes: int
    written_bytes: int
    restored_bytes: int
    evicted_bytes: int
    suspensions: int
    quarantined: int
    trimmed_bytes: int
    store_bytes: int
    written_last_hour: int


class Metrics(Collector):
    """One engine's metrics, in a registry of their own."""

    def __init__(self, read: Callable[[], EngineFigures]):
        self._read = read
        self._registry = registry = CollectorRegistry()
        registry.register(self)
        self._requests = Counter("agentmem_requests", "finished requests", ["cache"], registry=registry)
        self._causes = Counter(
            "agentmem_prefix", "finished requests by why no more was cached", ["cause"], registry=registry
        )
        self._prompt = Counter("agentmem_prompt_tokens", "prompt tokens of finished requests", registry=registry)
        self._cached = Counter("agentmem_cached_tokens", "of those, taken from the cache", registry=registry)
        self._completion = Counter("agentmem_completion_tokens", "answered tokens", registry=registry)
        self._ttft = self._histogram("agentmem_ttft_seconds", "submission to first token", ["cache"])
        self._queue = self._histogram("agentmem_queue_seconds", "submission to leaving the queue", ["cache"])
        self._inter_token = self._histogram("agentmem_inter_token_seconds", "between two tokens of one answer", [])

    def _histogram(self, name: str, text: str, labels: list[str]) -> Histogram:
        return Histogram(name, text, labels, buckets=_SECONDS, registry=self._registry)

    def finished(self, stats: RequestStats) -> None:
        self._requests.labels(stats.cache).inc()
        self._causes.labels(stats.cause).inc()
        self._prompt.inc(stats.prompt_tokens)
        self._cached.inc(stats.cached_tokens)
        self._completion.inc(stats.completion_tokens)
        self._ttft.labels(stats.cache).observe(stats.ttft_ms / 1e3)
        self._queue.labels(stats.cache).observe(stats.queue_ms / 1e3)

    def token_after(self, seconds: float) -> None:
        self._inter_token.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """Gauges and the counters that others keep, as they are now."""
        now = self._read()
        for name in ("running", "waiting", "restoring"):
            yield GaugeMetricFamily(f"agentmem_{name}_requests", f"requests {name}", getattr(now, name))
        yield GaugeMetricFamily("agentmem_ram_bytes", "caches in RAM, and reserved; within kv_budget", now.ram_bytes)
        text = "of agentmem_ram_bytes: working copies, what running requests may still take, reads in flight"
        yield GaugeMetricFamily("agentmem_reserved_bytes", text, now.reserved_bytes)
        yield GaugeMetricFamily("agentmem_disk_bytes", "blocks and tails on disk", now.disk_bytes)
        for name in ("written", "restored", "evicted"):
            text = {"written": "to disk", "restored": "from disk to RAM", "evicted": "from RAM"}[name]
            yield CounterMetricFamily(f"agentmem_{name}_bytes", f"bytes {name} {text}", getattr(now, f"{name}_bytes"))
        yield CounterMetricFamily("agentmem_suspensions", "times a request gave up its RAM to others", now.suspensions)
        yield GaugeMetricFamily("agentmem_store_bytes", "disk it takes, within store_quota", now.store_bytes)
        text = "bytes written to disk in the last hour"
        yield GaugeMetricFamily("agentmem_written_bytes_last_hour", text, now.written_last_hour)
        text = "bytes that left a full store, used longest ago"
        yield CounterMetricFamily("agentmem_trimmed_bytes", text, now.trimmed_bytes)
        yield CounterMetricFamily("agentmem_quarantined_files", "stored files found damaged", now.quarantined)

    def text(self) -> bytes:
        return generate_latest(self._registry)
