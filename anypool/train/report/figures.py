"""How numbers are written for people: durations, rates, shares, dollars."""

from __future__ import annotations

import math
from datetime import UTC, datetime

UNKNOWN = "n/a"


def duration(seconds: float) -> str:
    """`8.2 s`, `3m 20s`, `5h 12m`, `3d 4h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if hours == 0:
        return f"{minutes}m {whole % 60:02d}s"
    if days == 0:
        return f"{hours}h {minutes % 60:02d}m"
    return f"{days}d {hours % 24}h"


def short(number: float) -> str:
    """`950`, `12.3k`, `4.56M`: three digits that matter."""
    for limit, unit in ((1e3, ""), (1e6, "k"), (1e9, "M"), (1e12, "G"), (1e15, "T")):
        if abs(number) < 0.9995 * limit:
            return f"{number * 1e3 / limit:.3g}{unit}"
    return f"{number:.3g}"


def share(value: float | None) -> str:
    """A share of 1 in percent."""
    return UNKNOWN if value is None else f"{value:.1%}"


def loss(value: float | None) -> str:
    """With as many digits as a difference between runs needs."""
    if value is None:
        return UNKNOWN
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def usd(value: float | None) -> str:
    """Dollars, with cents."""
    return UNKNOWN if value is None else f"${value:,.2f}"


def size(count: float) -> str:
    """`1.24 GB`: bytes in decimal units, as stores bill them."""
    digits = short(count)
    unit = digits[-1] if digits[-1].isalpha() else ""
    return f"{digits.removesuffix(unit)} {unit}B"


def moment(seconds: float | None) -> str:
    """A time since 1970, in UTC, because pools stand in many places."""
    return UNKNOWN if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def ago(seconds: float) -> str:
    """How long something is past."""
    return f"{duration(max(0.0, seconds))} ago"
