"""A worker process of this machine: started, listened to, and never left behind.

A worker talks to its launcher in JSON lines on standard output (`listening`, `progress`, `ready`, `error`);
its standard error is passed on line by line; its standard input is the pipe whose end tells it to die (see
guard.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

_LINE_LIMIT_BYTES = 1 << 20


class WorkerProcess:
    """A running worker. Make one with `start`; `gone` is set the moment it can no longer serve.

    on_event: called with each JSON object of the worker's standard output.
    on_log: called with each line of its standard error, without the newline.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        on_event: Callable[[dict[str, Any]], None],
        on_log: Callable[[str], None],
    ) -> None:
        self.pid = process.pid
        self.gone = asyncio.Event()
        self._process = process
        self._on_event = on_event
        self._on_log = on_log
        self._last_lines: deque[str] = deque(maxlen=20)
        assert process.stdout is not None and process.stderr is not None
        # Whichever comes first, the end of its output or of the process, says that the worker is gone: the
        # kernel closes a dying process's pipes before it reports the death.
        self._output = asyncio.create_task(self._read_events(process.stdout))
        self._errors = asyncio.create_task(self._read_log(process.stderr))
        self._exit = asyncio.create_task(self._watch_exit())

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        *,
        environment: dict[str, str],
        on_event: Callable[[dict[str, Any]], None],
        on_log: Callable[[str], None],
    ) -> WorkerProcess:
        """Starts `command`. Raises OSError if it cannot be run.

        The worker gets a session of its own, so that Ctrl-C in a terminal reaches only the launcher, which
        drains before it stops its workers.
        """
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            limit=_LINE_LIMIT_BYTES,
            env=environment,
        )
        return cls(process, on_event, on_log)

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    def last_line(self) -> str:
        """The last thing the worker wrote to standard error, the best hint when it died without a word."""
        return self._last_lines[-1] if self._last_lines else ""

    def terminate(self) -> None:
        """SIGTERM: the worker finishes its streams and exits; a second one makes it exit now."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self._signal(signal.SIGKILL)

    async def ended(self) -> int:
        """Waits until the process is reaped and its last words are read; its exit code or -signal."""
        code = await self._exit
        # A grandchild may hold the pipes open long after the worker is dead: do not wait for it.
        await asyncio.wait([self._output, self._errors], timeout=1.0)
        for task in (self._output, self._errors):
            task.cancel()
        return code

    async def stop(self, grace_seconds: float) -> int:
        """SIGTERM, and SIGKILL if it still runs after `grace_seconds`. Returns as `ended`, in every case."""
        self.terminate()
        try:
            await asyncio.wait_for(asyncio.shield(self._exit), grace_seconds)
        except TimeoutError:
            self.kill()
        except asyncio.CancelledError:
            self.kill()
            raise
        return await self.ended()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def _watch_exit(self) -> int:
        try:
            return await self._process.wait()
        finally:
            self.gone.set()

    async def _read_events(self, stream: asyncio.StreamReader) -> None:
        async for line in _lines(stream):
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                self._on_event(event)
            else:
                # A library that prints: not for us, but not to be lost.
                self._keep(line)
        self.gone.set()

    async def _read_log(self, stream: asyncio.StreamReader) -> None:
        async for line in _lines(stream):
            self._keep(line)

    def _keep(self, line: str) -> None:
        if line.strip():
            self._last_lines.append(line.strip())
        self._on_log(line)


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """The stream's lines as text without the newline; a line over the limit is dropped, not fatal."""
    while True:
        try:
            line = await stream.readline()
        except ValueError:
            continue
        if not line:
            return
        yield line.decode("utf-8", "replace").rstrip("\r\n")
