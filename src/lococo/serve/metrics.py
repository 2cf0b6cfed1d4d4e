"""Figures for Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lococo.cache import kv_nbytes
from lococo.progress import resident_nbytes
from lococo.serve.contexts import ContextStore
from lococo.serve.engine import Engine

SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60, 300)


class Metrics:
    """What a server has done and holds; `/metrics` shows it.

    Args:
        engine: Counts tokens.
        store: Counts contexts.
    """

    def __init__(self, engine: Engine, store: ContextStore) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter("lococo_requests", "Requests answered", ["route", "status"], registry=self.registry)
        self._seconds = Histogram(
            "lococo_request_seconds", "How long they took", ["route"], buckets=SECONDS, registry=self.registry
        )
        self.registry.register(_Figures(engine, store))

    def counted(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """Return all figures as Prometheus reads them."""
        return generate_latest(self.registry)


class _Figures(Collector):
    """Looks at the engine and the store when somebody asks."""

    def __init__(self, engine: Engine, store: ContextStore) -> None:
        self.engine = engine
        self.store = store

    def collect(self) -> Iterator[Metric]:
        engine, counts = self.engine, self.engine.counts
        for name, said, total in (
            ("prompt_tokens", "Tokens of prompts and documents read", counts.prompt_tokens),
            ("cached_tokens", "Tokens of prompts that slots held already", counts.cached_tokens),
            ("completion_tokens", "Tokens written", counts.completion_tokens),
            ("compressions", "Rows compressed", counts.compressions),
            ("steps", "Decoding steps, of one token per answer", counts.steps),
        ):
            yield CounterMetricFamily(f"lococo_{name}", said, total)
        contexts, disk = self.store.totals()
        caches = engine.batch.caches + [one.cache for one in list(engine.readings)]
        for name, said, value in (
            ("queue_length", "Requests that wait", engine.queue_length),
            ("batch_size", "Answers that are written now", len(engine.batch.answers)),
            ("readings", "Prompts and documents that are read now", len(engine.readings)),
            ("kv_bytes", "Keys and values of requests at work", sum(map(kv_nbytes, caches))),
            ("conversations", "Conversations kept ready", len(engine.conversations)),
            ("conversation_bytes", "Memory of conversations kept ready", engine.conversations.nbytes),
            ("contexts", "Contexts on disk", contexts),
            ("context_disk_bytes", "Files of contexts", disk),
            ("context_bytes", "Memory of contexts kept ready", self.store.ready_nbytes()),
            ("resident_bytes", "Memory of the process", resident_nbytes()),
        ):
            yield GaugeMetricFamily(f"lococo_{name}", said, value)
