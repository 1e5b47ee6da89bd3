"""The recorder of a trainer process: where its time goes, one line a step, and what happened."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

from anypool.store import Store
from anypool.train.errors import TrainError
from anypool.train.report.clock import Clock, process_started_ns, steady_clock
from anypool.train.report.journal import Journal
from anypool.train.report.lines import (
    PHASES,
    Ended,
    Event,
    MetricsLine,
    Opened,
    Phase,
    PoolFacts,
    RunFacts,
    Time,
    encode_ledger,
    encode_metrics,
    numbers,
)
from anypool.train.report.rates import utilisation
from anypool.train.report.sinks import Sink

log = logging.getLogger(__name__)

_STEPS_FOR_RATES = 20
"""Speed and time left are means over so many steps: few enough to follow a change, enough to be steady."""


@dataclass(frozen=True)
class Closed:
    """What became of the record. lines_unwritten: lines that are in no store; error: why, None where there are none."""

    lines_unwritten: int
    error: str | None


class Recorder:
    """Keeps the time of one trainer process as phases without gaps, and one line a step.

    Lines go to `metrics/e%06d/` and `ledger/e%06d/` in the run's store. A thread writes them every `write_seconds`, and
    soon after a commit; `flush` writes them at once. A store that fails stops nothing: lines are kept and tried again.

    Time belongs to the innermost phase that is open. Where none is, it is "start-up" until the first "compute" begins,
    and "idle" after that; so a trainer opens "compute" around its whole loop, and the others inside it:

        with recorder.phase("compute"):
            for step in ...:
                with recorder.phase("data"):
                    rows = next(batches)
                ...
                recorder.step(step, {"loss": loss}, tokens=tokens, seconds=seconds)

    Phases are opened and closed by one thread; everything else may be called from any.
    """

    def __init__(
        self,
        store: Store,
        epoch: int,
        pool: PoolFacts,
        sinks: Sequence[Sink] = (),
        clock: Clock | None = None,
        *,
        run: RunFacts | None = None,
        started_ns: int | None = None,
        writes: bool = True,
        write_seconds: float = 5.0,
    ) -> None:
        """Begins to record. started_ns: when the process began; without one, the operating system is asked.

        writes: False in all but the first process of a trainer of many: it keeps the same interface and writes nothing.
        """
        if epoch < 0:
            raise TrainError(f"epoch = {epoch}: must be 0 or more, the number of the lease that holds the run")
        if write_seconds <= 0:
            raise TrainError(f"write_seconds = {write_seconds}: must be more than 0")
        self.epoch, self.pool, self.run, self.writes = epoch, pool, run or RunFacts(), writes
        self._clock = clock or steady_clock()
        now = self._clock()
        self._started_ns = min(now, process_started_ns(now) if started_ns is None else started_ns)
        self._ledger = Journal(store, f"ledger/e{epoch:06d}")
        self._metrics = Journal(store, f"metrics/e{epoch:06d}")
        self._sinks = list(sinks) if writes else []

        self._lock = threading.Lock()
        self._outermost: Phase = "start-up"
        self._phases: list[Phase] = []
        self._spans: list[tuple[Phase, int]] = []
        self._stretch_ns = self._span_ns = self._started_ns
        self._recent: deque[tuple[int, int, float]] = deque(maxlen=_STEPS_FOR_RATES + 1)
        self._known: dict[str, Any] = {
            "total_steps": self.run.total_steps,
            "pool": pool.name,
            "epoch": epoch,
            "skipped": 0,
        }
        self._closed: Closed | None = None
        self._last_error: str | None = None
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        if writes:
            self._ledger.append(encode_ledger(Opened(epoch, pool, self.run, self._started_ns, now)))
            # Written right away: a trainer that dies while it starts has left its pool and its price.
            self._wake.set()
            self._thread = threading.Thread(
                target=self._write_now_and_then, args=(write_seconds,), name="recorder", daemon=True
            )
            self._thread.start()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The time until the block ends, less that of phases inside it. Raises TrainError for a name not in PHASES."""
        for known in get_args(Phase):
            if name == known:
                break
        else:
            raise TrainError(f"phase {name!r}: must be one of {', '.join(PHASES)}")
        with self._lock:
            self._end_span()
            self._phases.append(known)
            if known == "compute":
                self._outermost = "idle"
        try:
            yield
        finally:
            with self._lock:
                self._end_span()
                self._phases.pop()

    def step(self, step: int, metrics: Mapping[str, Any], tokens: int, seconds: float) -> None:
        """One line for an update that was made. The ledger's time since the step before belongs to it.

        metrics: any scalars; `loss`, `learning_rate` and `gradient_norm` are also shown by the heartbeat.
        tokens: that the step computed, padding included, for it costs the same. seconds: from its start to its end.
        `tokens_per_second` and, where the chip's peak is known, `mfu` are added.
        """
        values, tokens, seconds = numbers(metrics), int(tokens), float(seconds)
        if tokens < 0 or not seconds >= 0:
            raise TrainError(f"step {step}: tokens = {tokens}, seconds = {seconds}: neither can be below 0")
        if seconds > 0:
            values.setdefault("tokens_per_second", tokens / seconds)
        mfu = utilisation(self.run.flops_per_token, tokens, seconds, self.pool, self.run.compute_dtype)
        if mfu is not None:
            values.setdefault("mfu", mfu)
        with self._lock:
            now = self._end_span()
            line = MetricsLine("step", self.epoch, int(step), now / 1e9, values, tokens, seconds)
            if self.writes:
                self._metrics.append(encode_metrics(line))
            self._end_stretch(int(step), tokens)
            self._recent.append((now, tokens, seconds))
            self._known |= {"step": int(step)} | {name: values[name] for name in _SHOWN if name in values}
            self._known["tokens"] = self._known.get("tokens", 0) + tokens
        self._tell_sinks("train", line)

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """What an evaluation after `step` found; `eval_loss` is shown by the heartbeat and drawn in plots."""
        values = numbers(metrics)
        with self._lock:
            line = MetricsLine("evaluation", self.epoch, int(step), self._clock() / 1e9, values)
            if self.writes:
                self._metrics.append(encode_metrics(line))
            if "eval_loss" in values:
                self._known["eval_loss"] = values["eval_loss"]
        self._tell_sinks("evaluation", line)

    def event(self, kind: str, /, **facts: Any) -> None:
        """Something that happened. "commit" (with `step`) and "skipped" also move what the heartbeat shows.

        A commit is written soon after, by the thread: which of the time before it counts depends on it.
        """
        with self._lock:
            if kind == "skipped":
                self._known["skipped"] += 1
            if kind == "commit" and facts.get("step") is not None:
                self._known["last_commit_step"] = int(facts["step"])
            if self.writes:
                self._ledger.append(encode_ledger(Event(kind, self._clock(), facts)))
        if kind == "commit":
            self._wake.set()

    def known(self) -> dict[str, Any]:
        """What a heartbeat tells: the fields that `Progress.update` shows. Fields that are not known yet are left out.

        `usd` is of all epochs up to now, and left out where a price is not known; `tokens` are of this epoch.
        """
        with self._lock:
            now = self._clock()
            known = dict(self._known) | {"phase": self._phases[-1] if self._phases else self._outermost}
            recent = list(self._recent)
        rate = self.pool.usd_per_second
        if rate is not None and self.run.usd_before is not None:
            known["usd"] = self.run.usd_before + rate * (now - self._started_ns) / 1e9
        if len(recent) > 1 and self.run.total_steps is not None:
            # From the end of one step to the end of another, so that waiting for data and commits count.
            seconds_a_step = (recent[-1][0] - recent[0][0]) / 1e9 / (len(recent) - 1)
            known["seconds_left"] = max(0, self.run.total_steps - known["step"]) * seconds_a_step
        if (seconds := sum(seconds for _, _, seconds in recent)) > 0:
            tokens = sum(tokens for _, tokens, _ in recent)
            known["tokens_per_second"] = tokens / seconds
            mfu = utilisation(self.run.flops_per_token, tokens, seconds, self.pool, self.run.compute_dtype)
            known |= {} if mfu is None else {"mfu": mfu}
        return {name: value for name, value in known.items() if value is not None}

    def flush(self) -> bool:
        """Writes everything now, with the time of the open phase so far. False if the store failed; never raises."""
        if not self.writes:
            return True
        with self._lock:
            self._end_span()
            self._end_stretch()
        try:
            self._ledger.write()
            self._metrics.write()
        except Exception as error:  # Whatever it is, training goes on; the lines are kept.
            if self._last_error is None:
                log.warning("record not written, will be tried again: %s", error)
            self._last_error = str(error) or type(error).__name__
            return False
        if self._last_error is not None:
            log.info("record written again, nothing was lost")
        self._last_error = None
        return True

    def close(self, reason: str, *, tries: int = 5, seconds_between: float = 1.0) -> Closed:
        """Writes that the trainer stopped on purpose and why, and all that is left. Says what could not be written.

        Nothing may be recorded afterwards. Closing again gives the first answer.
        """
        if self._closed is not None:
            return self._closed
        self._stopping.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            now = self._end_span()
            self._end_stretch()
            if self.writes:
                self._ledger.append(encode_ledger(Ended(now, reason)))
        for attempt in range(1, tries + 1):
            if self.flush() or attempt == tries:
                break
            threading.Event().wait(seconds_between)
        left = self._ledger.unwritten + self._metrics.unwritten if self.writes else 0
        self._closed = Closed(left, self._last_error if left else None)
        if left:
            log.error("%d lines of the record were not written: %s", left, self._last_error)
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:
                log.warning("%s did not close: %s", type(sink).__name__, error)
        return self._closed

    def _end_span(self) -> int:
        """The present time, up to which all time now belongs to some phase. The lock is held."""
        now = self._clock()
        phase: Phase = self._phases[-1] if self._phases else self._outermost
        if now > self._span_ns:
            if self._spans and self._spans[-1][0] == phase:
                self._spans[-1] = (phase, self._spans[-1][1] + now - self._span_ns)
            else:
                self._spans.append((phase, now - self._span_ns))
            self._span_ns = now
        return self._span_ns

    def _end_stretch(self, step: int | None = None, tokens: int = 0) -> None:
        """A line for all spans since the last one. The lock is held."""
        if self.writes and (self._spans or step is not None):
            self._ledger.append(encode_ledger(Time(self._stretch_ns, self._spans, step, tokens)))
        self._spans, self._stretch_ns = [], self._span_ns

    def _write_now_and_then(self, seconds: float) -> None:
        while not self._stopping.is_set():
            self._wake.wait(seconds)
            self._wake.clear()
            if not self._stopping.is_set():
                self.flush()

    def _tell_sinks(self, group: str, line: MetricsLine) -> None:
        for sink in list(self._sinks):
            try:
                sink.write(group, line.step, line.at, line.metrics)
            except Exception as error:  # A display must not stop training.
                log.warning("%s failed and is left out from here on: %s", type(sink).__name__, error)
                self._sinks.remove(sink)


_SHOWN = ("loss", "learning_rate", "gradient_norm", "mfu", "tokens_per_second")
