"""Child processes that compile: bounded in time and memory, several at once, with a log of each kept."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anypool.check.compilers import CompilerHome
from anypool.check.question import Question
from anypool.paths import cache_dir

POLL_SECONDS = 0.2
LOG_TAIL = 1500
COMMAND = (sys.executable, "-P", "-m", "anypool.check.child")
"""-P: a file in the user's folder that is called as a module of ours, or of Python's, is not taken for it."""

Stage = Callable[[str], None]
"""Called with what the process does next."""


@dataclass(frozen=True)
class Limits:
    """seconds and memory_bytes: of one process; it is killed beyond either."""

    seconds: float
    memory_bytes: int


@dataclass(frozen=True)
class Outcome:
    """What became of a process. answer: what it wrote, as far as it came. failure: why it did not finish, or None.

    peak_bytes: the most memory it was seen to hold. log: its standard error.
    """

    answer: dict[str, Any]
    failure: str | None
    seconds: float
    peak_bytes: int
    log: Path


def ask(question: Question, home: CompilerHome, limits: Limits, key: str, stage: Stage = lambda _: None) -> Outcome:
    """Answers a question in a process of its own. Never raises for what the compiler does."""
    folder = cache_dir() / "check"
    folder.mkdir(parents=True, exist_ok=True)
    log, answer = folder / f"{key}.log", folder / f"{key}.{os.getpid()}.answer"
    asked = {"question": question.as_json(), "platform": home.platform, "run_it": home.platform == "cpu"}
    start = time.monotonic()
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [*COMMAND, str(answer)],
            stdin=subprocess.PIPE,
            stdout=errors,
            stderr=errors,
            env=home.environment(question.devices),
            start_new_session=True,  # so that what it starts ends with it
        )
        _LIVE.add(process)
        try:
            _send(process, json.dumps(asked).encode())
            failure, peak = _watch(process, answer, start, limits, stage)
        finally:
            _end(process)
    known = _read(answer)
    answer.unlink(missing_ok=True)
    if failure is None and process.returncode:
        failure = _crash(process.returncode, known.get("stage", "starting"), log)
    return Outcome(known, failure, time.monotonic() - start, peak, log)


def stop_all() -> None:
    """Kills every process that is at work, so that those who wait for them can end."""
    for process in list(_LIVE):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


_LIVE: set[subprocess.Popen[bytes]] = set()


def _send(process: subprocess.Popen[bytes], data: bytes) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died at once; its exit code says so
        process.stdin.write(data + b"\n")
        process.stdin.flush()  # and left open: the process ends when it closes


def _watch(
    process: subprocess.Popen[bytes], answer: Path, start: float, limits: Limits, stage: Stage
) -> tuple[str | None, int]:
    """Waits for a process, telling its stages; (why it was killed or None, its peak memory)."""
    peak, shown = 0, ""
    while process.poll() is None:
        held = sum(resident_bytes(pid) for pid in family(process.pid))
        peak = max(peak, held)
        known = _read(answer).get("stage", "starting")
        if known != shown:
            shown = known
            stage(shown)
        if held > limits.memory_bytes:
            return f"stopped while {shown}: it held {held / 2**30:.1f} GiB, more than --memory-gib allows", peak
        if time.monotonic() - start > limits.seconds:
            return f"stopped while {shown}: not done after {limits.seconds:.0f} s (--timeout)", peak
        try:
            process.wait(POLL_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    return None, peak


def family(pid: int) -> list[int]:
    """A process and all that descend from it, as far as the system says (no /proc: itself)."""
    found = [pid]
    for parent in found:  # grows while it is read
        with contextlib.suppress(OSError, ValueError):
            for thread in Path(f"/proc/{parent}/task").iterdir():
                found += [int(child) for child in (thread / "children").read_text().split()]
    return found


def resident_bytes(pid: int) -> int:
    """Memory a process holds; 0 where the system does not say (no /proc) or when it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and whatever it started, and takes its exit code."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    _LIVE.discard(process)


def _read(answer: Path) -> dict[str, Any]:
    try:
        known: dict[str, Any] = json.loads(answer.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return known


def _crash(code: int, stage: str, log: Path) -> str:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    text = log.read_bytes()[-20_000:].decode(errors="replace")
    return f"the compiler's process {how} while {stage}: {last_words(text)}"


def last_words(text: str) -> str:
    """The line of a log that says most: the last exception's, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("For simplicity")]
    said = [
        line
        for line in lines
        if line.split(":")[0].rpartition(".")[2].endswith(("Error", "Exception")) and ": " in line
    ]
    return (said or lines or ["it said nothing"])[-1][:LOG_TAIL]


def available_bytes() -> int:
    """Memory that this machine could give now; 8 GiB where it does not say."""
    try:
        text = Path("/proc/meminfo").read_text()
        return int(text.partition("MemAvailable:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return 8 * 2**30
