"""What the gateway counts, for Prometheus. Names follow vLLM's where the meaning is the same."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_FIRST_TOKEN_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 20, 40, 80)
_BETWEEN_TOKENS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.4, 0.75, 1, 2.5, 5)
_WHOLE_BUCKETS = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 480)


class Metrics:
    """One registry an app, so that two apps in a process do not mix."""

    def __init__(self, model: str):
        self._registry = CollectorRegistry()
        self._model = model

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"anypool:{name}", help, ("model_name", *labels), registry=self._registry)

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            metric = Histogram(f"anypool:{name}", help, ("model_name",), registry=self._registry, buckets=buckets)
            return metric.labels(model)

        self._requests = counter("http_requests", "Answers by route and status.", "route", "status")
        self._success = counter("request_success", "Choices generated to their end.", "finished_reason")
        self._failovers = counter("failovers", "Streams that lost their worker.", "reason")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens, each prompt once.").labels(model)
        self._cached_tokens = counter("prompt_tokens_cached", "Prompt tokens found in a prefix cache.").labels(model)
        self._tokens = counter("generation_tokens", "Tokens generated.").labels(model)
        self._running = Gauge(
            "anypool:num_requests_running",
            "Streams in flight on a pool.",
            ("model_name", "pool"),
            registry=self._registry,
        )
        self._first = histogram(
            "time_to_first_token_seconds", "From the request to its first token.", _FIRST_TOKEN_BUCKETS
        )
        self._between = histogram(
            "inter_token_latency_seconds", "From token to token, averaged over tokens that came together.",
            _BETWEEN_TOKENS_BUCKETS,
        )  # fmt: skip
        self._whole = histogram("e2e_request_latency_seconds", "From the request to its end.", _WHOLE_BUCKETS)

    def render(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def answered(self, route: str, status: int) -> None:
        self._requests.labels(self._model, route, str(status)).inc()

    def in_flight(self, pool: str, change: int) -> None:
        self._running.labels(self._model, pool).inc(change)

    def failover(self, reason: str) -> None:
        self._failovers.labels(self._model, reason).inc()

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def tokens(self, count: int, seconds_each: float | None) -> None:
        """Tokens that arrived together; seconds_each is None with the first ones of a stream."""
        self._tokens.inc(count)
        if seconds_each is not None:
            for _ in range(count):
                self._between.observe(seconds_each)

    def finished(self, reason: str) -> None:
        self._success.labels(self._model, reason).inc()

    def request_done(self, prompt_tokens: int, cached_tokens: int, seconds: float) -> None:
        self._prompt_tokens.inc(prompt_tokens)
        self._cached_tokens.inc(cached_tokens)
        self._whole.observe(seconds)
