"""What /metrics shows, in Prometheus' text format. Counted on the engine thread, read on the event
loop.
"""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from .api import RequestStats

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics(Collector):
    """One engine's metrics, in a registry of their own. `read` gives what others count."""

    def __init__(self, read: Callable[[], Iterator[Metric]]):
        self._read = read
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
        return self._read()

    def text(self) -> bytes:
        return generate_latest(self._registry)
