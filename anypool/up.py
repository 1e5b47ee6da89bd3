"""`anypool up`: a whole fleet served from this process, from the first worker's start to the last one's end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

import uvicorn
from rich.console import Console
from rich.progress import Progress, TaskID

from anypool.gateway import Settings, create_app
from anypool.models import Tokenizer
from anypool.pools import Fleet, PoolManager, PoolState
from anypool.progress import bars, resolve_shown

log = logging.getLogger(__name__)

STREAMS_GRACE_SECONDS = 30
"""How long running streams may take to finish after the first Ctrl-C."""
WORKERS_GRACE_SECONDS = 5.0
"""How long a worker may take to end once no stream is left."""


class PortError(ValueError):
    """The address of the endpoint cannot be had."""


@dataclass(frozen=True)
class Endpoint:
    """A running gateway. `url` is without `/v1`."""

    url: str
    manager: PoolManager
    server: uvicorn.Server
    serving: asyncio.Task[None]


class _Server(uvicorn.Server):
    """Leaves signals to us: the first one drains gateway and workers in order."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """The endpoint's socket, taken before anything slow starts. Raises PortError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortError(
                f"port {port} on {host} is in use: stop what listens there, choose another with --port, "
                "or --port 0 for any free one"
            ) from None
        if error.errno == errno.EACCES:
            raise PortError(f"port {port} on {host} needs more rights: choose one of 1024 or above") from None
        raise PortError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None


@contextlib.asynccontextmanager
async def endpoint(
    fleet: Fleet, manager: PoolManager, tokenizer: Tokenizer, listener: socket.socket
) -> AsyncIterator[Endpoint]:
    """Starts every pool and the gateway; on leaving, lets streams finish and leaves no worker behind.

    The gateway answers at once; until a pool is ready it answers 503.
    """
    settings = Settings(
        heartbeat_limit_seconds=fleet.gateway.heartbeat_limit_seconds,
        recovery_seconds=fleet.gateway.recovery_seconds,
    )
    app = create_app(manager, tokenizer, fleet.model.name, settings)
    serving: asyncio.Task[None] | None = None
    try:
        await manager.start()
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=STREAMS_GRACE_SECONDS,
            timeout_keep_alive=60,
        )
        server = _Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]), name="gateway")
        try:
            yield Endpoint(_url(listener), manager, server, serving)
        finally:
            server.should_exit = True
            await serving
    finally:
        if serving is not None:
            serving.cancel()
        await manager.stop(WORKERS_GRACE_SECONDS)
        listener.close()


def run(fleet: Fleet, *, format: str = "table") -> int:
    """Serves the fleet until a signal; the exit code. Raises ValueErrors for what the user can mend.

    format: `table` prints `summary` once the fleet serves, `json` prints `report`.
    """
    console = Console(stderr=True)
    manager = PoolManager(fleet)
    listener = listen(fleet.gateway.host, fleet.gateway.port)
    with bars(console) as shown:
        directory = resolve_shown(fleet.model.id, shown)
    tokenizer = Tokenizer.load(directory)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_serve(fleet, manager, tokenizer, listener, console, report if format == "json" else summary))


async def _serve(
    fleet: Fleet,
    manager: PoolManager,
    tokenizer: Tokenizer,
    listener: socket.socket,
    console: Console,
    describe: Callable[[Fleet, str, list[PoolState]], str],
) -> int:
    async with endpoint(fleet, manager, tokenizer, listener) as running:
        stopping = _on_signals(running)
        ended = asyncio.create_task(stopping.wait())
        settled = asyncio.create_task(_wait_until_settled(manager, console))
        await asyncio.wait([ended, settled], return_when=asyncio.FIRST_COMPLETED)
        settled.cancel()
        pools = manager.pools.values()
        if not stopping.is_set() and all(pool.state == "failed" for pool in pools):
            for pool in pools:
                sys.stderr.write(f"pool {pool.name} cannot be served from: {pool.last_error}\n")
            ended.cancel()
            return 2
        if not stopping.is_set():
            print(describe(fleet, running.url, list(pools)), flush=True)
        await asyncio.wait([ended, running.serving], return_when=asyncio.FIRST_COMPLETED)
    return 0 if stopping.is_set() else 1


def summary(fleet: Fleet, url: str, pools: list[PoolState]) -> str:
    """What one sees when the fleet serves: the pools, the address, and how to try it."""
    rows = [("pool", "chip", "launcher", "state", "pid", "url")]
    rows += [(p.name, p.chip, p.launcher, p.state, str(p.pid or "-"), p.url or "-") for p in pools]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = "\n".join("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    messages = '[{"role": "user", "content": "Tell me a story."}]'
    body = f'{{"model": "{fleet.model.name}", "stream": true, "messages": {messages}}}'
    lines = [f"{fleet.name} serves {fleet.model.name} at {url}", "", table, ""]
    lines += [f"  {pool.name} is {pool.state}: {pool.last_error}" for pool in pools if pool.state != "ready"]
    lines += [
        "Try it:",
        f"  curl -N {url}/v1/chat/completions -H 'content-type: application/json' \\",
        f"    -d '{body}'",
    ]
    victim = next((pool.pid for pool in pools if pool.pid), None)
    if victim is not None and len(pools) > 1:
        lines += ["Lose a pool in the middle of the answer, and not a token with it:", f"  kill -9 {victim}"]
    lines += ["API documentation:", f"  {url}/docs", "Ctrl-C lets running streams finish and stops; twice stops now."]
    return "\n".join(lines)


def report(fleet: Fleet, url: str, pools: list[PoolState]) -> str:
    """The same for a program, as one line of JSON."""
    columns = ("name", "chip", "launcher", "state", "pid", "url", "last_error")
    rows = [{column: getattr(pool, column) for column in columns} for pool in pools]
    return json.dumps({"fleet": fleet.name, "model": fleet.model.name, "url": url, "pools": rows})


def _on_signals(running: Endpoint) -> asyncio.Event:
    """Set by the first signal, which drains; the second one ends everything now."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stopping.is_set():
            running.server.force_exit = True
            running.manager.kill()
            return
        log.info("draining grace_seconds=%g hint=%r", STREAMS_GRACE_SECONDS, "once more to stop now")
        stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal)
    return stopping


async def _wait_until_settled(manager: PoolManager, console: Console) -> None:
    """Shows each pool's progress until every pool is ready, or has failed to be at least once."""
    pools = manager.pools.values()
    with bars(console) as shown:
        tasks = {pool.name: shown.add_task(f"{pool.name}: starting", total=None) for pool in pools}
        unsubscribe = manager.subscribe(lambda pool: _show(shown, tasks[pool.name], pool))
        try:
            await manager.wait_until(lambda: all(_settled(pool) for pool in pools))
        finally:
            unsubscribe()


def _settled(pool: PoolState) -> bool:
    # A local worker that is down says in a moment whether it failed for good or is tried again.
    return (
        pool.state in ("ready", "failed") or pool.restarts > 0 or (pool.launcher == "external" and pool.state == "down")
    )


def _show(shown: Progress, task: TaskID, pool: PoolState) -> None:
    step = pool.progress
    if step is not None:
        detail = f" {step.detail}" if step.detail else ""
        shown.update(task, description=f"{pool.name}: {step.phase}{detail}", completed=step.done, total=step.total)
    elif pool.state == "ready":
        shown.update(task, description=f"{pool.name}: ready", completed=1, total=1)
    else:
        shown.update(task, description=f"{pool.name}: {pool.state}")


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    # The addresses that mean "every interface" are not ones to connect to.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
