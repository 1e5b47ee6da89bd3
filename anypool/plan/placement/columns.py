"""In which ways a job can run on a pool, and which rules stand against it.

A column is one such way: so many chips for so long. Training and unsplit serving have columns to take or leave;
serving that may split has one column a pool, taken as many times as there are replicas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from anypool.plan.placement.problem import Job, PoolOffer, Problem, Rate

# When the finishing time is what counts, a training job may take any number of slices; beyond so many, a geometric
# choice of them.
MOST_SIZES = 24
_ROUNDING = 1e-9


@dataclass(frozen=True, order=True)
class Group:
    """A constraint as a person would name it. `name`: the job, pool or region it is about, "" for all."""

    kind: str
    name: str = ""


@dataclass(frozen=True)
class Column:
    """chips, hours: of one count. share: which part of the demand one count meets. most: how many make sense."""

    job: str
    pool: str
    chips: int
    hours: float
    share: float
    most: int


@dataclass(frozen=True)
class Loss:
    """One vendor, provider or region is gone."""

    scope: str
    name: str
    pools: frozenset[str]

    @property
    def label(self) -> str:
        return f"{self.scope} {self.name}"


def losses(problem: Problem) -> tuple[Loss, ...]:
    """Every loss the survivors must stand, one by one."""
    found = []
    for scope in problem.losses:
        for name in sorted({pool.of(scope) for pool in problem.pools}):
            gone = frozenset(pool.name for pool in problem.pools if pool.of(scope) == name)
            found.append(Loss(scope, name, gone))
    return tuple(found)


def needs_price(problem: Problem) -> bool:
    """Whether a pool without a price can be used only as far as it is committed."""
    return problem.objective == "cost" or problem.limits.budget_usd is not None


def needs_watts(problem: Problem, pool: PoolOffer) -> bool:
    """Whether a pool of unknown power cannot be used at all."""
    limits = problem.limits
    limited = limits.megawatts is not None or pool.region in limits.megawatts_by_region
    return limited or problem.objective in ("energy", "carbon")


def unknowns(problem: Problem, pool: PoolOffer) -> frozenset[Group]:
    """What is not known of a pool and forbids its use, even as a reserve."""
    found = set()
    if pool.watts_per_chip is None and needs_watts(problem, pool):
        found.add(Group("watts", pool.name))
    if problem.objective == "carbon" and pool.region not in problem.limits.grams_co2_per_kwh:
        found.add(Group("grid", pool.region))
    return frozenset(found)


def rules_against(problem: Problem, job: Job, pool: PoolOffer, rate: Rate) -> frozenset[Group]:
    """The rules that forbid this pair, whatever the number of chips."""
    against = set()
    if job.regions and pool.region not in job.regions:
        against.add(Group("residency", job.name))
    if pool.tier < job.min_tier:
        against.add(Group("tier", job.name))
    if not set(job.needs_roles) <= set(pool.roles):
        against.add(Group("roles", job.name))
    limit = job.time_to_first_token_seconds
    # A rate without a time to first token is no proof that the limit is met.
    if limit is not None and (rate.time_to_first_token_seconds is None or rate.time_to_first_token_seconds > limit):
        against.add(Group("latency", job.name))
    return frozenset(against | unknowns(problem, pool))


def columns(
    problem: Problem, job: Job, pool: PoolOffer, *, demand: float = 1.0, capped: bool = True, sizes: bool = False
) -> Iterator[Column]:
    """The ways in which `job` can run on `pool`, leaving the rules aside; none where there is no rate.

    demand: the part of its demand to be met. capped: no more than the pool's chips.
    sizes: offer training jobs more than the fewest chips that meet the deadline.
    """
    rate = problem.rate_of.get((job.name, pool.name))
    if rate is None:
        return
    speed = used_rate(problem, rate)
    most_chips = pool.chips if capped else 10**9
    if job.kind == "train":
        assert job.tokens is not None
        seconds = job.deadline_seconds or problem.hours * 3600
        fewest = max(_slices(job.tokens * demand / (speed * seconds), pool), _slices(rate.min_chips, pool))
        limit = min(most_chips, rate.max_chips or most_chips) // pool.slice_chips
        for count in _sizes(fewest, limit if sizes else min(fewest, limit)):
            chips = count * pool.slice_chips
            yield Column(job.name, pool.name, chips, job.tokens / (speed * chips) / 3600, 1.0, 1)
        return
    assert job.tokens_per_second is not None
    replica = _slices(rate.min_chips, pool) * pool.slice_chips
    share = replica * speed / job.tokens_per_second
    needed = max(1, math.ceil(demand / share - _ROUNDING))
    if job.may_split:
        most = min(needed, most_chips // replica)
        if most:
            yield Column(job.name, pool.name, replica, problem.hours, share, most)
    elif needed * replica <= most_chips:
        yield Column(job.name, pool.name, needed * replica, problem.hours, 1.0, 1)


def used_rate(problem: Problem, rate: Rate) -> float:
    """The tokens a second of a chip that the problem plans with."""
    if problem.rates_used == "low" and rate.low is not None:
        return rate.low
    return rate.tokens_per_second_per_chip


def _slices(chips: float, pool: PoolOffer) -> int:
    return max(1, math.ceil(chips / pool.slice_chips - _ROUNDING))


def _sizes(fewest: int, most: int) -> list[int]:
    if most < fewest:
        return []
    if most - fewest < MOST_SIZES:
        return list(range(fewest, most + 1))
    ratio = (most / fewest) ** (1 / (MOST_SIZES - 1))
    return sorted({round(fewest * ratio**step) for step in range(MOST_SIZES)})
