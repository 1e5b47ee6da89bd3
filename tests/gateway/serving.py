"""The real application on a loopback port, in front of fake workers."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import uvicorn
from fastapi import FastAPI

from anypool.gateway import Settings, create_app
from anypool.pools.state import PoolState
from tests.gateway.fake_worker import FakeWorker
from tests.gateway.tiny_tokenizer import TinyTokenizer

MODEL = "tiny"
TEXT = "hello wörld, こんにちは 😀👩‍👩‍👧! The end is n\u0000t near.\n"
FAST = Settings(heartbeat_limit_seconds=5.0, recovery_seconds=20.0)


class FakeManager:
    """Pools whose state the test sets."""

    def __init__(self) -> None:
        self.pools: dict[str, PoolState] = {}
        self._listeners: list[Callable[[PoolState], None]] = []

    def subscribe(self, listener: Callable[[PoolState], None]) -> Callable[[], None]:
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def _tell(self, pool: PoolState) -> None:
        for listener in list(self._listeners):
            listener(pool)

    def add(self, name: str, worker: FakeWorker | None, **fields: Any) -> PoolState:
        """A ready pool served by `worker`, or one that is down."""
        settings: dict[str, Any] = {"launcher": "local", "chip": "cpu", **fields}
        if worker is not None:
            settings = {"state": "ready", "url": worker.url, "pid": worker.port, **settings}
        else:
            settings = {"state": "down", **settings}
        pool = self.pools[name] = PoolState(name=name, **settings)
        pool.listeners.append(self._tell)
        return pool


class Gateway:
    """A client of the served application that sees raw answers."""

    def __init__(self, base: str, session: aiohttp.ClientSession, app: FastAPI, manager: FakeManager):
        self.base = base
        self.session = session
        self.app = app
        self.manager = manager
        self.headers: dict[str, str] = {}

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and decoded body; a body of bytes is sent as it is."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.session.post(self.base + path, data=data) as response:
            self.headers = {name.lower(): value for name, value in response.headers.items()}
            return response.status, await response.json(content_type=None)

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.session.get(self.base + path) as response:
            text = await response.text()
            return response.status, json.loads(text) if text.startswith(("{", "[")) else text

    async def stream(self, path: str, body: dict[str, Any]) -> list[Any]:
        """Every event of a stream, decoded; the end marker as the string [DONE]."""
        async with self.session.post(self.base + path, data=json.dumps({**body, "stream": True})) as response:
            self.headers = {name.lower(): value for name, value in response.headers.items()}
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            raw = await response.read()
        assert raw.endswith(b"\n\n")
        lines = raw.decode().removesuffix("\n\n").split("\n\n")
        assert all(line.startswith("data: ") for line in lines)
        return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]

    async def usable(self, count: int) -> None:
        """Wait until so many pools are usable."""
        await self.until(lambda pools: sum(pool["usable"] for pool in pools.values()) == count)

    async def until(self, condition: Callable[[dict[str, Any]], bool]) -> None:
        """Wait until what /health says of the pools, by name, fulfils a condition."""
        while True:
            _, health = await self.get("/health")
            if condition({pool["name"]: pool for pool in health["pools"]}):
                return
            await asyncio.sleep(0.005)


@asynccontextmanager
async def serve(app: FastAPI) -> AsyncIterator[str]:
    """Serve an app in this event loop; gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, access_log=False))
    task = asyncio.create_task(server.serve())
    while not server.started:
        assert not task.done(), "the server did not start"
        await asyncio.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


@asynccontextmanager
async def gateway(
    workers: Sequence[FakeWorker],
    *,
    settings: Settings = FAST,
    manager: FakeManager | None = None,
    tokenizer: TinyTokenizer | None = None,
) -> AsyncIterator[Gateway]:
    """A gateway over pools named a, b, c ... for the given workers, once all of them are usable."""
    if manager is None:
        manager = FakeManager()
        for name, worker in zip("abcdefgh", workers, strict=False):
            manager.add(name, worker)
    app = create_app(manager, tokenizer or TinyTokenizer(), MODEL, settings)
    async with serve(app) as base, aiohttp.ClientSession() as session:
        client = Gateway(base, session, app, manager)
        await client.usable(sum(pool.state == "ready" for pool in manager.pools.values()))
        yield client


def tokens_of(text: str = TEXT) -> list[int]:
    """The tiny tokenizer's ids of a text, without any around it."""
    return TinyTokenizer().encode(text, add_special_tokens=False)


def without_names(frames: list[Any]) -> list[Any]:
    """Frames without what differs from one request to the next."""
    return [
        {key: value for key, value in frame.items() if key not in ("id", "created")}
        if isinstance(frame, dict)
        else frame
        for frame in frames
    ]


def content(frames: list[Any]) -> str:
    """The text of choice 0 of a chat's stream."""
    choices = [choice for frame in frames if isinstance(frame, dict) for choice in frame["choices"]]
    return "".join(choice["delta"].get("content", "") for choice in choices if choice["index"] == 0)
