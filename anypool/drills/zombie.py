"""A trainer that sleeps through the loss of its lease, and wakes up with a checkpoint half written."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict

from anypool.drills.training import PATIENCE_SECONDS, DrillError, DrillRun
from anypool.store import Holder, Leases
from anypool.train.run.launch import FENCED, Assignment, TrainerProcess


class Sleeper:
    """A trainer of epoch 1, which no controller watches."""

    def __init__(self, run: DrillRun, trainer: TrainerProcess) -> None:
        self._run, self._trainer = run, trainer
        self.last_step = 0

    def sleep_while_saving(self, first: int) -> None:
        """Waits for a save after `first` steps, and stops every thread of the trainer."""
        end = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                event = self._trainer.events.get(timeout=1)
            except queue.Empty:
                if self._trainer.poll() is not None or time.monotonic() > end:
                    raise DrillError(f"the trainer ended before it saved: {self._trainer.last_line()}") from None
                continue
            if event["event"] == "step":
                self.last_step = event["step"]
            if event["event"] == "saving" and event["step"] >= first:
                os.kill(self._trainer.pid, signal.SIGSTOP)
                return

    def wake(self) -> None:
        os.kill(self._trainer.pid, signal.SIGCONT)

    def ended(self) -> str:
        """How it ended, in words. Raises DrillError if it does not end, or not because it was fenced."""
        code = self._trainer.wait(PATIENCE_SECONDS)
        if code != FENCED:
            raise DrillError(f"the fenced trainer ended with {code}, not with {FENCED}: {self._trainer.last_line()}")
        return f"with exit code {FENCED}, fenced"

    def commits(self) -> set[str]:
        """Folders that epoch 1 has committed, whether or not the run counts them."""
        return {
            entry.key.rpartition("/")[0]
            for entry in self._run.store.list("checkpoints/")
            if entry.key.endswith("-e1/manifest.json")
        }


@contextlib.contextmanager
def stopped_while_saving(run: DrillRun, pool: str, first: int) -> Iterator[Sleeper]:
    """A trainer on `pool` with the run's first lease, stopped (SIGSTOP) while it saves at or after step `first`."""
    holder = Holder(pool=pool, host=socket.gethostname(), pid=os.getpid(), id=uuid.uuid4().hex)
    lease = Leases(run.store, ttl_seconds=run.file.watch.lease_seconds).take(holder)
    told = Assignment(
        store=run.store.url,
        pool=pool,
        lease=lease.number,
        holder=asdict(holder),
        since=lease.since,
        throttle_seconds=run.throttle,
    )
    trainer = TrainerProcess(told, run.file.pool(pool), run.logged.append)
    try:
        sleeper = Sleeper(run, trainer)
        sleeper.sleep_while_saving(first)
        yield sleeper
    finally:
        trainer.kill()
