"""All pools of a fleet: started together, watched, and stopped together."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Self

import aiohttp

from anypool.pools.external import ExternalPool
from anypool.pools.fleet import Fleet, PoolSpec, api_key
from anypool.pools.local import DEFAULT_BACKOFF, Backoff, LocalPool, worker_command, worker_environment
from anypool.pools.state import PoolState


def write_log(pool: str, line: str) -> None:
    """A worker's log line, on our standard error, with the pool it is from."""
    sys.stderr.write(f"[{pool}] {line}\n")


class PoolManager:
    """Holds a fleet's pools. `pools` says how each is; `subscribe` tells of every change at once.

    command: gives a pool's worker command line; another one is for tests.
    Raises FleetError if an external pool's key is not in the environment.
    """

    def __init__(
        self,
        fleet: Fleet,
        *,
        backoff: Backoff = DEFAULT_BACKOFF,
        command: Callable[[Fleet, PoolSpec], list[str]] = worker_command,
        on_log: Callable[[str, str], None] = write_log,
    ) -> None:
        self.fleet = fleet
        self.pools: dict[str, PoolState] = {spec.name: _state(spec) for spec in fleet.serving_pools}
        self._backoff, self._command, self._on_log = backoff, command, on_log
        self._watchers: dict[str, LocalPool | ExternalPool] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Starts every pool and returns at once; `wait_until` waits for what the caller needs of them."""
        assert self._session is None, "a manager is started once"
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True))
        for spec in self.fleet.serving_pools:
            watcher = self._watcher(spec, self._session)
            self._watchers[spec.name] = watcher
            self._tasks[spec.name] = asyncio.create_task(watcher.run(), name=f"pool {spec.name}")

    async def stop(self, grace_seconds: float = 30.0) -> None:
        """Drains every worker for at most `grace_seconds`, then ends it. None is left even if this raises."""
        try:
            await asyncio.gather(*(self._drain(name, grace_seconds) for name in self._watchers))
        finally:
            self.kill()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*self._tasks.values(), return_exceptions=True)
            if self._session is not None:
                await self._session.close()

    def kill(self) -> None:
        """Ends every worker now, and starts none again."""
        for watcher in self._watchers.values():
            watcher.kill()

    async def drain(self, name: str, grace_seconds: float = 30.0) -> None:
        """Takes one pool out of service for good: it finishes its streams, then its worker ends."""
        await self._drain(name, grace_seconds)

    def subscribe(self, listener: Callable[[PoolState], None]) -> Callable[[], None]:
        """`listener` is called in the event loop with every pool that changed; the result ends that."""
        for pool in self.pools.values():
            pool.listeners.append(listener)

        def unsubscribe() -> None:
            for pool in self.pools.values():
                if listener in pool.listeners:
                    pool.listeners.remove(listener)

        return unsubscribe

    async def wait_until(self, predicate: Callable[[], bool], timeout: float | None = None) -> None:
        """Waits until `predicate` holds, looking again at every change. Raises TimeoutError."""
        changed = asyncio.Event()
        unsubscribe = self.subscribe(lambda _: changed.set())
        try:
            async with asyncio.timeout(timeout):
                while not predicate():
                    await changed.wait()
                    changed.clear()
        finally:
            unsubscribe()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _drain(self, name: str, grace_seconds: float) -> None:
        await self._watchers[name].stop(grace_seconds)
        await self._tasks[name]

    def _watcher(self, spec: PoolSpec, session: aiohttp.ClientSession) -> LocalPool | ExternalPool:
        state = self.pools[spec.name]
        limit = self.fleet.gateway.heartbeat_limit_seconds
        if spec.launcher == "external":
            return ExternalPool(state, spec, self.fleet.model.name, session=session, heartbeat_limit_seconds=limit)
        return LocalPool(
            state,
            self._command(self.fleet, spec),
            worker_environment(spec),
            session=session,
            heartbeat_limit_seconds=limit,
            backoff=self._backoff,
            on_log=lambda line: self._on_log(spec.name, line),
        )


def _state(spec: PoolSpec) -> PoolState:
    return PoolState(
        name=spec.name,
        launcher=spec.launcher,
        chip=spec.chip,
        roles=spec.roles,
        max_concurrency=spec.max_concurrency,
        url=spec.endpoint or None,
        model=spec.model,
        api_key=api_key(spec),
    )
