"""How large a gradient's norm may be before its step is skipped: times the median of the norms before it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

WINDOW = 64
LEAST = 16
"""Norms to have seen before there is a limit."""
LAG = 2
"""The limit of step s knows the norms up to step s - 2: those of s - 1 are still being computed when s is sent."""


class Spikes:
    """The limit of every step, from the norms of those before it: a function of the run's history alone.

    The history goes into checkpoints, so that a run that moved has the same limits as one that did not.
    """

    def __init__(self, factor: float | None, history: Iterable[tuple[int, float]] = ()) -> None:
        self.factor = factor
        self._norms: deque[tuple[int, float]] = deque(((int(s), float(n)) for s, n in history), maxlen=2 * WINDOW)

    def saw(self, step: int, norm: float, skipped: bool) -> None:
        """Notes the norm of a step; one that was skipped says nothing of what is usual."""
        if not skipped and math.isfinite(norm):
            self._norms.append((step, norm))

    def limit(self, step: int) -> float:
        """The largest norm that step `step` may have; infinite without a factor or enough history."""
        known = [norm for seen, norm in self._norms if seen <= step - LAG][-WINDOW:]
        if self.factor is None or len(known) < LEAST:
            return math.inf
        return self.factor * median(known)

    @property
    def history(self) -> list[tuple[int, float]]:
        return list(self._norms)
