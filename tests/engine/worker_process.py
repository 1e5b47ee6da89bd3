"""A real `anypool worker` under supervision, as a launcher sees it, and HTTP to it. Everything waits for events."""

import http.client
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TIMEOUT = 120.0
"""Seconds after which a test gives up waiting for something that is sure to happen."""


class WorkerProcess:
    """One worker process and the events it told. A context manager: the process is gone afterwards."""

    def __init__(self, model: Path | str, *flags: str, cache: Path | None = None) -> None:
        """cache: a folder to take the place of the user's, for instance an empty one."""
        command = [sys.executable, "-m", "anypool", "worker", "--model", str(model), "--supervised", *flags]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | ({} if cache is None else {"ANYPOOL_CACHE": str(cache)}),
        )
        self.events: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._readers = [
            threading.Thread(target=self._read_events, daemon=True),
            threading.Thread(target=self._read_errors, daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        self.port = 0

    def __enter__(self) -> "WorkerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for reader in self._readers:
            reader.join()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()

    def _read_events(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self.errors += self.process.stderr

    def wait_for(self, event: str) -> dict[str, Any]:
        """The next event of that name; those before it are kept in `events`."""
        while True:
            line = self._lines.get(timeout=TIMEOUT)
            assert line is not None, f"the worker ended before {event!r}: {self.events} {''.join(self.errors)}"
            self.events.append(json.loads(line))
            if self.events[-1]["event"] == event:
                return self.events[-1]

    def listening(self) -> "WorkerProcess":
        self.port = self.wait_for("listening")["port"]
        return self

    def ready(self) -> "WorkerProcess":
        self.listening()
        self.wait_for("ready")
        return self

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def hang_up(self) -> None:
        """Closes the worker's standard input, as the end of its launcher does."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def wait(self) -> int:
        """The exit code, once the process has ended and all it told is in `events`."""
        code = self.process.wait(TIMEOUT)
        while (line := self._lines.get(timeout=TIMEOUT)) is not None:
            self.events.append(json.loads(line))
        return code

    # ---- HTTP ----------------------------------------------------------------------------------------------------

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)

    def get(self, path: str) -> "Reply":
        return self.request("GET", path)

    def post(self, body: dict[str, Any] | bytes, path: str = "/v1/completions") -> "Reply":
        return self.request("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode())

    def request(self, method: str, path: str, body: bytes | None = None) -> "Reply":
        connection = self.connect()
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            return Reply(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()

    def health(self) -> dict[str, Any]:
        health: dict[str, Any] = self.get("/health").json()
        return health

    def wait_until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Asks for /health until it satisfies a condition that is sure to come true; returns it."""
        deadline = time.monotonic() + TIMEOUT
        while not condition(health := self.health()):
            assert time.monotonic() < deadline, health
        return health

    def idle(self) -> dict[str, Any]:
        """Waits until the engine has nothing to do and nothing is held; returns /health."""
        return self.wait_until(lambda health: not (health["running"] or health["waiting"] or health["kv_blocks_used"]))

    def complete(self, **body: Any) -> dict[str, Any]:
        """The answer to a completion that does not stream."""
        reply = self.post(body)
        assert reply.status == 200, reply.body
        answer: dict[str, Any] = reply.json()
        return answer

    @contextmanager
    def stream(self, path: str = "/v1/completions", **body: Any) -> Iterator["Stream"]:
        """The server-sent events of a completion, or of another path by GET. Leaving closes the connection."""
        connection = self.connect()
        try:
            if body:
                connection.request("POST", path, json.dumps({"stream": True} | body))
            else:
                connection.request("GET", path)
            response = connection.getresponse()
            assert response.status == 200, response.read()
            yield Stream(response, connection)
        finally:
            connection.close()


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Stream:
    """Server-sent events, one at a time."""

    response: http.client.HTTPResponse
    connection: http.client.HTTPConnection
    comments: list[str] = field(default_factory=list)

    def next(self) -> str | None:
        """Data of the next event, None at the end. Comments are kept aside."""
        while True:
            block = self.block()
            if block is None:
                return None
            if block.startswith(":"):
                self.comments.append(block)
                continue
            assert block.startswith("data: "), block
            assert "\n" not in block, block
            return block.removeprefix("data: ")

    def block(self) -> str | None:
        """The next event or comment as it is, without the empty line that ends it."""
        lines: list[bytes] = []
        while line := self.response.readline():
            if line == b"\n":
                return b"".join(lines).decode().removesuffix("\n")
            lines.append(line)
        assert not lines, "the stream ended in the middle of an event"
        return None

    def close(self) -> None:
        """Leaves, as a client that no longer cares does."""
        self.response.close()
        self.connection.close()

    def json(self) -> Any:
        data = self.next()
        assert data is not None, "the stream has ended"
        return json.loads(data)

    def rest(self) -> list[str]:
        """Data of every event that is left."""
        return list(iter(self.next, None))

    def until_cut_off(self) -> list[str]:
        """Data of every event that came whole before the connection broke."""
        found = []
        with suppress(OSError, http.client.HTTPException, AssertionError):
            while (data := self.next()) is not None:
                found.append(data)
        return found
