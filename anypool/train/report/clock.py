"""One clock for a process: time since 1970 that never steps back, and when the process itself began."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

Clock = Callable[[], int]
"""Nanoseconds since 1970, never less than at the call before."""


def steady_clock() -> Clock:
    """The system's time as it is now, going on with the monotonic clock: setting the system's clock moves nothing."""
    ahead = time.time_ns() - time.monotonic_ns()
    return lambda: time.monotonic_ns() + ahead


def process_started_ns(now_ns: int) -> int:
    """When this process began, as Linux knows it; elsewhere `now_ns`.

    `now_ns` is the present time. Source: proc(5), /proc/self/stat field 22 (ticks from boot) and /proc/uptime.
    """
    try:
        # The command's name stands in brackets and may hold spaces and brackets of its own.
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime_seconds = float(Path("/proc/uptime").read_text().split()[0])
        age_seconds = uptime_seconds - int(after_name[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return now_ns
    return now_ns - max(0, round(age_seconds * 1e9))
