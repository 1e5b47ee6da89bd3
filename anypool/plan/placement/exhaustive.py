"""Every plan of a small problem, one by one: exact, and the truth that the programme is tested against.

Only `audit` decides what is allowed and what it costs. A job takes any multiple of a pool's slices; after each loss
every way to move is tried.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from anypool.plan.placement.audit import Use, bill, check, check_loss
from anypool.plan.placement.problem import Job, Problem

Way = tuple[Use, ...]
Found = tuple[Way, dict[str, int], dict[str, Way], tuple[str, ...]]


def count_plans(problem: Problem, most: int) -> int | None:
    """How many plans there are, losses and reserves aside; None if more than `most`.

    None too where jobs survive: what must be tried for each plan then multiplies.
    """
    if problem.losses:
        return None
    total = 1
    for job in problem.jobs:
        ways = 1
        for _, sizes in _sizes(problem, job):
            ways = ways * (len(sizes) + 1) if job.may_split else ways + len(sizes)
            if ways > most:
                return None
        total *= ways
        if total > most:
            return None
    return total


def enumerate_best(problem: Problem) -> Found | None:
    """Uses, reserve, failovers and dropped jobs of the best plan; None if there is none.

    The time grows with the product of all choices: for problems of a few jobs, pools and slices.
    """
    best: Found | None = None
    best_key: tuple[float, float, int] | None = None
    for ways in itertools.product(*(list(_ways(problem, job)) for job in problem.jobs)):
        uses = tuple(use for way in ways for use in way)
        dropped = tuple(job.name for job, way in zip(problem.jobs, ways, strict=True) if not way)
        if any(problem.job(name).required for name in dropped):
            continue
        missed = sum(problem.job(name).priority for name in dropped)
        # Without a reserve, nothing is cheaper.
        if best_key is not None and missed > best_key[0] + 1e-9:
            continue
        if check(problem, uses, {}, dropped):
            continue
        for reserve in _reserves(problem):
            if reserve and check(problem, uses, reserve, dropped):
                continue
            chips = sum(use.chips for use in uses) + sum(reserve.values())
            key = (round(missed, 9), round(bill(problem, uses, reserve).value, 9), chips)
            if best_key is not None and key >= best_key:
                continue
            after = _after_losses(problem, uses, reserve, dropped)
            if after is not None:
                best, best_key = (uses, reserve, after, dropped), key
    return best


def _sizes(problem: Problem, job: Job) -> list[tuple[str, list[int]]]:
    """By pool, the numbers of chips a job may take there."""
    found = []
    for pool in problem.pools:
        if (job.name, pool.name) in problem.rate_of:
            sizes = list(range(pool.slice_chips, pool.chips + 1, pool.slice_chips))
            sizes = [size for size in sizes if not check_pair(problem, Use(job.name, pool.name, size))]
            found.append((pool.name, sizes))
    return found


def check_pair(problem: Problem, use: Use) -> bool:
    """Whether a rule of the pair itself forbids this use."""
    kinds = {"pair", "residency", "tier", "roles", "latency", "watts", "grid", "chips"}
    others = [job.name for job in problem.jobs if job.name != use.job]
    return any(each.what in kinds for each in check(problem, [use], {}, others))


def _ways(problem: Problem, job: Job) -> Iterator[Way]:
    """Every way in which a job can run; () where it does not."""
    yield ()
    sizes = _sizes(problem, job)
    if not job.may_split:
        yield from ((Use(job.name, pool, size),) for pool, choices in sizes for size in choices)
        return
    for combination in itertools.product(*([0, *choices] for _, choices in sizes)):
        way = tuple(Use(job.name, pool, size) for (pool, _), size in zip(sizes, combination, strict=True) if size)
        if way:
            yield way


def _reserves(problem: Problem) -> Iterator[dict[str, int]]:
    if problem.reserve != "held" or not problem.losses:
        yield {}
        return
    choices = [range(0, pool.chips + 1, pool.slice_chips) for pool in problem.pools]
    for combination in itertools.product(*choices):
        yield {pool.name: chips for pool, chips in zip(problem.pools, combination, strict=True) if chips}


def _after_losses(
    problem: Problem, uses: Way, reserve: dict[str, int], dropped: Sequence[str]
) -> dict[str, Way] | None:
    """For every loss, how the survivors move; None if for one there is no way."""
    after = {}
    survivors = [job for job in problem.jobs if job.survives and job.name not in dropped]
    for scope in problem.losses:
        for name in sorted({pool.of(scope) for pool in problem.pools}):
            for ways in itertools.product(*(list(_ways(problem, job)) for job in survivors)):
                moved = tuple(use for way in ways for use in way)
                if not check_loss(problem, uses, reserve, dropped, (scope, name), moved):
                    if moved:
                        after[f"{scope} {name}"] = moved
                    break
            else:
                return None
    return after
