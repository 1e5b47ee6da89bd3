"""The loop of a trainer: rows in, updates made, evaluated and committed, until the last step or until told to stop.

The loop owns no process matters (signals, heartbeats, exit codes): those are trainer.py's.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from anypool.store import LeaseLostError, StoreError
from anypool.train.batch import Batch, place_batch, rows_here
from anypool.train.checkpoint import CheckpointInfo, Checkpoints, Pending
from anypool.train.data import Mixture, Reader
from anypool.train.report import Recorder
from anypool.train.run import gate
from anypool.train.run.file import RunFile, RunPool
from anypool.train.run.probe import Probe
from anypool.train.run.spikes import Spikes
from anypool.train.run.texts import HeldOut
from anypool.train.step import Metrics, TrainState, TrainStep

log = logging.getLogger(__name__)


class GateRefusedError(RuntimeError):
    """The pool computes something else than was recorded. `comparison` has both."""

    def __init__(self, comparison: gate.Comparison) -> None:
        super().__init__(str(comparison))
        self.comparison = comparison


class GuardStoppedError(RuntimeError):
    """A loss or a gradient that the run file says to stop at."""


@dataclass
class Inputs:
    """What a loop works on.

    say: tells an event to whoever started the trainer. wanted: 0 go on, 1 commit and stop. trace: says the samples of
    every step. throttle_seconds: a pause after every step.
    """

    file: RunFile
    pool: RunPool
    epoch: int
    step: TrainStep
    saver: Checkpoints
    probe: Probe
    recorder: Recorder
    training: Mixture
    held_out: HeldOut | None
    say: Callable[..., None]
    wanted: Callable[[], int]
    trace: bool = False
    throttle_seconds: float = 0.0


@dataclass(frozen=True)
class _Sent:
    """A step that was sent to the devices and whose metrics are not read yet. number: steps done with it."""

    number: int
    metrics: Metrics
    began: float
    ids: tuple[Any, ...]


class Loop:
    """One epoch of a run. `run` ends when all steps are done, or when it is told to stop; then all is committed."""

    def __init__(self, inputs: Inputs, state: TrainState, base: CheckpointInfo | None) -> None:
        self.inputs = inputs
        self.file, self.step, self.recorder = inputs.file, inputs.step, inputs.recorder
        self.state = state
        known = base.known if base is not None else {}
        self.spikes = Spikes(self.file.guard.spike_factor, known.get("norms", ()))
        self.recorded = gate.Recorded.from_json(known["gate"]) if known.get("gate") else None
        self.done = base.step if base is not None else 0
        self.saved = self.done
        self.micro_batches = self.file.micro_batches_on(inputs.pool)
        self.part = rows_here(self.step.mesh, self.file.rows, self.micro_batches)
        self.skipped_in_a_row = 0
        self._sent: _Sent | None = None
        self._read_at = 0.0
        self._pending: Pending | None = None
        self._executable: Any = None

    def run(self) -> str:
        """Trains; says "finished" or "stopped".

        Raises GateRefusedError, GuardStoppedError, and what the store raises at the end.
        """
        file = self.file
        if self.done >= file.steps:
            return "finished"
        with self.recorder.phase("compile"):
            self._compile()
        with self.recorder.phase("compute"), self._reader() as rows:
            if not self.done:
                self._evaluate_held_out()  # what training is to improve on
            while self.done < file.steps:
                self._one(rows)
                self.note_commits()
                stop, finished = bool(self._agreed_stop()), self.done == file.steps
                evaluate = finished or _due(self.done, file.evaluate.every_steps)
                commit = stop or finished or _due(self.done, file.checkpoint.every_steps)
                if evaluate or commit:
                    self._read_metrics()
                if evaluate:
                    self._evaluate_held_out()
                if commit and self.done > self.saved:
                    self.commit(last=stop or finished)
                if stop:
                    return "finished" if finished else "stopped"
        return "finished"

    def _one(self, rows: Reader) -> None:
        """Sends one step, and reads what the one before it gave."""
        began = time.perf_counter()
        with self.recorder.phase("data"):
            number, part = next(rows)
            assert number == self.done, "the reader gives steps in order"
            batch = self._place(part)
        limit = self.spikes.limit(self.done)
        self.state, metrics = self._call(self.state, batch, limit)
        self.done += 1
        sent = _Sent(self.done, metrics, began, part.ids)
        self._read_metrics()
        self._sent = sent
        if self.recorded is not None or self.done == 1:
            self._read_metrics()  # the gate answers before anything else is done
        if self.inputs.throttle_seconds:
            time.sleep(self.inputs.throttle_seconds)

    def _read_metrics(self) -> None:
        """Waits for the step that was sent last, and notes what it gave."""
        if self._sent is None:
            return
        sent, self._sent = self._sent, None
        found = {name: float(value) for name, value in vars(sent.metrics).items()}
        # Two steps may be under way at once: each has the time since the one before was done.
        now = time.perf_counter()
        seconds, self._read_at = now - max(sent.began, self._read_at), now
        skipped = found.pop("skipped") > 0
        learned = found.pop("tokens")
        self._check_gate(sent.number, found["loss"], found["gradient_norm"])
        self.inputs.probe.answer(sent.number, self._record(sent.number, found["loss"], found["gradient_norm"]))
        self.spikes.saw(sent.number - 1, found["gradient_norm"], skipped)
        tokens = self.file.rows * self.file.data.sequence_length
        self.recorder.step(
            sent.number, {**found, "learned_tokens": learned, "skipped": float(skipped)}, tokens, seconds
        )
        ids = {"ids": [list(one) for one in sent.ids]} if self.inputs.trace else {}
        self.inputs.say("step", **self.recorder.known(), **ids)
        self._guard(sent.number, found, skipped)

    def _guard(self, number: int, found: dict[str, float], skipped: bool) -> None:
        """Reports a step that made no update, and stops where the run file says so."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if not skipped:
            return
        finite = math.isfinite(found["loss"]) and math.isfinite(found["gradient_norm"])
        what, policy = ("spike", self.file.guard.spike) if finite else ("not finite", self.file.guard.nonfinite)
        facts = {"step": number, "loss": found["loss"], "gradient_norm": found["gradient_norm"]}
        self.recorder.event("skipped", why=what, **{k: v if math.isfinite(v) else None for k, v in facts.items()})
        text = f"step {number}: loss {found['loss']:.5g}, gradient norm {found['gradient_norm']:.5g} ({what})"
        log.warning("%s: no update was made", text)
        if policy == "stop":
            setting = "spike" if finite else "nonfinite"
            raise GuardStoppedError(f'{text}; guard.{setting} = "stop". It changed no parameter')
        if self.skipped_in_a_row >= self.file.guard.most_skipped:
            raise GuardStoppedError(f"{text}: {self.skipped_in_a_row} steps in a row (guard.most_skipped)")

    def _check_gate(self, number: int, loss: float, gradient_norm: float) -> None:
        """Compares the first step after a takeover with what was recorded of it."""
        if self.recorded is None:
            return
        recorded, self.recorded = self.recorded, None
        allowed = self.file.gate
        comparison = gate.compare(
            recorded, self._record(number, loss, gradient_norm), allowed.loss, allowed.gradient_norm
        )
        self.recorder.event("gate passed" if comparison.passed else "refused", **comparison.facts())
        if not comparison.passed:
            raise GateRefusedError(comparison)
        log.info("gate passed: %s", comparison)
        self.inputs.say("gate", **comparison.as_json())

    def _record(self, number: int, loss: float, gradient_norm: float) -> gate.Recorded:
        pool = self.inputs.pool
        return gate.Recorded(
            number, loss, gradient_norm, pool.target.chip.name, str(pool.mesh), self.file.compute_dtype
        )

    def commit(self, last: bool) -> None:
        """Saves the state as it is. The last one is waited for; its batch is computed once more for the gate.

        Raises StoreError if the last one fails, LeaseLostError if the run is another's by now.
        """
        number = self.done
        known = {"seed": self.file.seed, "steps": self.file.steps, "norms": self.spikes.history}
        for attempt in (1, 2):
            try:
                with self.recorder.phase("checkpoint"):
                    self.inputs.saver.wait()  # of the save before; what went wrong with it is raised here
                    self.note_commits()
                    self.inputs.probe.expect(number)
                    self._pending = self.inputs.saver.save(
                        self.state, self.step.config.specs, step=number, epoch=self.inputs.epoch, known=known
                    )
                break
            except LeaseLostError:
                raise
            except StoreError as error:
                # What came before is kept, and this state is tried after it; then the next interval, if there is one.
                self._commit_failed(error)
                if attempt == 2:
                    if last:
                        raise
                    return
        self.saved = number
        self.inputs.say("saving", step=number)
        if last:
            with self.recorder.phase("gate"):
                self._probe_once_more(number)
            with self.recorder.phase("checkpoint"):
                self.inputs.saver.wait()
            self.note_commits()

    def note_commits(self) -> None:
        """Tells of a save that was committed since the last look."""
        if self._pending is None or not self._pending.done:
            return
        pending, self._pending = self._pending, None
        try:
            sent = pending.wait()
        except StoreError:
            return  # the saver raises it again where it can be dealt with
        self.recorder.event("commit", step=pending.step, folder=pending.folder, bytes=sent)
        self.inputs.say("committed", step=pending.step, folder=pending.folder, stall_seconds=pending.stall_seconds)

    def _probe_once_more(self, number: int) -> None:
        """The step that would follow, whose result nobody keeps: the next trainer's gate wants to know it."""
        rows = self.inputs.training.rows_at(number, part=self.part)
        _, metrics = self._call(self.state, self._place(rows), math.inf)
        loss, norm = float(metrics.loss), float(metrics.gradient_norm)
        self.inputs.probe.answer(number + 1, self._record(number + 1, loss, norm))

    def _commit_failed(self, error: StoreError) -> None:
        log.error("a checkpoint is not committed: %s; the last commit stays, and training goes on", error)
        self.recorder.event("commit failed", reason=str(error))
        self.inputs.say("commit_failed", step=self.done, reason=str(error))

    def _evaluate_held_out(self) -> None:
        if self.inputs.held_out is None:
            return
        with self.recorder.phase("evaluate"):
            loss, tokens = self._evaluate(self.inputs.held_out)
        if tokens:
            self.recorder.evaluation(self.done, {"eval_loss": loss, "eval_tokens": tokens})
            self.inputs.say("evaluated", step=self.done, eval_loss=loss)

    def _evaluate(self, held_out: HeldOut) -> tuple[float, float]:
        """(mean loss in nats, tokens) of the first batches of the held-out rows, the same ones every time."""
        entropy = tokens = 0.0
        for rows in held_out(self.part):
            self.inputs.say("busy")
            sums = self.step.evaluate(self.state, self._place(rows))
            entropy, tokens = entropy + float(sums[0]), tokens + float(sums[1])
        return (entropy / tokens if tokens else math.nan), tokens

    def _agreed_stop(self) -> int:
        """Whether to stop after this step: what the first process was told, if there are several."""
        wanted = self.inputs.wanted()
        if jax.process_count() == 1:
            return wanted
        from jax.experimental import multihost_utils

        return int(multihost_utils.broadcast_one_to_all(np.int32(wanted)))

    def _place(self, rows: Any) -> Batch:
        part = Batch.from_rows(rows.tokens_RT, rows.segments_RT, rows.learned_RT, self.micro_batches)
        return place_batch(self.step.mesh, part, self.file.rows)

    def _call(self, state: TrainState, batch: Batch, limit: float) -> tuple[TrainState, Metrics]:
        after, metrics = self._executable(*self.step.arguments(state, batch, limit))
        return replace(after, frozen=state.frozen), metrics

    def _compile(self) -> None:
        lowered = self.step.lower(
            self.file.rows // self.micro_batches, self.file.data.sequence_length, self.micro_batches
        )
        self._executable = lowered.compile()

    @contextmanager
    def _reader(self) -> Iterator[Reader]:
        reader = Reader(self.inputs.training, self.done, part=self.part)
        try:
            yield reader
        finally:
            reader.close()


def _due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0
