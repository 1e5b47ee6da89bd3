"""Every second and dollar of a run, in exactly one place. README.md defines each category."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from anypool.train.report.lines import PoolFacts
from anypool.train.report.rates import peak_flops
from anypool.train.report.reading import Epoch, RunRecord, last_kept

CATEGORIES = (
    "compute",
    "lost work",
    "compile",
    "checkpoint",
    "restore",
    "gate",
    "data",
    "evaluate",
    "start-up",
    "detect",
    "idle",
)
OVERLAP = "overlap"
"""Time of a trainer while another one held the run: no part of the run's own time, but paid for."""

_Interval = tuple[int, int, str]


@dataclass(frozen=True)
class Cost:
    """Dollars. complete: False where some price was not known; then it is at least so much."""

    usd: float
    complete: bool

    def __str__(self) -> str:
        if self.complete:
            return f"${self.usd:,.2f}"
        return f"at least ${self.usd:,.2f}" if self.usd else "unknown price"


@dataclass
class PoolAccount:
    """What the run did on one pool, at one size and price. nanoseconds: by category, and of OVERLAP.

    unpaid_ns: of those, between trainers that stopped on purpose: the pool was free for others.
    tokens, tokens_lost: of steps that count, and of those that do not; steps likewise.
    """

    pool: PoolFacts
    nanoseconds: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    unpaid_ns: int = 0
    tokens: int = 0
    tokens_lost: int = 0
    steps: int = 0
    steps_lost: int = 0
    flops: float | None = 0.0
    peak_flop_seconds: float | None = 0.0

    def seconds(self, category: str) -> float:
        return self.nanoseconds.get(category, 0) / 1e9

    def cost(self, category: str | None = None) -> Cost:
        """Of one category or of OVERLAP; of all of them if none is named."""
        names = (*CATEGORIES, OVERLAP) if category is None else (category,)
        paid_ns = sum(self.nanoseconds.get(name, 0) for name in names) - (self.unpaid_ns if "idle" in names else 0)
        rate = self.pool.usd_per_second
        if rate is None:
            return Cost(0.0, complete=paid_ns == 0)
        return Cost(paid_ns / 1e9 * rate, complete=True)

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation of compute that counts; None where FLOPs or the chip's peak are not known."""
        return _ratio(self.flops, self.peak_flop_seconds)


@dataclass(frozen=True)
class Account:
    """A run's account, from the start of its first trainer's process to `end_ns`.

    end_ns: the last sign of life; of a trainer that runs, its last line. Nanoseconds of all categories of all pools sum
    to `end_ns - start_ns` exactly.
    """

    start_ns: int
    end_ns: int
    pools: tuple[PoolAccount, ...]

    @property
    def wall_ns(self) -> int:
        return self.end_ns - self.start_ns

    def nanoseconds(self, category: str) -> int:
        return sum(pool.nanoseconds.get(category, 0) for pool in self.pools)

    def seconds(self, category: str) -> float:
        return self.nanoseconds(category) / 1e9

    def cost(self, category: str | None = None) -> Cost:
        """Of one category or of OVERLAP; of all of them if none is named."""
        costs = [pool.cost(category) for pool in self.pools]
        return Cost(sum(cost.usd for cost in costs), all(cost.complete for cost in costs))

    @property
    def goodput(self) -> float | None:
        """The share of the time that was compute of steps that count; None for a run of no time."""
        return self.nanoseconds("compute") / self.wall_ns if self.wall_ns else None

    @property
    def tokens(self) -> int:
        """Of steps that count, once each."""
        return sum(pool.tokens for pool in self.pools)

    @property
    def tokens_lost(self) -> int:
        return sum(pool.tokens_lost for pool in self.pools)

    @property
    def steps(self) -> int:
        return sum(pool.steps for pool in self.pools)

    @property
    def steps_lost(self) -> int:
        return sum(pool.steps_lost for pool in self.pools)

    @property
    def tokens_per_compute_second(self) -> float | None:
        return _ratio(self.tokens, self.seconds("compute"))

    @property
    def tokens_per_wall_second(self) -> float | None:
        return _ratio(self.tokens, self.wall_ns / 1e9)

    @property
    def mfu(self) -> float | None:
        """Over all pools that computed; None where FLOPs or a peak are not known for one of them."""
        worked = [pool for pool in self.pools if pool.tokens]
        flops, peaks = [pool.flops for pool in worked], [pool.peak_flop_seconds for pool in worked]
        if None in flops or None in peaks:
            return None
        return _ratio(sum(value for value in flops if value), sum(value for value in peaks if value))

    def as_json(self) -> dict[str, Any]:
        """All of it, for a report."""
        return {
            "start_seconds": self.start_ns / 1e9,
            "end_seconds": self.end_ns / 1e9,
            "wall_seconds": self.wall_ns / 1e9,
            "goodput": self.goodput,
            "mfu": self.mfu,
            "tokens": self.tokens,
            "tokens_lost": self.tokens_lost,
            "steps": self.steps,
            "steps_lost": self.steps_lost,
            "tokens_per_compute_second": self.tokens_per_compute_second,
            "tokens_per_wall_second": self.tokens_per_wall_second,
            "usd": self.cost().usd,
            "usd_complete": self.cost().complete,
            "seconds": {name: self.seconds(name) for name in (*CATEGORIES, OVERLAP)},
            "pools": [
                {
                    "name": pool.pool.name,
                    "chip": pool.pool.chip,
                    "chips": pool.pool.chips,
                    "usd_per_chip_hour": pool.pool.usd_per_chip_hour,
                    "usd": pool.cost().usd,
                    "usd_complete": pool.cost().complete,
                    "mfu": pool.mfu,
                    "tokens": pool.tokens,
                    "seconds": {name: pool.seconds(name) for name in (*CATEGORIES, OVERLAP)},
                }
                for pool in self.pools
            ],
        }


def account(record: RunRecord, *, now_ns: int | None = None) -> Account:
    """Every second of a run in one category of one pool.

    now_ns: the present time, to tell a last trainer that runs from one that is dead.
    """
    now_ns = time.time_ns() if now_ns is None else now_ns
    epochs = record.epochs
    if not epochs:
        return Account(now_ns, now_ns, ())
    limits = last_kept(epochs)
    pools: dict[PoolFacts, PoolAccount] = {}
    start = cursor = min(epoch.started_ns for epoch in epochs[:1])
    for place, epoch in enumerate(epochs):
        following = epochs[place + 1] if place + 1 < len(epochs) else None
        running = following is None and runs(epoch, now_ns)
        entry = pools.setdefault(epoch.pool, PoolAccount(epoch.pool))
        begin = max(cursor, epoch.started_ns)
        if place and begin > cursor:
            previous = epochs[place - 1]
            _gap(pools[previous.pool], begin - cursor, stopped=previous.stopped is not None)
        end = epoch.last_line_ns if running and epoch.times else epoch.last_sign_ns
        if epoch.ended is not None:
            end = epoch.last_line_ns
        if following is not None:
            end = min(end, following.held_ns)
        cursor = max(begin, end)
        intervals = list(_intervals(epoch, limits[epoch.number], running=running))
        for first, last, category in _cover(intervals, begin, cursor):
            entry.nanoseconds[category] += last - first
        inside = sum(max(0, min(last, cursor) - max(first, begin)) for first, last, _ in intervals)
        entry.nanoseconds[OVERLAP] += sum(last - first for first, last, _ in intervals) - inside
        _count(entry, epoch, limits[epoch.number])
    return Account(start, cursor, tuple(pools.values()))


def runs(epoch: Epoch, now_ns: int) -> bool:
    """Whether the trainer of the last epoch lives: it did not stop, and gave a sign within its lease's time."""
    return epoch.stopped is None and now_ns - epoch.last_sign_ns <= epoch.run.lease_seconds * 1e9


def _gap(previous: PoolAccount, nanoseconds: int, *, stopped: bool) -> None:
    previous.nanoseconds["idle" if stopped else "detect"] += nanoseconds
    if stopped:
        previous.unpaid_ns += nanoseconds


def _intervals(epoch: Epoch, limit: float, *, running: bool) -> Iterator[_Interval]:
    """Stretches of an epoch's recorded time in order, none overlapping another, each with its category.

    Compute up to the end of a step is the step's. What follows the last step is in progress if the trainer runs, and
    lost if it does not.
    """
    cursor = epoch.started_ns
    pending: list[_Interval] = []
    for place, line in enumerate(epoch.times):
        at = line.start_ns
        for phase, length in line.spans:
            first, last = max(at, cursor), at + length
            at += length
            if last > first:
                if phase == "compute":
                    pending.append((first, last, "compute"))
                else:
                    yield first, last, phase
                cursor = last
        if line.step is not None:
            counts = line.step <= limit and place not in epoch.redone
            yield from pending if counts else _lost(pending)
            pending = []
    yield from pending if running else _lost(pending)


def _lost(intervals: Iterable[_Interval]) -> list[_Interval]:
    return [(first, last, "lost work") for first, last, _ in intervals]


def _cover(intervals: list[_Interval], begin: int, end: int) -> Iterator[_Interval]:
    """What of the intervals is between begin and end; what no interval tells is lost work, or start-up if none does."""
    cursor = begin
    untold = "lost work" if intervals else "start-up"
    for first, last, category in sorted(intervals):
        inside, until = max(first, cursor), min(last, end)
        if until <= inside:
            continue
        if inside > cursor:
            yield cursor, inside, untold
        yield inside, until, category
        cursor = until
    if end > cursor:
        yield cursor, end, untold


def _count(entry: PoolAccount, epoch: Epoch, limit: float) -> None:
    """Steps and tokens, and what the model's FLOPs were measured against."""
    tokens = compute_ns = compute_of_step_ns = 0
    for place, line in enumerate(epoch.times):
        compute_of_step_ns += sum(length for phase, length in line.spans if phase == "compute")
        if line.step is None:
            continue
        if line.step <= limit and place not in epoch.redone:
            tokens += line.tokens
            compute_ns += compute_of_step_ns
            entry.steps += 1
        else:
            entry.tokens_lost += line.tokens
            entry.steps_lost += 1
        compute_of_step_ns = 0
    entry.tokens += tokens
    if not tokens:
        return
    flops, peak = epoch.run.flops_per_token, peak_flops(epoch.pool, epoch.run.compute_dtype)
    entry.flops = None if flops is None or entry.flops is None else entry.flops + flops * tokens
    known = peak is not None and entry.peak_flop_seconds is not None
    entry.peak_flop_seconds = (entry.peak_flop_seconds or 0) + (peak or 0) * compute_ns / 1e9 if known else None


def _ratio(value: float | None, by: float | None) -> float | None:
    return None if value is None or not by else value / by
