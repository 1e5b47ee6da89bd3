"""One generation over the pools: whoever reads it sees one unbroken sequence of token ids.

When a worker dies, stalls or fails, the prompt and the ids already emitted go to another pool, which continues from
there. Draws are keyed by (seed, absolute position), so the continuation is the same one, greedy or sampled.
"""

import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass
from typing import Any

from anypool.gateway.errors import no_pool, queue_full, stream_lost
from anypool.gateway.metrics import Metrics
from anypool.gateway.pool_view import PoolView, PoolViews
from anypool.gateway.request import GenerationRequest, worker_body
from anypool.gateway.router import Router
from anypool.gateway.text import TokenBatch
from anypool.gateway.worker_client import Timing, WorkerBusy, WorkerClient, WorkerLost, WorkerStream

log = logging.getLogger(__name__)

_FIRST_RETRY_SECONDS = 0.05
_LONGEST_RETRY_SECONDS = 1.0


@dataclass(slots=True)
class Failover:
    """One loss and what it cost. Times are `time.monotonic()` seconds; None for what did not come about.

    emitted_tokens: ids emitted before the loss. prefill_done_at: by the new worker's own account of its queue and
    prefill. first_token_at: when the new worker's first token was here.
    """

    choice: int
    source: str
    target: str | None
    reason: str
    emitted_tokens: int
    last_token_at: float | None
    detected_at: float
    prefill_done_at: float | None = None
    first_token_at: float | None = None

    def as_dict(self) -> dict[str, Any]:
        record = asdict(self)
        return {"from": record.pop("source"), "to": record.pop("target"), **record}


@dataclass(frozen=True, slots=True)
class Services:
    """What every relay of an app shares."""

    views: PoolViews
    router: Router
    client: WorkerClient
    metrics: Metrics


class Relay:
    """The token ids of one choice. Call `start`, iterate `batches`, and always `close`."""

    def __init__(self, request: GenerationRequest, choice: int, services: Services):
        self.request = request
        self.choice = choice
        self.prompt = request.prompts[choice // request.n]
        self.emitted: list[int] = []
        self.pools: list[str] = []
        self.failovers: list[Failover] = []
        self.cached_tokens = 0
        self._services = services
        self._settings = services.views.settings
        self._pool: PoolView | None = None
        self._stream: WorkerStream | None = None
        self._attempts = 0
        self._barren = 0  # losses since the last new token
        self._cached_known = False
        self._opened_at = 0.0
        self._last_token_at: float | None = None

    async def start(self) -> None:
        """Returns when a pool has admitted the request. Raises ApiError: refused, every queue full, or no pool."""
        await self._connect()

    async def batches(self) -> AsyncGenerator[list[TokenBatch]]:
        """The ids as they come, to the batch that has a finish_reason. Raises ApiError when no pool can go on."""
        finished = False
        while not finished:
            stream = self._stream
            assert stream is not None, "start() comes first"
            try:
                events = await stream.read()
            except WorkerLost as loss:
                self._lost(loss)
                ending = self._ended_silently()
                if ending is not None:
                    yield [TokenBatch([], finish_reason=ending)]
                    return
                await self._connect()
                continue
            finished = events.finished
            if events.cached_tokens is not None and not self._cached_known and len(self.pools) == 1:
                # Later attempts find what the first one computed; that is not what the client's prompt had cached.
                self.cached_tokens, self._cached_known = events.cached_tokens, True
            batches = [batch for batch in events.batches if batch.token_ids or batch.finish_reason is not None]
            if any(batch.token_ids for batch in batches):
                self._arrived(batches, events.timing)
            if batches:
                yield batches

    def close(self) -> None:
        """Let go of the worker; cancels the request there if it is still running."""
        if self._pool is not None and self._stream is not None:
            self._stream.close()
            self._pool.streams.discard(self._stream)
            self._pool.in_flight -= 1
            self._services.metrics.in_flight(self._pool.name, -1)
        self._stream = self._pool = None

    def _arrived(self, batches: list[TokenBatch], timing: Timing | None) -> None:
        now = time.monotonic()
        for batch in batches:
            self.emitted += batch.token_ids
        self._last_token_at = now
        self._barren = 0
        for failover in reversed(self.failovers):
            if failover.first_token_at is not None:
                break
            failover.first_token_at = now
            if timing is not None:
                failover.prefill_done_at = self._opened_at + timing.queue_seconds + timing.prefill_seconds

    def _ended_silently(self) -> str | None:
        """The finish reason, if the worker was lost between its last token and saying so."""
        if self.emitted and self.emitted[-1] in self.request.ending_ids:
            return "stop"
        return "length" if len(self.emitted) >= self.prompt.max_tokens else None

    def _lost(self, loss: WorkerLost, view: PoolView | None = None) -> None:
        """Note that a worker is lost, the current one unless another is named."""
        pool = view or self._pool
        assert pool is not None
        pool.suspect_until = time.monotonic() + self._settings.suspect_seconds
        if view is None:
            self._barren += 1
            self.close()
        self.failovers.append(
            Failover(
                choice=self.choice,
                source=pool.name,
                target=None,
                reason=loss.reason,
                emitted_tokens=len(self.emitted),
                last_token_at=self._last_token_at,
                detected_at=time.monotonic(),
            )
        )
        self._services.metrics.failover(loss.reason)
        log.warning(
            "request %s-%d lost pool %s (%s) after %d tokens: %s",
            self.request.id, self.choice, pool.name, loss.reason, len(self.emitted), loss,
        )  # fmt: skip

    async def _connect(self) -> None:
        """Get the rest of the generation admitted by some pool, waiting for one if the stream has begun."""
        if self._barren >= self._settings.losses_without_progress:
            raise stream_lost(f"The request was lost by {self._barren} workers in a row without a new token.")
        deadline = time.monotonic() + self._settings.recovery_seconds
        avoid: set[tuple[str, int]] = set()
        busy: list[float | None] = []
        delay = _FIRST_RETRY_SECONDS
        while True:
            choice = self._services.router.choose(
                self.prompt,
                avoid=avoid,
                resumed=bool(self.pools),
                workers_only=self.request.wants_logprobs,
            )
            if choice.pool is not None:
                avoid.add((choice.pool.name, choice.pool.incarnation))
                try:
                    return await self._open(choice.pool)
                except WorkerBusy as refusal:
                    busy.append(refusal.retry_after)
                except WorkerLost as loss:
                    self._lost(loss, choice.pool)
                continue
            if not self.pools and choice.any_usable and (busy or not self.failovers):
                raise queue_full(max(filter(None, busy), default=self._settings.retry_after_seconds))
            if not self.failovers:
                raise no_pool(self._settings.retry_after_seconds)
            left = deadline - time.monotonic()
            if left <= 0:
                raise stream_lost("No pool is left that could go on with this request.")
            await self._services.views.wait_changed(min(delay, left))
            # Whoever refused may have room by now, and a worker whose connection was cut may be alive.
            avoid.clear()
            delay = min(2 * delay, _LONGEST_RETRY_SECONDS)

    async def _open(self, pool: PoolView) -> None:
        self._attempts += 1
        body = worker_body(
            self.request,
            self.choice,
            self.emitted,
            attempt=self._attempts,
            external_model=(pool.pool.model or self.request.model) if pool.external else None,
        )
        assert pool.pool.url is not None, "a usable pool has an address"
        pool.in_flight += 1
        admitted = False
        try:
            self._opened_at = time.monotonic()
            stream = await self._services.client.open(
                pool.pool.url, body, external=pool.external, api_key=pool.pool.api_key
            )
            admitted = True
        finally:
            if not admitted:
                pool.in_flight -= 1
        self._pool, self._stream = pool, stream
        pool.streams.add(stream)
        self._services.metrics.in_flight(pool.name, 1)
        self.pools.append(pool.name)
        for failover in reversed(self.failovers):
            if failover.target is not None:
                break
            failover.target = pool.name
