"""The `local` launcher: one pool is one worker process on this machine, kept alive here.

A life of a worker: `starting` while it loads and warms up, `ready`, and then one of three ends. It dies or
stalls: `down`, and another one is started after a pause that doubles with every failure. It says that it was
told something wrong (exit code 2): `failed`, because the next one would be told the same. It is drained:
`down` for good.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from anypool.pools.fleet import Fleet, PoolSpec, jax_platform
from anypool.pools.health import Patience, ask, pause
from anypool.pools.process import WorkerProcess
from anypool.pools.state import PoolState, Progress

log = logging.getLogger("anypool.pools")

USER_ERROR = 2
# Parts of the heartbeat limit. A stall must be seen within the limit, and never on the word of one lost
# probe: pause + probe + pause + probe = 1.
_PROBE, _PAUSE, _PATIENCE = 0.4, 0.1, 0.8


@dataclass(frozen=True)
class Backoff:
    """The pause before a worker is started again: doubling, and short again after a healthy stretch."""

    first_seconds: float = 0.25
    limit_seconds: float = 30.0
    reset_seconds: float = 5.0

    def seconds(self, failures: int) -> float:
        """The pause after the `failures`-th failure in a row, from 1."""
        return float(min(self.first_seconds * 2 ** min(failures - 1, 30), self.limit_seconds))


DEFAULT_BACKOFF = Backoff()


def worker_command(fleet: Fleet, spec: PoolSpec) -> list[str]:
    """The command line of a pool's worker."""
    return [
        *(sys.executable, "-m", "anypool", "worker", "--supervised"),
        *("--model", fleet.model.id, "--dtype", fleet.model.dtype, "--name", spec.name),
        *("--host", "127.0.0.1", "--port", "0"),
        *spec.engine.flags(),
    ]


def worker_environment(spec: PoolSpec) -> dict[str, str]:
    """This process's environment, with JAX told which platform the pool's chip is."""
    environment = dict(os.environ)
    if platform := jax_platform(spec.chip):
        environment["JAX_PLATFORMS"] = platform
    return environment


class LocalPool:
    """Keeps one worker running until told to stop. `state` is what others see of it."""

    def __init__(
        self,
        state: PoolState,
        command: Sequence[str],
        environment: dict[str, str],
        *,
        session: aiohttp.ClientSession,
        heartbeat_limit_seconds: float,
        backoff: Backoff,
        on_log: Callable[[str], None],
    ) -> None:
        self.state = state
        self._command, self._environment = command, environment
        self._session = session
        self._limit_seconds = heartbeat_limit_seconds
        self._backoff = backoff
        self._on_log = on_log
        self._stopping = asyncio.Event()
        self._worker: WorkerProcess | None = None
        self._ready_at: float | None = None
        self._error: str | None = None

    async def run(self) -> None:
        """Starts the worker, again and again, until `stop`, `kill` or a user's mistake."""
        failures = 0
        while not self._stopping.is_set():
            code = await self._one_life()
            if self._stopping.is_set():
                break
            if code == USER_ERROR:
                self.state.update(state="failed")
                log.error("failed pool=%s error=%r", self.state.name, self.state.last_error)
                return
            healthy = time.monotonic() - self._ready_at if self._ready_at is not None else 0.0
            failures = 1 if healthy >= self._backoff.reset_seconds else failures + 1
            seconds = self._backoff.seconds(failures)
            log.warning("down pool=%s error=%r restart_in_seconds=%g", self.state.name, self.state.last_error, seconds)
            if await pause(seconds, self._stopping):
                break
            self.state.update(restarts=self.state.restarts + 1)

    async def stop(self, grace_seconds: float) -> None:
        """Drains the worker: it takes nothing new and finishes its streams, for at most `grace_seconds`."""
        self._stopping.set()
        worker = self._worker
        if worker is not None and worker.alive:
            self.state.update(state="draining")
            log.info("draining pool=%s pid=%s", self.state.name, worker.pid)
            await worker.stop(grace_seconds)

    def kill(self) -> None:
        """Ends the worker now, and for good."""
        self._stopping.set()
        if self._worker is not None:
            self._worker.kill()

    async def _one_life(self) -> int:
        """From start to end of one worker; its exit code, or minus the signal that ended it."""
        self._ready_at, self._error = None, None
        self.state.update(state="starting", url=None, pid=None, progress=None)
        try:
            worker = WorkerProcess.start(
                self._command, environment=self._environment, on_event=self._on_event, on_log=self._on_log
            )
        except OSError as error:
            self.state.update(last_error=f"{self._command[0]} cannot be started: {error.strerror or error}")
            return USER_ERROR
        self._worker = worker
        self.state.update(pid=worker.pid)
        if self._stopping.is_set():
            # Told to stop while the process was being started, when there was none yet to tell.
            worker.kill()
        heart = asyncio.create_task(self._watch_heart(worker))
        try:
            await worker.gone.wait()
            # Told before anything else is done: streams of this worker move now.
            self._gone()
            code = await self._reap(worker)
        finally:
            heart.cancel()
            worker.kill()
        self.state.update(pid=None, last_error=self._why(worker, code))
        return code

    def _gone(self) -> None:
        self.state.update(state="down", url=None, progress=None)

    async def _reap(self, worker: WorkerProcess) -> int:
        """The exit code of a worker that closed its output. One that lives on without a voice is killed."""
        try:
            return await asyncio.wait_for(asyncio.shield(worker.ended()), 1.0)
        except TimeoutError:
            worker.kill()
            return await worker.ended()

    def _why(self, worker: WorkerProcess, code: int) -> str | None:
        """What to say of a worker that ended: its own word, ours, or the last line it wrote."""
        if self._error is not None or (self._stopping.is_set() and code == 0):
            return self._error
        ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        last = worker.last_line()
        return f"the worker {ended}{f': {last}' if last and code > 0 else ''}"

    def _on_event(self, event: dict[str, Any]) -> None:
        """One line of the worker's standard output."""
        match event:
            case {"event": "listening", "port": int(port)}:
                self.state.update(url=f"http://127.0.0.1:{port}")
            case {"event": "progress", "phase": str(phase), "done": int(done), "total": int(total)}:
                self.state.update(progress=Progress(phase, done, total, str(event.get("detail", ""))))
            case {"event": "ready"} if self.state.state == "starting" and self.state.url is not None:
                self._ready_at = time.monotonic()
                self.state.update(state="ready", progress=None)
                log.info("ready pool=%s pid=%s url=%s", self.state.name, self.state.pid, self.state.url)
            case {"event": "error", "message": str(message)}:
                self._error = message
            case _:
                log.warning("unexpected event pool=%s event=%r", self.state.name, event)

    async def _watch_heart(self, worker: WorkerProcess) -> None:
        """Kills a worker that is alive but gives no sign of life for the heartbeat limit."""
        limit = self._limit_seconds
        patience = Patience(_PATIENCE * limit)
        while not await pause(_PAUSE * limit, self._stopping):
            if self.state.state != "ready" or self.state.url is None:
                continue
            started = patience.started()
            answer = await ask(self._session, f"{self.state.url}/health", seconds=_PROBE * limit)
            age = (answer.body or {}).get("heartbeat_age_seconds", 0.0)
            stuck = isinstance(age, int | float) and age > limit * (1 - _PAUSE)
            if stuck or patience.is_over(started, ok=answer.body is not None):
                detail = f"its engine did nothing for {age:.1f} s" if stuck else answer.error or "no health"
                self._error = f"the worker stalled: {detail}"
                self._gone()
                worker.kill()
                return
