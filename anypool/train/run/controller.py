"""The controller of a run: starts its trainer on a pool, watches it, and goes on elsewhere when it is lost.

What a run is lies in its store: the controller keeps nothing that a new one would miss. It takes the lease, names the
pool's trainer its holder, and from then on reads what the trainer says (events) and whether it lives (heartbeats).
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from anypool.store import Holder, Leases, Store, StoreError
from anypool.train.errors import RunFailedError
from anypool.train.report import account, read_run
from anypool.train.run import requests
from anypool.train.run.choice import PoolChoice
from anypool.train.run.file import RunFile, RunPool
from anypool.train.run.launch import FENCED, FINISHED, REFUSED, STOPPED, USER_ERROR, Assignment, TrainerProcess

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05
STORE_POLL_SECONDS = 1.0

Observer = Callable[[dict[str, Any]], None]
"""Called with every event of the trainers, with `at` (`time.monotonic()`) and `epoch`, and with the controller's own:
starting, lost, moving, ended."""


@dataclass(frozen=True)
class Ending:
    """How one trainer ended. how: finished, stopped, moved, lost, refused, error. reason: in words."""

    how: str
    reason: str
    committed: bool


@dataclass
class Ask:
    """What a person asked of the controller while it works; set from signal handlers and other threads.

    stop: 1 commit and end, 2 end now. move_to: a pool.
    """

    stop: int = 0
    move_to: str | None = None


class Controller:
    """One run, from wherever it is to its end.

    observe: is told every event. on_log: is handed every line the trainers log. trace, throttle_seconds: for drills, as
    in `loop.Inputs`.
    """

    def __init__(
        self,
        file: RunFile,
        store: Store,
        observe: Observer = lambda event: None,
        on_log: Callable[[str], None] = log.info,
        trace: bool = False,
        throttle_seconds: float = 0.0,
    ) -> None:
        self.file, self.store, self.asked = file, store, Ask()
        self.leases = Leases(store, ttl_seconds=file.watch.lease_seconds)
        self.trainer: TrainerProcess | None = None
        self._observe, self._on_log = observe, on_log
        self._trace, self._throttle = trace, throttle_seconds
        self._choice = PoolChoice([pool.name for pool in file.pools])

    def run(self, first: str | None = None, fence: bool = False) -> str:
        """Trains until all steps are done or a person stops it; "finished" or "stopped".

        first: the pool to begin on, None for the first that can take it. fence: take the run from a live holder.

        Raises LeaseHeldError if another trainer lives and `fence` is not given, RunFailedError when no pool can go on,
        and StoreError if the store is gone.
        """
        lost_in_a_row, pool_name = 0, first
        while True:
            pool = self.file.pool(pool_name) if pool_name else self._next_pool()
            if pool is None or self.asked.stop:
                return "stopped"
            ending = self._hold(pool, fence)
            fence = True  # from here on the lease was ours
            self._tell("ended", pool=pool.name, how=ending.how, reason=ending.reason)
            pool_name = None
            if ending.how in ("finished", "stopped"):
                return ending.how
            if ending.how == "error":
                raise RunFailedError(f"{pool.name}: {ending.reason}")
            if ending.how == "moved":
                pool_name, self.asked.move_to, lost_in_a_row = self.asked.move_to, None, 0
                continue
            if ending.how == "refused":
                self._choice.refuse(pool.name)
                log.warning("pool %s is refused: %s", pool.name, ending.reason)
                continue
            lost_in_a_row = 1 if ending.committed else lost_in_a_row + 1
            if ending.committed:
                self._choice.committed(pool.name)
            self._choice.failed(pool.name, time.monotonic())
            log.warning("pool %s is lost: %s", pool.name, ending.reason)
            if lost_in_a_row >= self.file.watch.attempts:
                raise RunFailedError(
                    f"run {self.file.name!r}: {lost_in_a_row} trainers in a row were lost without a commit between, "
                    f"the last on {pool.name}: {ending.reason}; what was committed is kept, and the same command goes "
                    "on from it"
                )

    def _next_pool(self) -> RunPool | None:
        """Waits for a pool that is not resting; None if asked to stop meanwhile.

        Raises RunFailedError if none is left.
        """
        chosen = self._choice.next(time.monotonic())
        if chosen is None:
            raise RunFailedError(f"run {self.file.name!r}: every pool was refused; what was committed is kept")
        name, wait = chosen
        end = time.monotonic() + wait
        if wait:
            log.info("every pool rests; %s is tried again in %.0f s", name, wait)
        while time.monotonic() < end and not self.asked.stop:
            time.sleep(POLL_SECONDS)
        return None if self.asked.stop else self.file.pool(name)

    def _hold(self, pool: RunPool, fence: bool) -> Ending:
        """One trainer on one pool, from its lease to its end."""
        holder = Holder(pool=pool.name, host=socket.gethostname(), pid=os.getpid(), id=uuid.uuid4().hex)
        lease = self.leases.take(holder, fence=fence)
        assignment = Assignment(
            store=self.store.url,
            pool=pool.name,
            lease=lease.number,
            holder=asdict(holder),
            since=lease.since,
            usd_before=self._spent(),
            trace=self._trace,
            throttle_seconds=self._throttle,
        )
        self._tell("starting", epoch=lease.number, pool=pool.name)
        trainer = TrainerProcess(assignment, pool, self._on_log)
        self.trainer = trainer
        watch = _Watch(self, trainer, lease.number)
        try:
            return watch.until_it_ends()
        finally:
            trainer.close()
            self.trainer = None

    def _spent(self) -> float | None:
        """Dollars of all epochs so far; None if some price is not known."""
        cost = account(read_run(self.store, metrics=False)).cost()
        return cost.usd if cost.complete else None

    def _tell(self, event: str, **facts: Any) -> None:
        self._observe({"event": event, "at": time.monotonic(), **facts})


class _Watch:
    """One trainer, watched."""

    def __init__(self, controller: Controller, trainer: TrainerProcess, epoch: int) -> None:
        self.controller, self.trainer, self.epoch = controller, trainer, epoch
        self.file, self.asked = controller.file, controller.asked
        self.committed = False
        self.stopping: str | None = None  # "stopped" or "moved", once it was asked
        self.said: dict[str, Any] | None = None  # its own word on why it ends
        self._silent = 0.0  # seconds from the last heartbeat to the last look at it; a store out of reach tells nothing
        self._stepped = time.monotonic()
        self._steps = 0
        self._next_look = 0.0

    def until_it_ends(self) -> Ending:
        while True:
            code = self.trainer.poll()
            if code is None:
                self._read_events(POLL_SECONDS)
            else:
                self.trainer.close()
            self._drain_events()
            if code is not None:
                return self._ended(code)
            if self.asked.stop >= 2:
                self.trainer.kill()
                return Ending("stopped", "stopped at once; what was not committed is lost", self.committed)
            self._pass_on_requests()
            silent = self._too_silent()
            if silent is not None:
                self.controller._tell("lost", epoch=self.epoch, reason=silent)
                self.trainer.kill()
                self._drain_events()
                return Ending("lost", silent, self.committed)

    def _ended(self, code: int) -> Ending:
        said = (self.said or {}).get("reason", "")
        if code == FINISHED:
            return Ending("finished", "all steps are done", self.committed)
        if code == STOPPED:
            if self.stopping is None and (self.said or {}).get("how") == "guard":
                return Ending("error", said, self.committed)
            return Ending(self.stopping or "stopped", said, self.committed)
        if code == USER_ERROR:
            return Ending("error", said or self.trainer.last_line(), self.committed)
        if code == REFUSED:
            return Ending("refused", said, self.committed)
        if code == FENCED:
            return Ending("error", f"{said}; what was committed is kept", self.committed)
        how = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}: {self.trainer.last_line()}"
        self.controller._tell("lost", epoch=self.epoch, reason=how)
        return Ending("lost", how, self.committed)

    def _pass_on_requests(self) -> None:
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + STORE_POLL_SECONDS
            self._look_into_the_store()
        if self.stopping is not None:
            return
        if self.asked.stop or self.asked.move_to is not None:
            self.stopping = "stopped" if self.asked.stop else "moved"
            self.controller._tell("moving" if self.stopping == "moved" else "stopping", epoch=self.epoch)
            self.trainer.stop()

    def _look_into_the_store(self) -> None:
        """Heartbeats, and what people asked from elsewhere. A store that is gone for a while is the trainer's worry."""
        try:
            beat = self.controller.leases.heartbeat(self.epoch)
            request = requests.take(self.controller.store, [pool.name for pool in self.file.pools])
        except StoreError as error:
            log.warning("%s", error)
            return
        if beat is not None:
            self._silent = time.time() - beat.at
        if request is not None and self.asked.move_to is None:
            self.asked.move_to = request

    def _too_silent(self) -> str | None:
        """Why the trainer counts as lost though its process lives."""
        if self._silent > self.file.watch.lease_seconds:
            return f"no heartbeat for {self._silent:.0f} s (watch.lease_seconds {self.file.watch.lease_seconds:g})"
        waited = time.monotonic() - self._stepped
        limit, name = (
            (self.file.watch.hang_seconds, "hang_seconds")
            if self._steps
            else (self.file.watch.start_seconds, "start_seconds")
        )
        if waited > limit:
            return f"no step for {waited:.0f} s (watch.{name} {limit:g})"
        return None

    def _read_events(self, seconds: float) -> None:
        try:
            self._note(self.trainer.events.get(timeout=seconds))
        except queue.Empty:
            return

    def _drain_events(self) -> None:
        while True:
            try:
                self._note(self.trainer.events.get_nowait())
            except queue.Empty:
                return

    def _note(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind in ("step", "committed", "busy"):
            # `busy`: it evaluates or waits for its store; not hanging.
            self._stepped = time.monotonic()
            self._steps += kind == "step"
        if kind == "committed":
            self.committed = True
        if kind in ("ending", "refused", "error"):
            self.said = event
        self.controller._observe({**event, "epoch": self.epoch, "received": time.monotonic()})
