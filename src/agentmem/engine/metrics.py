"""What /metrics shows, in Prometheus' text format.

It is counted on the engine thread and read on the event loop.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily as Counted
from prometheus_client.core import GaugeMetricFamily as Gauge
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from ..prefix_cache.block_pool import BlockPool
from ..prefix_cache.restore import Restorer
from ..store.agent_store import AgentStore
from .api import RequestStats
from .budget import RamBudget
from .scheduler import Scheduler
from .sequence import Status

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics(Collector):
    """One engine's metrics, in a registry of their own."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        budget: RamBudget,
        pool: BlockPool,
        restorer: Restorer,
        store: AgentStore,
    ):
        self._scheduler = scheduler
        self._budget = budget
        self._pool = pool
        self._restorer = restorer
        self._store = store
        self.failed_grammars = 0
        self._registry = registry = CollectorRegistry()
        registry.register(self)
        self._requests = Counter(
            "agentmem_requests", "finished requests", ["cache"], registry=registry
        )
        self._causes = Counter(
            "agentmem_prefix",
            "finished requests by why no more was cached",
            ["cause"],
            registry=registry,
        )
        self._prompt = Counter(
            "agentmem_prompt_tokens", "prompt tokens of finished requests", registry=registry
        )
        self._cached = Counter(
            "agentmem_cached_tokens", "of those, taken from the cache", registry=registry
        )
        self._prefilled = Counter(
            "agentmem_prefilled_tokens",
            "tokens computed by prefill; of several answers to a prompt, once",
            registry=registry,
        )
        self._completion = Counter(
            "agentmem_completion_tokens", "answered tokens", registry=registry
        )
        self._ttft = self._histogram(
            "agentmem_ttft_seconds", "submission to first token", ["cache"]
        )
        self._queue = self._histogram(
            "agentmem_queue_seconds", "submission to leaving the queue", ["cache"]
        )
        self._inter_token = self._histogram(
            "agentmem_inter_token_seconds", "between two tokens of one answer", []
        )

    def _histogram(self, name: str, text: str, labels: list[str]) -> Histogram:
        return Histogram(name, text, labels, buckets=_SECONDS, registry=self._registry)

    def finished(self, stats: RequestStats) -> None:
        """Count a request that has ended, once however many answers it has."""
        self._requests.labels(stats.cache).inc()
        self._causes.labels(stats.cause).inc()
        self._prompt.inc(stats.prompt_tokens)
        self._cached.inc(stats.cached_tokens)
        self._ttft.labels(stats.cache).observe(stats.ttft_ms / 1e3)
        self._queue.labels(stats.cache).observe(stats.queue_ms / 1e3)

    def answered(self, num_tokens: int) -> None:
        """Count the tokens of an answer that has ended."""
        self._completion.inc(num_tokens)

    def prefilled(self, num_tokens: int) -> None:
        """Count tokens that a chunk of prefill computed."""
        self._prefilled.inc(num_tokens)

    def token_after(self, seconds: float) -> None:
        """Count the seconds between two tokens of one answer."""
        self._inter_token.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """Yield gauges, and the counters that others keep, as they are now.

        The event loop reads counts that the engine thread changes, each whole. Bytes are of caches.
        """
        statuses = [seq.status for seq in list(self._scheduler.active)]
        restoring = statuses.count(Status.RESTORING)
        store = self._store.stats()
        yield Gauge("agentmem_running_requests", "requests running", len(statuses) - restoring)
        yield Gauge("agentmem_waiting_requests", "requests waiting", len(self._scheduler.waiting))
        yield Gauge("agentmem_restoring_requests", "requests restoring", restoring)
        yield Gauge(
            "agentmem_ram_bytes",
            "caches in RAM, and reserved; within kv_budget",
            self._budget.noted_used,
        )
        text = (
            "of agentmem_ram_bytes: working copies, what running requests may still take, "
            "reads in flight"
        )
        yield Gauge("agentmem_reserved_bytes", text, self._budget.noted_reserved)
        yield Gauge(
            "agentmem_disk_bytes",
            "blocks and tails on disk",
            store["block_bytes"] + store["tail_bytes"],
        )
        yield Counted("agentmem_written_bytes", "bytes written to disk", store["bytes_written"])
        yield Counted(
            "agentmem_restored_bytes",
            "bytes restored from disk to RAM",
            self._restorer.restored_bytes,
        )
        yield Counted("agentmem_evicted_bytes", "bytes evicted from RAM", self._pool.evicted_bytes)
        yield Counted(
            "agentmem_preemptions",
            "times a request gave up its RAM to others",
            self._scheduler.preemptions,
        )
        yield Counted(
            "agentmem_failed_grammars",
            "answers that could not go on under their grammar",
            self.failed_grammars,
        )
        yield Gauge(
            "agentmem_store_bytes", "disk it takes, within store_quota", store["disk_bytes"]
        )
        text = "bytes written to disk in the last hour"
        yield Gauge("agentmem_written_bytes_last_hour", text, store["bytes_written_last_hour"])
        yield Counted(
            "agentmem_trimmed_bytes",
            "bytes that left a full store, used longest ago",
            store["trimmed_bytes"],
        )
        yield Counted(
            "agentmem_quarantined_files", "stored files found damaged", store["quarantined"]
        )

    def text(self) -> bytes:
        """Return all of it as Prometheus reads it."""
        return generate_latest(self._registry)
