"""A trainer as processes of this machine: started, listened to, and never left behind.

A trainer is told what to do by one line of JSON on standard input, which then stays open (pools/guard.py), and tells
what it does in JSON lines on standard output: `{"event": "step", ...}`. Its standard error is passed on line by line.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import IO, Any

from anypool.train.run.file import RunPool

COMMAND = (sys.executable, "-m", "anypool.train.run.trainer")

FINISHED, FAILED, USER_ERROR, STOPPED, FENCED, REFUSED = 0, 1, 2, 10, 11, 12
"""How a trainer ends: all steps done; a crash; a mistake of the user's; stopped on purpose, committed; another holds
the lease; it does not compute what was recorded (the gate), or the pool is not what the run file says."""


KEEP_MEMORY = "glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000"
"""For a CPU's trainer: glibc keeps what a step frees for the next one, which allocates the same again. Given back,
every page would be mapped and cleared anew in every step. It costs at most the memory of one step's largest arrays."""


@dataclass(frozen=True)
class Assignment:
    """What a trainer is told.

    store: the run's directory. lease, holder, since: the lease taken for it. usd_before: spent by earlier epochs, None
    if not all prices are known. trace, throttle_seconds: as in `loop.Inputs`. coordinator: address of the first of
    several hosts.
    """

    store: str
    pool: str
    lease: int
    holder: dict[str, Any]
    since: float
    usd_before: float | None = None
    trace: bool = False
    throttle_seconds: float = 0.0
    hosts: int = 1
    host: int = 0
    coordinator: str = ""


def environment(pool: RunPool, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What one of the pool's processes finds around it: its platform, and on a CPU as many devices as it stands for."""
    made = dict(base)
    platform = pool.target.chip.jax_platform
    assert platform is not None, "the run file's check lets no other pool through"
    made["JAX_PLATFORMS"] = "cuda" if platform == "gpu" else platform
    if platform == "cpu":
        kept = [flag for flag in made.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
        made["XLA_FLAGS"] = " ".join([*kept, f"--xla_force_host_platform_device_count={pool.devices // pool.hosts}"])
        made.setdefault("GLIBC_TUNABLES", KEEP_MEMORY)
    return made


class TrainerProcess:
    """A running trainer; one process for each host of its pool. `events` has what its first process says, in order.

    on_log: called with each line of standard error, without the newline.
    """

    def __init__(self, assignment: Assignment, pool: RunPool, on_log: Callable[[str], None]) -> None:
        self.events: queue.Queue[dict[str, Any]] = queue.Queue()
        self.last_lines: deque[str] = deque(maxlen=20)
        self._on_log = on_log
        self._processes: list[subprocess.Popen[bytes]] = []
        coordinator = f"127.0.0.1:{_free_port()}" if pool.hosts > 1 else ""
        self._readers: list[threading.Thread] = []
        for host in range(pool.hosts):
            # A session of its own: Ctrl-C in a terminal reaches the controller only, which lets the trainer commit.
            process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment(pool),
                start_new_session=True,
            )
            self._processes.append(process)
            told = asdict(assignment) | {"hosts": pool.hosts, "host": host, "coordinator": coordinator}
            _tell(process, told)
            assert process.stdout is not None and process.stderr is not None
            self._read(process.stdout, self._event if host == 0 else self._ignore)
            self._read(process.stderr, self._log)

    @property
    def pid(self) -> int:
        """Of the first process."""
        return self._processes[0].pid

    @property
    def pids(self) -> list[int]:
        """Of all its processes, the first one first."""
        return [process.pid for process in self._processes]

    def poll(self) -> int | None:
        """How the trainer ended, None while it runs. It has ended when any of its processes has."""
        codes = [process.poll() for process in self._processes]
        ended = [code for code in codes if code is not None]
        if not ended:
            return None
        if codes[0] is None and all(code in (FINISHED, STOPPED) for code in ended):
            return None  # the first process still commits
        return next((code for code in codes if code not in (None, FINISHED)), FINISHED)

    def wait(self, seconds: float) -> int | None:
        """`poll`, after up to `seconds`."""
        end = time.monotonic() + seconds
        while (code := self.poll()) is None and time.monotonic() < end:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._processes[0].wait(min(0.05, seconds))
        return code

    def stop(self) -> None:
        """Asks the trainer to commit what it has and end."""
        self._signal(self._processes[:1], signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL for every process, waited for; what they said until then is in `events`."""
        self._signal(self._processes, signal.SIGKILL)
        for process in self._processes:
            process.wait()
        self.close()

    def close(self) -> None:
        """Once it has ended: no process is left, the last words are read."""
        self._signal([p for p in self._processes if p.poll() is None], signal.SIGKILL)
        for process in self._processes:
            process.wait()
            if process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
        for reader in self._readers:
            reader.join(timeout=5)

    def last_line(self) -> str:
        """The last thing the trainer wrote to standard error, the best hint when it died without a word."""
        return self.last_lines[-1] if self.last_lines else "it said nothing"

    def _read(self, pipe: IO[bytes], line: Callable[[str], None]) -> None:
        def lines() -> None:
            with pipe:
                for raw in pipe:
                    line(raw.decode("utf-8", "replace").rstrip("\r\n"))

        reader = threading.Thread(target=lines, daemon=True)
        reader.start()
        self._readers.append(reader)

    def _event(self, line: str) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            self.events.put(event)
        else:
            self._log(line)  # a library that prints: not for us, but not to be lost

    def _log(self, line: str) -> None:
        if line.strip():
            self.last_lines.append(line.strip())
            self._on_log(line)

    def _ignore(self, line: str) -> None:
        """The other hosts say the same."""

    @staticmethod
    def _signal(processes: list[subprocess.Popen[bytes]], number: int) -> None:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)


def _tell(process: subprocess.Popen[bytes], told: dict[str, Any]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died at once; its exit code says so
        process.stdin.write(json.dumps(told).encode() + b"\n")
        process.stdin.flush()  # and left open: the process ends when it closes


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port
