"""An `anypool up` in a process of its own, for as long as somebody measures it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

PROBE_SECONDS = 0.1
"""How often a pool that is not ready is asked for."""
READY_LIMIT_SECONDS = 600.0
"""How long a pool may take to come back: a restart, after the longest pause between restarts, on a loaded machine."""
_GRACE_SECONDS = 15.0
_LINE_LIMIT_BYTES = 1 << 20


class ServingError(ValueError):
    """The fleet cannot be measured: it did not start, or did not come back."""


@dataclass(frozen=True)
class Serving:
    """A fleet that serves. `url` is without `/v1`; `pools` are their names."""

    url: str
    model: str
    pools: tuple[str, ...]
    session: aiohttp.ClientSession
    process: asyncio.subprocess.Process
    last_lines: deque[str]

    async def health(self) -> list[dict[str, Any]]:
        """The pools as the gateway's /health lists them. Raises ServingError if the gateway is gone."""
        try:
            async with self.session.get(f"{self.url}/health", timeout=aiohttp.ClientTimeout(total=30)) as response:
                pools: list[dict[str, Any]] = (await response.json())["pools"]
                return pools
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise ServingError(f"the endpoint {self.url} is gone: {error!r}{_said(self.last_lines)}") from error

    async def ready(self, without: Sequence[int] = (), limit_seconds: float = READY_LIMIT_SECONDS) -> dict[str, int]:
        """Waits until every pool serves, none of them by a process of `without`; pool -> pid of the local ones.

        Raises ServingError when a pool has failed for good, or takes longer than `limit_seconds`.
        """
        deadline = time.monotonic() + limit_seconds
        while True:
            pools = await self.health()
            waiting = [pool for pool in pools if not pool["usable"] or pool["pid"] in without]
            if not waiting:
                return {pool["name"]: pool["pid"] for pool in pools if pool["pid"] is not None}
            for pool in waiting:
                if pool["state"] == "failed" or time.monotonic() > deadline:
                    raise ServingError(f"pool {pool['name']} is {pool['state']}{_said(self.last_lines)}")
            await asyncio.sleep(PROBE_SECONDS)


@contextlib.asynccontextmanager
async def serving(
    fleet: str | None, pools: Sequence[str] = (), on_log: Callable[[str], None] = lambda _: None
) -> AsyncIterator[Serving]:
    """Starts a fleet on a free port, waits until every pool serves, and leaves no process behind.

    fleet: the fleet file, None for the default one. pools: only these of its pools. on_log: gets each line the fleet
    writes to its standard error. Raises ServingError if the fleet does not start.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "anypool", "up", "--supervised", "--port", "0", "--format", "json"),
        *([fleet] if fleet else []),
        *(argument for pool in pools for argument in ("--pool", pool)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        # Ctrl-C is for us: we stop the fleet in order.
        start_new_session=True,
        limit=_LINE_LIMIT_BYTES,
    )
    last_lines: deque[str] = deque(maxlen=20)
    assert process.stdout is not None and process.stderr is not None
    log = asyncio.create_task(_read_log(process.stderr, last_lines, on_log))
    try:
        line = await process.stdout.readline()
        if not line:
            code = await process.wait()
            await log
            raise ServingError(f"`anypool up` ended with exit code {code}{_said(last_lines)}")
        told = json.loads(line)
        names = tuple(pool["name"] for pool in told["pools"])
        # A connection a stream: a kept one could be closed by the server just as it is used again.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector) as session:
            running = Serving(told["url"], told["model"], names, session, process, last_lines)
            await running.ready()
            yield running
    finally:
        await _stop(process)
        log.cancel()


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Asks twice, as Ctrl-C does, then kills; the workers of a killed fleet end by themselves."""
    try:
        for signal in (process.terminate, process.terminate):
            if process.returncode is not None:
                return
            signal()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(process.wait()), _GRACE_SECONDS)
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _read_log(stream: asyncio.StreamReader, last_lines: deque[str], on_log: Callable[[str], None]) -> None:
    while line := await stream.readline():
        text = line.decode("utf-8", "replace").rstrip()
        last_lines.append(text)
        on_log(text)


def _said(last_lines: deque[str]) -> str:
    """What the fleet said last: what it says the user can mend, else the end of its log."""
    mendable = [line.removeprefix("error: ") for line in last_lines if line.startswith(("error: ", "pool "))]
    if mendable:
        return ": " + "; ".join(mendable)
    return "; it wrote last:\n  " + "\n  ".join(list(last_lines)[-8:]) if last_lines else ""
