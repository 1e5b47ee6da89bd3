"""The engine loop: one thread that schedules, runs the device and hands out tokens, step after step.

Other threads add and cancel requests at any time. The scheduler is theirs and the loop's under one lock, which the
loop does not hold while the device works; what a step produced goes out in one call.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from anypool.engine.batch import build
from anypool.engine.blocks import BlockEvents, BlockPool
from anypool.engine.request import FinishReason, Request
from anypool.engine.runner import Limits, Runner
from anypool.engine.scheduler import Scheduler, SchedulerConfig
from anypool.models import ModelConfig
from anypool.ops.sampling import Sampled

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Logprobs:
    """Of one token: its own log-probability, and the likeliest tokens as (id, log-probability), best first."""

    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Update:
    """What one step did to one request."""

    request: Request
    token_ids: list[int]
    logprobs: list[Logprobs] | None
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class StepResult:
    """What one step did: to each request, and to the set of prefix blocks that can be shared."""

    updates: list[Update]
    blocks: BlockEvents


@dataclass
class Counters:
    """Totals since the start. Times in seconds."""

    steps: int = 0
    step_seconds: float = 0.0
    host_seconds: float = 0.0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)


def scheduler_config(config: ModelConfig, limits: Limits, max_waiting: int) -> SchedulerConfig:
    """What the scheduler is held to. Raises ValueError for limits with which it could not always move on."""
    return SchedulerConfig(
        vocab_size=config.vocab_size,
        max_num_seqs=limits.max_num_seqs,
        token_budget=limits.token_budget,
        max_model_len=limits.max_model_len,
        max_waiting=max_waiting,
        eos_token_ids=frozenset(config.eos_token_ids),
    )


class Engine:
    """Serves requests on a runner.

    `deliver` is called on the engine's thread after every step that has news; `died` if the loop ends by an error.
    """

    def __init__(
        self,
        runner: Runner,
        max_waiting: int,
        deliver: Callable[[StepResult], None],
        died: Callable[[BaseException], None],
    ) -> None:
        config = scheduler_config(runner.config, runner.limits, max_waiting)
        self.runner = runner
        self.pool = BlockPool(runner.num_blocks)
        self.scheduler = Scheduler(config, self.pool)
        self.counters = Counters()
        self.beat = time.monotonic()
        """time.monotonic() of the loop's last sign of life: taken before and after every device step."""
        self._deliver = deliver
        self._died = died
        self._news = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the loop after the step it is in. Requests under way get no further update."""
        with self._news:
            self._stopping = True
            self._news.notify()
        if self._thread.is_alive():
            self._thread.join()

    def add(self, request: Request) -> None:
        """Queues a request. Raises RequestError if it can never be served, QueueFullError if it cannot be now."""
        with self._news:
            self.scheduler.add(request)
            self._news.notify()

    def cancel(self, request_id: str) -> None:
        """Ends a request, whatever its state; does nothing if it has already ended. It gets no further update."""
        with self._news:
            self.scheduler.cancel(request_id)
            self._news.notify()

    def matchable(self) -> list[bytes]:
        """Hashes of every prefix block that a request could share now."""
        with self._news:
            return self.pool.matchable()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:  # the server must learn of it, whatever it is
            log.exception("the engine loop died")
            self._died(error)

    def _turn(self) -> bool:
        """One turn of the loop; False when it is to end."""
        self.beat = started = time.monotonic()
        with self._news:
            if self._stopping:
                return False
            step = self.scheduler.schedule()
            if step is None:
                events = self.pool.drain_events()
                if not (events.stored or events.evicted):
                    self._news.wait(timeout=0.1)
                    return True
        if step is None:
            self._deliver(StepResult([], events))
            return True
        batch = build(step.items, self.scheduler.block_table, self.runner.shapes)
        scheduled = time.monotonic()
        drawn = self.runner.run(batch)
        self.beat = computed = time.monotonic()
        rows = {request.id: row for row, request in enumerate(batch.requests)}
        sampled = {request_id: int(drawn.token[row]) for request_id, row in rows.items()}
        with self._news:
            outputs = self.scheduler.finish_step(step, sampled)
            events = self.pool.drain_events()
        updates = [
            Update(
                output.request,
                output.token_ids,
                _logprobs(drawn, rows[output.request.id], output.request),
                output.finish_reason,
            )
            for output in outputs
        ]
        self._count(updates, started, scheduled, computed)
        if updates or events.stored or events.evicted:
            self._deliver(StepResult(updates, events))
        return True

    def _count(self, updates: list[Update], started: float, scheduled: float, computed: float) -> None:
        counters = self.counters
        counters.steps += 1
        counters.step_seconds += computed - scheduled
        counters.host_seconds += scheduled - started
        for update in updates:
            counters.generation_tokens += len(update.token_ids)
            if update.finish_reason is not None:
                counters.finished[update.finish_reason] = counters.finished.get(update.finish_reason, 0) + 1
                counters.prompt_tokens += update.request.num_prompt


def _logprobs(drawn: Sampled, row: int, request: Request) -> list[Logprobs] | None:
    count = request.params.logprobs
    if count is None or drawn.logprob is None or drawn.top_ids is None or drawn.top_logprobs is None:
        return None
    top = zip(drawn.top_ids[row, :count].tolist(), drawn.top_logprobs[row, :count].tolist(), strict=True)
    return [Logprobs(float(drawn.logprob[row]), list(top))]
