"""What a figure needs to be worth keeping: percentiles, the machine, the versions, the date."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np


def percentiles(seconds: Sequence[float], *, largest: bool = False) -> dict[str, float | None]:
    """p50 and p95, and with `largest` also max, in milliseconds; None where nothing was measured."""
    points = {"p50": 50, "p95": 95} | ({"max": 100} if largest else {})
    if not seconds:
        return dict.fromkeys(points)
    return {name: round(1000 * float(np.percentile(seconds, point)), 2) for name, point in points.items()}


def circumstances(*packages: str) -> dict[str, Any]:
    """Where and when something is measured, and with which versions of Python, of ours and of `packages`.

    Call it before measuring: the load average then tells who else was at work on the machine.
    """
    versions = {"python": platform.python_version()}
    versions |= {package: metadata.version(package) for package in ("anypool", "jax", "jaxlib", *packages)}
    return {
        "machine": {
            "cpu": _cpu(),
            "cores": cores(),
            "system": f"{platform.system()} {platform.machine()}",
            "load_average_before": round(os.getloadavg()[0], 2),
        },
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
