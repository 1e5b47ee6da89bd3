"""A worker's Prometheus metrics. Names are vLLM's where the meaning is the same, with the prefix `anypool:`."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from anypool.engine.engine import Engine, Update

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics(Collector):
    """Reads the engine's counters when scraped; only latencies are recorded as they happen."""

    def __init__(self, engine: Engine, model: str, pool: str) -> None:
        self._engine, self._pool = engine, pool
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._labels = ("model_name", "pool")
        self._values = (model, pool)

        def histogram(name: str, text: str) -> Histogram:
            made = Histogram(f"anypool:{name}", text, self._labels, registry=self.registry, buckets=SECONDS)
            return made.labels(*self._values)

        self._first_token = histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self._between = histogram("inter_token_latency_seconds", "Between two tokens of a request.")
        self._queue = histogram("request_queue_time_seconds", "From arrival to the first step.")
        self._prefill = histogram("request_prefill_time_seconds", "From the first step to the first token.")
        self._whole = histogram("e2e_request_latency_seconds", "From arrival to the last token.")
        self._last: dict[str, float] = {}

    def observe(self, update: Update) -> None:
        """Records one request's step."""
        request, now = update.request, time.monotonic()
        previous = self._last.get(request.id)
        if previous is not None:
            self._between.observe(now - previous)
        elif request.first_token_at is not None and request.scheduled_at is not None:
            self._first_token.observe(request.first_token_at - request.arrival)
            self._queue.observe(request.scheduled_at - request.arrival)
            self._prefill.observe(request.first_token_at - request.scheduled_at)
        self._last[request.id] = now
        if update.finish_reason is not None:
            self._whole.observe(now - request.arrival)
            self.forget(request.id)

    def forget(self, request_id: str) -> None:
        """Drops what is kept of a request that ended or was cancelled."""
        self._last.pop(request_id, None)

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        engine, counters = self._engine, self._engine.counters
        totals, pool = engine.scheduler.totals, engine.pool

        def gauge(name: str, text: str, value: float) -> Metric:
            family = GaugeMetricFamily(f"anypool:{name}", text, labels=self._labels)
            family.add_metric(self._values, value)
            return family

        def counter(name: str, text: str, value: float) -> Metric:
            family = CounterMetricFamily(f"anypool:{name}", text, labels=self._labels)
            family.add_metric(self._values, value)
            return family

        yield gauge("num_requests_running", "Requests that run.", engine.scheduler.num_running)
        yield gauge("num_requests_waiting", "Requests that wait.", engine.scheduler.num_waiting)
        yield gauge("kv_cache_usage_perc", "Share of cache blocks in use, 0 to 1.", pool.num_used / pool.capacity)
        yield counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", totals.prefix_queries)
        yield counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.", totals.prefix_hits)
        yield counter("num_preemptions", "Requests preempted for want of blocks.", totals.preemptions)
        yield counter("prompt_tokens", "Prompt tokens of finished requests.", counters.prompt_tokens)
        yield counter("generation_tokens", "Tokens generated.", counters.generation_tokens)
        yield counter("engine_steps", "Steps of the engine.", counters.steps)
        yield counter("engine_step_seconds", "Seconds in device steps.", counters.step_seconds)
        yield counter("engine_host_seconds", "Seconds of scheduling between steps.", counters.host_seconds)
        success = CounterMetricFamily(
            "anypool:request_success", "Requests finished, by reason.", labels=(*self._labels, "finished_reason")
        )
        for reason, count in counters.finished.items():
            success.add_metric((*self._values, reason), count)
        yield success
        kernels = InfoMetricFamily("anypool:kernels", "Implementation of each op.", labels=self._labels)
        kernels.add_metric(self._values, engine.runner.kernels.report())
        yield kernels
