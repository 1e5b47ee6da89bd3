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
import subprocess
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import IO, Any

from anypool.pools.lifeline import ENVIRONMENT_VARIABLE, Lifeline

_LINE_LIMIT_BYTES = 1 << 20


class WorkerProcess:
    """A running worker. Make one with `start`; `gone` is set the moment it can no longer serve.

    on_event: called with each JSON object of the worker's standard output.
    on_log: called with each line of its standard error, without the newline.

    `subprocess` rather than the event loop's own: uvloop's children keep second copies of their pipes, so that the end
    of a worker's output goes unseen while any process it started lives.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        on_event: Callable[[dict[str, Any]], None],
        on_log: Callable[[str], None],
        lifeline: Lifeline | None,
    ) -> None:
        self.pid = process.pid
        self.gone = asyncio.Event()
        self._process = process
        self._on_event = on_event
        self._on_log = on_log
        self._lifeline = lifeline
        self._last_lines: deque[str] = deque(maxlen=20)
        # Whichever comes first says that the worker is gone: its lifeline, the end of its output, the end of the
        # process. The kernel frees the first before it takes the worker's memory back, and closes pipes after.
        self._output = asyncio.create_task(self._read_events())
        self._errors = asyncio.create_task(self._read_log())
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        threading.Thread(
            target=self._watch_exit, args=(asyncio.get_running_loop(),), name=f"worker {self.pid}", daemon=True
        ).start()

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        *,
        environment: dict[str, str],
        on_event: Callable[[dict[str, Any]], None],
        on_log: Callable[[str], None],
    ) -> WorkerProcess:
        """Starts `command`; call it in the event loop. Raises OSError if it cannot be run.

        The worker gets a session of its own, so that Ctrl-C in a terminal reaches only the launcher, which drains
        before it stops its workers.
        """
        pipe = subprocess.PIPE
        lifeline = Lifeline.create()
        if lifeline is not None:
            environment = {**environment, ENVIRONMENT_VARIABLE: str(lifeline.fd)}
        try:
            process = subprocess.Popen(
                command,
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                bufsize=0,
                start_new_session=True,
                env=environment,
                pass_fds=() if lifeline is None else (lifeline.fd,),
            )
        finally:
            if lifeline is not None:
                lifeline.close()
        return cls(process, on_event, on_log, lifeline)

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
        code = await asyncio.shield(self._exit)
        # A grandchild may hold the pipes open long after the worker is dead: do not wait for it.
        await asyncio.wait([self._output, self._errors], timeout=1.0)
        for task in (self._output, self._errors):
            task.cancel()
        assert self._process.stdin is not None
        self._process.stdin.close()
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

    def _watch_exit(self, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread of its own: waits for the death of the process and tells the event loop."""
        code = self._process.wait()
        # The loop may be closed already when the launcher itself goes down.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self._exited, code)

    def _exited(self, code: int) -> None:
        self._exit.set_result(code)
        self.gone.set()

    async def _read_events(self) -> None:
        assert self._process.stdout is not None
        async for line in _lines(self._process.stdout):
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                self._watch_lifeline(event["event"])
                self._on_event(event)
            else:
                # A library that prints: not for us, but not to be lost.
                self._keep(line)
        self.gone.set()

    def _watch_lifeline(self, event: str) -> None:
        """From `listening` on the worker holds its lifeline."""
        if self._lifeline is None or event != "listening":
            return
        loop = asyncio.get_running_loop()

        def died() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the launcher goes down too
                loop.call_soon_threadsafe(self.gone.set)

        self._lifeline.watch(died)
        self._lifeline = None

    async def _read_log(self) -> None:
        assert self._process.stderr is not None
        async for line in _lines(self._process.stderr):
            self._keep(line)

    def _keep(self, line: str) -> None:
        if line.strip():
            self._last_lines.append(line.strip())
        self._on_log(line)


async def _lines(pipe: IO[bytes]) -> AsyncIterator[str]:
    """The pipe's lines as text without the newline, until its end; a line over the limit is dropped, not fatal."""
    stream = asyncio.StreamReader(_LINE_LIMIT_BYTES)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stream), pipe)
    try:
        while True:
            try:
                line = await stream.readline()
            except ValueError:
                continue
            if not line:
                return
            yield line.decode("utf-8", "replace").rstrip("\r\n")
    finally:
        transport.close()
