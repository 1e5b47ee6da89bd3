"""A worker: one engine behind HTTP, in the form that any engine can be a pool (design, 4.2).

The HTTP side is one event loop that never waits for the device; the engine's thread hands it a step's tokens in one
call. The routes are plain ASGI, because every token of every stream passes here.
"""

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from anypool.engine import protocol
from anypool.engine.engine import Engine, StepResult, Update, scheduler_config
from anypool.engine.metrics import Metrics
from anypool.engine.prefix import BLOCK_SIZE
from anypool.engine.request import Request, RequestError
from anypool.engine.runner import Limits, Runner
from anypool.engine.scheduler import QueueFullError
from anypool.models import ModelConfig, resolve

log = logging.getLogger(__name__)

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

ALIVE_SECONDS = 0.25
"""A stream with nothing to say sends a comment this often, so that silence means trouble."""
HUNG_SECONDS = 3.0
"""An engine loop that has shown no life for so long is taken to hang, and the comments stop."""
DRAIN_SECONDS = 30.0
"""How long running streams may take to finish when the worker is told to go."""
MAX_BODY_BYTES = 16 * 2**20


@dataclass(frozen=True)
class WorkerOptions:
    """What `anypool worker` is told. Lengths in tokens; `threads` None takes every core."""

    model: str
    name: str = "worker"
    host: str = "127.0.0.1"
    port: int = 0
    dtype: str = "float32"
    max_num_seqs: int = 32
    token_budget: int = 256
    max_model_len: int | None = None
    kv_cache_gib: float = 1.0
    max_waiting: int = 256
    threads: int | None = None
    faster_kernels: bool = True
    supervised: bool = False


def run_worker(options: WorkerOptions) -> int:
    """Serves until told to stop; the exit code: 0 after a drain, 2 for what the user can mend, 70 for a fault."""
    if options.threads is not None:
        os.environ["NPROC"] = str(options.threads)  # XLA:CPU sizes its thread pool by it
    worker = Worker(options)
    code = asyncio.run(worker.serve())
    if worker.loading:
        # Told to stop while starting. Loading cannot be interrupted, and ending the interpreter around a thread that
        # is inside XLA aborts the process.
        os._exit(code)
    return code


@dataclass(eq=False)
class _Stream:
    """Updates on their way to one client."""

    request: Request
    updates: deque[Update] = field(default_factory=deque)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    sent: bool = False
    """Tokens were sent since the last look."""


class Worker:
    """The state of one worker process."""

    def __init__(self, options: WorkerOptions) -> None:
        self.options = options
        self.started = time.monotonic()
        self.status = "starting"
        self.warm = {"done": 0, "total": 0}
        self.engine: Engine | None = None
        self.metrics: Metrics | None = None
        self.exit_code = 0
        self._loader = threading.Thread(target=self._load, name="load", daemon=True)
        self._signalled = False
        self._streams: dict[str, _Stream] = {}
        self._event_queues: set[asyncio.Queue[bytes | None]] = set()
        self._loop: asyncio.AbstractEventLoop
        self._server: uvicorn.Server

    # ---- life ----------------------------------------------------------------------------------------------------

    async def serve(self) -> int:
        """Binds, loads, serves; returns the exit code."""
        self._loop = asyncio.get_running_loop()
        try:
            listener = socket.create_server((self.options.host, self.options.port), backlog=1024)
        except OSError as error:
            return self._refuse(f"cannot listen on {self.options.host}:{self.options.port}: {error.strerror}")
        config = uvicorn.Config(
            self._app, interface="asgi3", log_config=None, access_log=False, lifespan="off", timeout_keep_alive=60
        )
        self._server = _Server(config)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._on_signal)
        self._tell(event="listening", port=listener.getsockname()[1])
        self._loader.start()
        ticker = asyncio.create_task(self._tick())
        await self._server.serve(sockets=[listener])
        ticker.cancel()
        if self.engine is not None and self.exit_code == 0:
            self.engine.stop()
        return self.exit_code

    @property
    def loading(self) -> bool:
        return self._loader.is_alive()

    def _load(self) -> None:
        """Loads and warms the model, on a thread of its own so that /health answers meanwhile."""
        try:
            engine = self._make_engine()
        except (ValueError, OSError) as error:
            self._loop.call_soon_threadsafe(self._stop, self._refuse(str(error)))
        except BaseException as error:  # a worker that cannot load must say so and end
            log.exception("loading failed")
            self._loop.call_soon_threadsafe(self._stop, self._refuse(f"{type(error).__name__}: {error}", code=70))
        else:
            self._loop.call_soon_threadsafe(self._ready, engine)

    def _make_engine(self) -> Engine:
        options = self.options
        directory = resolve(options.model, self._resolving)
        config = ModelConfig.load(directory)
        limits = self._limits(config)
        scheduler_config(config, limits, options.max_waiting)  # refuses what it must before the long part
        runner = Runner.load(directory, limits, options.dtype, options.faster_kernels, self._progress)
        for op, kernel in runner.kernels.report().items():
            log.info("kernel %s=%s", op, kernel)
        self.warm["total"] = len(runner.shapes.all())
        runner.warm(self._progress)
        return Engine(runner, options.max_waiting, self._deliver, self._engine_died)

    def _resolving(self, phase: str, done: int, total: int) -> None:
        self._progress("download", done, total, phase)

    def _limits(self, config: ModelConfig) -> Limits:
        options = self.options
        context = options.max_model_len or min(config.max_position, 8192)
        if context > config.max_position:
            raise ValueError(f"max_model_len is {context}: the model's context is {config.max_position} tokens at most")
        return Limits(options.max_num_seqs, options.token_budget, context, int(options.kv_cache_gib * 2**30))

    def _ready(self, engine: Engine) -> None:
        if self.status != "starting":
            return  # told to stop meanwhile
        self.engine = engine
        self.metrics = Metrics(engine, self.options.model, self.options.name)
        # What is loaded stays: a full collection over it, between two steps, would hold up every stream.
        gc.collect()
        gc.freeze()
        engine.start()
        self.status = "ready"
        self._tell(event="ready")
        log.info("ready after %.1f s, %d blocks of cache", time.monotonic() - self.started, engine.pool.capacity)

    def _on_signal(self) -> None:
        """The first signal drains, the second ends the process now."""
        if self._signalled:
            self._end_now()
        self._signalled = True
        self._drain()

    def _drain(self) -> None:
        """Takes no further request, and ends when those under way have, or after DRAIN_SECONDS."""
        if self.status == "draining":
            return
        self.status = "draining"
        self._loop.call_later(DRAIN_SECONDS, self._end_now)
        if not self._streams:
            self._stop(0)

    def _end_now(self) -> None:
        """Closes every connection by ending: whoever reads a stream sees it cut, and can replay it elsewhere."""
        os._exit(self.exit_code)

    def _stop(self, code: int) -> None:
        self.exit_code = self.exit_code or code
        for queue in self._event_queues:
            queue.put_nowait(None)
        self._server.should_exit = True

    def _engine_died(self, error: BaseException) -> None:
        """Ends the process at once: the gateway replays the streams elsewhere, and the pool starts a new worker."""
        self._tell(event="error", message=f"the engine died: {type(error).__name__}: {error}")
        os._exit(70)

    def _refuse(self, message: str, code: int = 2) -> int:
        log.error("%s", message)
        self._tell(event="error", message=message)
        return code

    def _progress(self, phase: str, done: int, total: int, detail: str) -> None:
        if phase == "warmup":
            self.warm["done"] = done
        self._tell(event="progress", phase=phase, done=done, total=total, detail=detail)

    def _tell(self, **event: Any) -> None:
        """One line to the launcher."""
        if self.options.supervised:
            sys.stdout.write(json.dumps(event) + "\n")
            sys.stdout.flush()

    # ---- tokens --------------------------------------------------------------------------------------------------

    def _deliver(self, result: StepResult) -> None:
        self._loop.call_soon_threadsafe(self._dispatch, result)

    def _dispatch(self, result: StepResult) -> None:
        for update in result.updates:
            stream = self._streams.get(update.request.id)
            if stream is None or stream.request is not update.request:
                continue  # cancelled while this was on its way, and its id perhaps in use again
            if self.metrics is not None:
                self.metrics.observe(update)
            stream.updates.append(update)
            stream.news.set()
        if self._event_queues and (result.blocks.stored or result.blocks.evicted):
            event = _blocks_event(result.blocks.stored, result.blocks.evicted)
            for queue in self._event_queues:
                queue.put_nowait(event)

    async def _tick(self) -> None:
        """Wakes the streams that have been silent, as long as the engine's loop lives."""
        while True:
            await asyncio.sleep(ALIVE_SECONDS)
            if self.engine is None or time.monotonic() - self.engine.beat > HUNG_SECONDS:
                continue
            for stream in self._streams.values():
                if not stream.sent:
                    stream.news.set()
                stream.sent = False

    # ---- HTTP ----------------------------------------------------------------------------------------------------

    async def _app(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        route = (scope["method"], scope["path"])
        if route == ("POST", "/v1/completions"):
            await self._completions(receive, send)
        elif route == ("GET", "/health"):
            ready = self.status == "ready"
            await _reply(send, 200 if ready else 503, json.dumps(self._health()).encode())
        elif route == ("GET", "/v1/models"):
            await self._models(send)
        elif route == ("GET", "/metrics"):
            text = b"" if self.metrics is None else self.metrics.render()
            await _reply(send, 200, text, b"text/plain; version=0.0.4; charset=utf-8")
        elif route == ("GET", "/events"):
            await self._events(receive, send)
        elif route == ("POST", "/drain"):
            await _reply(send, 200, b"{}")
            self._drain()
        else:
            await _reply(send, 404, protocol.error_body(f"no route {route[0]} {route[1]}", "invalid_request_error"))

    def _health(self) -> dict[str, Any]:
        health: dict[str, Any] = {
            "status": self.status,
            "pid": os.getpid(),
            "name": self.options.name,
            "model": self.options.model,
            "block_size": BLOCK_SIZE,
            "warm_shapes": self.warm,
            "uptime_seconds": round(time.monotonic() - self.started, 3),
        }
        if self.engine is not None:
            engine = self.engine
            health |= {
                "max_model_len": engine.runner.limits.max_model_len,
                "running": engine.scheduler.num_running,
                "waiting": engine.scheduler.num_waiting,
                "kv_blocks_total": engine.pool.capacity,
                "kv_blocks_used": engine.pool.num_used,
                "heartbeat_age_seconds": round(time.monotonic() - engine.beat, 3),
                "kernels": engine.runner.kernels.report(),
            }
        return health

    async def _models(self, send: Send) -> None:
        """What is served, as OpenAI has it: by this a gateway elsewhere joins the worker as an external pool."""
        if self.status != "ready" or self.engine is None:
            await _unavailable(send, f"the worker is {self.status}")
            return
        length = self.engine.runner.limits.max_model_len
        model = {"id": self.options.model, "object": "model", "owned_by": "anypool", "max_model_len": length}
        await _reply(send, 200, json.dumps({"object": "list", "data": [model]}).encode())

    async def _completions(self, receive: Receive, send: Send) -> None:
        if self.status != "ready" or self.engine is None:
            await _unavailable(send, f"the worker is {self.status}")
            return
        try:
            body = protocol.parse(await _read_body(receive))
            request = body.to_request(body.anypool.request_id or f"cmpl-{uuid.uuid4().hex}")
            stream = _Stream(request)
            self.engine.add(request)
        except RequestError as error:
            await _reply(send, 400, protocol.error_body(str(error), "invalid_request_error", error.param))
            return
        except QueueFullError as error:
            await _unavailable(send, str(error))
            return
        self._streams[request.id] = stream
        gone = asyncio.create_task(_end_when_gone(receive, stream))
        try:
            writer = protocol.StreamWriter(request, self.options.model)
            await (self._stream if body.stream else self._whole)(send, stream, writer)
        finally:
            # In one go, and only here: the id may be in use again as soon as the engine has let go of it.
            gone.cancel()
            self.engine.cancel(request.id)
            del self._streams[request.id]
            if self.metrics is not None:
                self.metrics.forget(request.id)
            if self.status == "draining" and not self._streams:
                self._stop(0)

    async def _stream(self, send: Send, stream: _Stream, writer: protocol.StreamWriter) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM})
        finished = False
        while not finished:
            await stream.news.wait()
            stream.news.clear()
            stream.sent = bool(stream.updates)
            body = b"" if stream.updates else b": alive\n\n"
            while stream.updates:
                update = stream.updates.popleft()
                if update.finish_reason == "cancelled":
                    return
                body += writer.event(update)
                finished = update.finish_reason is not None
            if finished:
                body += b"data: [DONE]\n\n"
            await send({"type": "http.response.body", "body": body, "more_body": not finished})

    async def _whole(self, send: Send, stream: _Stream, writer: protocol.StreamWriter) -> None:
        updates: list[Update] = []
        while not updates or updates[-1].finish_reason is None:
            await stream.news.wait()
            stream.news.clear()
            while stream.updates:
                updates.append(stream.updates.popleft())
                if updates[-1].finish_reason == "cancelled":
                    return
        await _reply(send, 200, writer.whole(updates))

    async def _events(self, receive: Receive, send: Send) -> None:
        """Which prefix blocks can be shared: all of them first, then each step's changes."""
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._event_queues.add(queue)
        if self._server.should_exit:
            queue.put_nowait(None)

        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            queue.put_nowait(None)

        watcher = asyncio.create_task(gone())
        try:
            # The queue is in place first: a change that the snapshot already holds is only told twice.
            held = [] if self.engine is None else self.engine.matchable()
            await send({"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM})
            event: bytes | None = _blocks_event(held, [], reset=True)
            while event is not None:
                await send({"type": "http.response.body", "body": event, "more_body": True})
                event = await queue.get()
            await send({"type": "http.response.body", "body": b""})
        finally:
            watcher.cancel()
            self._event_queues.discard(queue)


class _Server(uvicorn.Server):
    """Leaves signals to the worker, which drains before it stops."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


_EVENT_STREAM = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]


def _blocks_event(stored: list[bytes], evicted: list[bytes], reset: bool = False) -> bytes:
    body: dict[str, Any] = {"stored": [one.hex() for one in stored], "evicted": [one.hex() for one in evicted]}
    if reset:
        body["reset"] = True
    return b"data: " + json.dumps(body).encode() + b"\n\n"


async def _read_body(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise RequestError("body", f"the body is larger than {MAX_BODY_BYTES} bytes")
        if not message.get("more_body"):
            return bytes(body)


async def _end_when_gone(receive: Receive, stream: _Stream) -> None:
    """Ends the stream when its client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
    stream.updates.append(Update(stream.request, [], None, "cancelled"))
    stream.news.set()


async def _reply(
    send: Send, status: int, body: bytes, kind: bytes = b"application/json", extra: tuple[tuple[bytes, bytes], ...] = ()
) -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *extra]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _unavailable(send: Send, message: str) -> None:
    body = protocol.error_body(message, "overloaded_error", code="unavailable")
    await _reply(send, 503, body, extra=((b"retry-after", b"1"),))
