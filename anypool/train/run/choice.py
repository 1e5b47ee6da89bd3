"""Which pool a run goes to next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

FIRST_PAUSE_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 300.0


@dataclass
class PoolChoice:
    """The first pool, in the order of preference, that is not resting from a failure.

    A pool that failed rests for a while, twice as long after each failure without a commit between; one that was
    refused at the gate does not come back by itself. Times are of one monotonic clock, in seconds.
    """

    pools: Sequence[str]
    failures: dict[str, int] = field(default_factory=dict)
    rests_until: dict[str, float] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)

    def failed(self, pool: str, now: float) -> None:
        """Notes that the pool was lost."""
        self.failures[pool] = self.failures.get(pool, 0) + 1
        pause = min(FIRST_PAUSE_SECONDS * 2 ** (self.failures[pool] - 1), LONGEST_PAUSE_SECONDS)
        self.rests_until[pool] = now + pause

    def refuse(self, pool: str) -> None:
        """Notes that the pool may not hold the run."""
        self.refused.add(pool)

    def committed(self, pool: str) -> None:
        """Notes that the pool did something that lasts."""
        self.failures.pop(pool, None)

    def next(self, now: float) -> tuple[str, float] | None:
        """(pool, seconds to wait before it is started); None if every pool was refused."""
        left = [pool for pool in self.pools if pool not in self.refused]
        if not left:
            return None
        waits = {pool: max(0.0, self.rests_until.get(pool, 0.0) - now) for pool in left}
        best = min(left, key=lambda pool: (waits[pool] > 0, waits[pool]))
        return best, waits[best]
