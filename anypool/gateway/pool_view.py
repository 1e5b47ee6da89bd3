"""The gateway's view of the pools: what the pool manager says, and what only the gateway knows.

The second part is how many streams are in flight on each, which prefixes each holds, its context length, and whether it
lost a stream just now. A pool is usable once the manager calls it ready and its worker has described itself.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import aiohttp
import msgspec

from anypool.gateway.prefix_index import PrefixIndex
from anypool.gateway.settings import Settings
from anypool.gateway.worker_client import WorkerClient, WorkerStream, auth_headers

log = logging.getLogger(__name__)

_FIRST_RETRY_SECONDS = 0.1
_LONGEST_RETRY_SECONDS = 5.0


class Pool(Protocol):
    """What the gateway reads of a pool's state (`pools.PoolState`)."""

    name: str
    launcher: str
    roles: tuple[str, ...]
    max_concurrency: int | None
    state: Any
    url: str | None
    pid: int | None
    model: str
    api_key: str | None
    restarts: int


class PoolManager(Protocol):
    """What the gateway needs of `pools.PoolManager`. Starting and stopping it is the caller's affair."""

    @property
    def pools(self) -> Mapping[str, Any]: ...
    def subscribe(self, listener: Callable[[Any], None]) -> Callable[[], None]:
        """Call `listener` with a pool at once when anything about it changes; the result ends that."""


class PoolView:
    """One pool as the gateway sees it.

    incarnation: counts workers; a restarted worker is another one, and what was held against the old one is forgotten.
    """

    def __init__(self, pool: Pool):
        self.pool = pool
        self.index = PrefixIndex()
        self.max_model_len: int | None = None
        self.described = False
        self.incarnation = 0
        self.in_flight = 0
        self.suspect_until = 0.0
        self.streams: set[WorkerStream] = set()
        self._identity = (pool.url, pool.pid)

    @property
    def name(self) -> str:
        return self.pool.name

    @property
    def external(self) -> bool:
        return self.pool.launcher == "external"

    @property
    def usable(self) -> bool:
        return self.described and self.pool.state == "ready" and self.pool.url is not None

    @property
    def full(self) -> bool:
        return self.pool.max_concurrency is not None and self.in_flight >= self.pool.max_concurrency

    @property
    def suspect(self) -> bool:
        """It lost a stream a moment ago, and the manager may not have noticed yet."""
        return time.monotonic() < self.suspect_until

    def refresh(self) -> bool:
        """Take over the manager's state; True if another worker is behind the pool now, or none."""
        identity = (self.pool.url, self.pool.pid)
        gone = self.pool.state in ("down", "failed", "starting")
        changed = identity != self._identity
        if not gone and not changed:
            return False
        self._identity = identity
        self.incarnation += 1
        self.described = False
        self.suspect_until = 0.0
        # A half-open connection would keep its stream waiting for the heartbeat limit.
        for stream in list(self.streams):
            stream.close()
        return True


class PoolViews:
    """All pools, followed from `start` to `stop`."""

    def __init__(self, manager: PoolManager, client: WorkerClient, settings: Settings):
        self.pools = [PoolView(pool) for pool in manager.pools.values()]
        self.settings = settings
        self._client = client
        self._changed = asyncio.Event()
        self._followers: dict[PoolView, asyncio.Task[None]] = {}
        self._manager = manager
        self._unsubscribe: Callable[[], None] = lambda: None

    def start(self) -> None:
        by_name = {view.name: view for view in self.pools}
        self._unsubscribe = self._manager.subscribe(lambda pool: self._update(by_name[pool.name]))
        for view in self.pools:
            self._update(view)

    async def stop(self) -> None:
        self._unsubscribe()
        followers = list(self._followers.values())
        for task in followers:
            task.cancel()
        await asyncio.gather(*followers, return_exceptions=True)

    @property
    def context_length(self) -> int | None:
        """The context of the smallest pool, so that every stream can move to any pool; None if none told."""
        known = [view.max_model_len for view in self.pools if view.max_model_len is not None]
        return min(known) if known else None

    def notify(self) -> None:
        """Wake everybody who waits for a pool."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_changed(self, timeout: float) -> None:
        """Until something changed that may make a pool usable, or the time is over."""
        try:
            async with asyncio.timeout(timeout):
                await self._changed.wait()
        except TimeoutError:
            pass

    def _update(self, view: PoolView) -> None:
        """The manager changed something about a pool: follow its worker, or stop doing so."""
        another = view.refresh()
        running = self._followers.get(view)
        if another and running is not None:
            running.cancel()
            running = None
        if view.pool.state == "ready" and view.pool.url is not None and (running is None or running.done()):
            self._followers[view] = asyncio.create_task(self._follow(view, view.pool.url), name=f"follow {view.name}")
        self.notify()

    async def _follow(self, view: PoolView, url: str) -> None:
        delay = _FIRST_RETRY_SECONDS
        while not view.described:
            try:
                view.max_model_len = await self._describe(view, url)
                view.described = True
            except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
                log.warning(
                    "pool %s is ready but does not describe itself: %s", view.name, error or type(error).__name__
                )
                await asyncio.sleep(delay)
                delay = min(2 * delay, _LONGEST_RETRY_SECONDS)
        self.notify()
        if not view.external:
            await view.index.follow(self._client, url, view.pool.api_key)

    async def _describe(self, view: PoolView, url: str) -> int | None:
        """The worker's context length; a foreign engine tells it, if at all, in its list of models."""
        path = "/v1/models" if view.external else "/health"
        timeout = aiohttp.ClientTimeout(total=self.settings.heartbeat_limit_seconds)
        headers = auth_headers(view.pool.api_key)
        async with self._client.session.get(url + path, headers=headers, timeout=timeout) as response:
            if response.status != 200:
                raise ValueError(f"{path} answered {response.status}")
            answer = msgspec.json.decode(await response.read(), type=dict[str, Any])
        if view.external:
            models = [model for model in answer.get("data", []) if view.pool.model in ("", model.get("id"))]
            answer = models[0] if models else {}
        length = answer.get("max_model_len")
        return length if isinstance(length, int) else None
