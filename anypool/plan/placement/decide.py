"""What a person decides with: the next best plans, what a little more of something is worth, what leaving costs.

Every answer here is a difference between two plans that are each known to within a gap only. So each comes with the
interval in which the true difference lies, and says so where it holds zero. A smaller `Options.gap` narrows it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from anypool.plan.placement.errors import NoPlanError, PlacementError, number
from anypool.plan.placement.plan import Plan
from anypool.plan.placement.problem import Problem, Scope
from anypool.plan.placement.solver import Options, solve

# Prices between which a pool's break-even is looked for, USD a chip-hour.
CHEAPEST, DEAREST = 0.001, 200.0


@dataclass(frozen=True)
class Span:
    """A difference, with the interval in which the true one lies."""

    value: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether its sign is proven."""
        return self.low > 0 or self.high < 0 or self.low == self.high

    def __str__(self) -> str:
        doubt = "" if self.known else ", not told from 0 at this gap"
        return f"{self.value:,.2f} ({self.low:,.2f} to {self.high:,.2f}{doubt})"


def span(before: Plan, after: Plan) -> Span:
    """How much more `after` costs than `before`: as found, and as it may be."""
    return Span(after.value - before.value, after.bound - before.value, after.value - before.bound)


@dataclass(frozen=True)
class Change:
    """A job whose place differs. Chips by pool, before and after; more: in the objective's unit, None if not known."""

    job: str
    before: dict[str, int]
    after: dict[str, int]
    more: float | None


@dataclass(frozen=True)
class Difference:
    """What becomes of a plan: the changed jobs, the costliest first, and all in all."""

    total: Span
    unit: str
    changes: tuple[Change, ...]

    def words(self, most: int = 3) -> str:
        """One sentence."""
        parts = []
        for change in self.changes[:most]:
            more = "" if change.more is None else f" ({change.more:+,.2f} {self.unit})"
            parts.append(f"{change.job} from {_places(change.before)} to {_places(change.after)}{more}")
        rest = f", and {len(self.changes) - most} more jobs" if len(self.changes) > most else ""
        return f"{self.total.value:+,.2f} {self.unit}: " + ("; ".join(parts) + rest if parts else "no job moves")


@dataclass(frozen=True)
class Alternative:
    """A plan that came second: which pool it does without, and why it lost."""

    without_pool: str
    plan: Plan
    difference: Difference

    def words(self) -> str:
        return f"without pool {self.without_pool!r}: {self.difference.words()}"


@dataclass(frozen=True)
class Shadow:
    """What a little more of a limit saves. saves: in the objective's unit, for `step` more of it."""

    limit: str
    step: float
    unit: str
    saves: Span

    @property
    def saves_per_unit(self) -> float:
        return self.saves.value / self.step


@dataclass(frozen=True)
class BreakEven:
    """At which price a pool comes into the plan.

    first: below this price some of it is used: 0 if not even for nothing, DEAREST if at any price.
    low: below this price it is proven to be used.
    free_chips: how many chips the plan takes for nothing. free: the average price at which all those break even.
    """

    pool: str
    first: float
    low: float
    free_chips: int
    free: float
    solves: int


@dataclass(frozen=True)
class LockIn:
    """What leaving costs, for the period: extra + porting_usd. None for extra: without it there is no plan.

    stranded_usd: commitments there that were used and would stand idle. They are paid either way and the best plan
    counts their chips as free, so `extra` holds what replacing them costs: adding them too would count them twice.
    """

    scope: Scope
    name: str
    extra: Span | None
    porting_usd: float
    stranded_usd: float
    difference: Difference | None

    @property
    def total_usd(self) -> float | None:
        return None if self.extra is None else self.extra.value + self.porting_usd


def difference(before: Plan, after: Plan) -> Difference:
    """What changes from one plan to another of the same objective."""
    if before.objective != after.objective:
        raise PlacementError(
            f"difference: {before.objective!r} and {after.objective!r}: compare plans of one objective"
        )
    changes = []
    for job in sorted({each.job for each in (*before.assignments, *after.assignments)}):
        old = {each.pool: each.chips for each in before.of(job)}
        new = {each.pool: each.chips for each in after.of(job)}
        if old != new:
            was, now = _worth(before, job), _worth(after, job)
            changes.append(Change(job, old, new, None if was is None or now is None else now - was))
    changes.sort(key=lambda change: -(change.more or 0.0))
    unit = before.unit
    return Difference(span(before, after), unit, tuple(changes))


def runner_ups(problem: Problem, best: Plan, options: Options | None = None, *, tries: int = 5) -> list[Alternative]:
    """The best plans that do without one of the pools of `best`, the cheapest first.

    Any plan that is not `best` with pools added does without one of them, so with enough `tries` the first is the true
    runner-up. The pools with most chips are tried first; a pool that cannot be missed gives none.
    """
    found = []
    for pool in best.pools[:tries]:
        try:
            plan = solve(problem.without(pool=pool), options)
        except NoPlanError:
            continue
        found.append(Alternative(pool, plan, difference(best, plan)))
    return sorted(found, key=lambda each: each.plan.value)


def shadow_prices(problem: Problem, best: Plan, options: Options | None = None, *, part: float = 0.05) -> list[Shadow]:
    """What a little more of every limit saves, the most telling first. Solves once for each limit.

    Integer plans have no exact prices: each is the difference to a plan with `part` more of the limit (at least one
    slice more, for the chips of a pool), and holds for that step only. Pools that are not full are left out.
    """
    number("shadow_prices", "part", part, 1e-4, 10, "", "0.05 is five percent more of each limit")
    used: dict[str, int] = {}
    for pool, chips in [*((a.pool, a.chips) for a in best.assignments), *((r.pool, r.chips) for r in best.reserves)]:
        used[pool] = used.get(pool, 0) + chips
    found = []
    for label, step, unit, more in _more(problem, part, used):
        plan = solve(more, options)
        difference_ = span(plan, best)
        found.append(Shadow(label, step, unit, difference_))
    return sorted(found, key=lambda each: -each.saves.value)


def break_even(problem: Problem, pool: str, options: Options | None = None, *, most_solves: int = 12) -> BreakEven:
    """The price of a chip-hour below which the plan uses `pool` beyond what is committed there.

    The least cost is a concave function of the price, so each plan that would use the pool gives a higher price at
    which that very plan breaks even (Newton's method; Dinkelbach 1967): a few solves instead of a bisection.
    Raises PlacementError where money is not the objective.
    """
    if problem.objective != "cost":
        raise PlacementError(f"break_even: objective = {problem.objective!r}: prices matter for 'cost'; use that")
    problem.pool(pool)
    base = solve(_priced(problem, pool, DEAREST), options)
    if _paid_hours(base, pool, DEAREST) > 0:
        taken = sum(each.chips - each.committed_chips for each in base.assignments if each.pool == pool)
        return BreakEven(pool, DEAREST, DEAREST, taken, DEAREST, 1)
    solves, price, first, low = 1, CHEAPEST, 0.0, 0.0
    free_chips, free = 0, 0.0
    while solves < most_solves:
        plan = solve(_priced(problem, pool, price), options)
        solves += 1
        hours = _paid_hours(plan, pool, price)
        if hours <= 0:
            break
        rest = plan.value - price * hours
        even = (base.value - rest) / hours
        if solves == 2:
            free_chips = sum(each.chips - each.committed_chips for each in plan.assignments if each.pool == pool)
            free_chips += sum(each.chips for each in plan.reserves if each.pool == pool)
            free = max(0.0, even)
        first = max(first, even)
        low = max(low, (base.bound - rest) / hours)
        if even <= price * (1 + 1e-6) or even >= DEAREST:
            break
        price = even
    return BreakEven(pool, min(first, DEAREST), max(0.0, low), free_chips, free, solves)


def lose(
    problem: Problem,
    plan: Plan,
    options: Options | None = None,
    *,
    move_penalty: float | None = None,
    **what: Any,
) -> tuple[Plan, Difference]:
    """Plans again without a vendor, provider, region or pool (`pool="x"`), and what that changes.

    Jobs that keep running would rather stay: each move costs `move_penalty` (None: what the problem says), which the
    new plan's value includes. Raises NoPlanError where nothing is left that meets all constraints.
    """
    left = problem.without(**what)
    pools = {pool.name for pool in left.pools}
    stay = tuple((each.job, each.pool) for each in plan.assignments if each.pool in pools)
    penalty = problem.move_penalty if move_penalty is None else move_penalty
    again = solve(replace(left, previous=stay, move_penalty=penalty), options)
    return again, difference(plan, again)


def lock_in(
    problem: Problem,
    best: Plan,
    options: Options | None = None,
    *,
    scope: Scope = "vendor",
    name: str,
    porting_usd: float = 0.0,
) -> LockIn:
    """What it costs to leave a vendor, provider or region: best plan without it - best plan + porting."""
    number("lock_in", "porting_usd", porting_usd, 0, 1e12, "USD", "what it costs to make the jobs run elsewhere")
    if problem.objective != "cost":
        raise PlacementError(f"lock_in: objective = {problem.objective!r}: it is counted in money; use 'cost'")
    stranded = 0.0
    for pool in problem.pools:
        if pool.of(scope) == name and pool.committed_chips:
            hours = sum(each.committed_chips * each.hours for each in best.assignments if each.pool == pool.name)
            stranded += pool.committed_usd * min(1.0, hours / (pool.committed_chips * problem.hours))
    try:
        plan = solve(problem.without(**{scope: name}), options)
    except NoPlanError:
        return LockIn(scope, name, None, porting_usd, stranded, None)
    change = difference(best, plan)
    return LockIn(scope, name, change.total, porting_usd, stranded, change)


def _more(problem: Problem, part: float, used: dict[str, int]) -> Iterable[tuple[str, float, str, Problem]]:
    """Every limit with a little more of it."""
    limits = problem.limits

    def with_limits(**changed: Any) -> Problem:
        return replace(problem, limits=replace(limits, **changed))

    if limits.budget_usd:
        step = part * limits.budget_usd
        yield "budget", step, "USD", with_limits(budget_usd=limits.budget_usd + step)
    if limits.megawatts:
        step = part * limits.megawatts
        yield "power", step, "MW", with_limits(megawatts=limits.megawatts + step)
    for region, megawatts in limits.megawatts_by_region.items():
        step = part * megawatts
        if step:
            by_region = {**limits.megawatts_by_region, region: megawatts + step}
            yield f"power in {region}", step, "MW", with_limits(megawatts_by_region=by_region)
    for region, chips in limits.chips_by_region.items():
        more = max(1, round(part * chips))
        by_region_chips = {**limits.chips_by_region, region: chips + more}
        yield (
            f"chips in {region}",
            more,
            "chips",
            with_limits(chips_by_region=by_region_chips),
        )
    for pool in problem.pools:
        if used.get(pool.name, 0) + pool.slice_chips > pool.chips:
            more = max(1, round(part * pool.chips / pool.slice_chips)) * pool.slice_chips
            larger = replace(pool, chips=pool.chips + more)
            pools = tuple(larger if each.name == pool.name else each for each in problem.pools)
            yield f"chips of pool {pool.name}", more, "chips", replace(problem, pools=pools)


def _priced(problem: Problem, pool: str, price: float) -> Problem:
    pools = tuple(replace(each, usd_per_chip_hour=price) if each.name == pool else each for each in problem.pools)
    return replace(problem, pools=pools)


def _paid_hours(plan: Plan, pool: str, price: float) -> float:
    """Chip-hours on a pool beyond its commitment."""
    paid = [each.usd or 0.0 for each in plan.assignments if each.pool == pool]
    paid += [each.usd or 0.0 for each in plan.reserves if each.pool == pool]
    return sum(paid) / price


def _worth(plan: Plan, job: str) -> float | None:
    """A job's part of the objective; None where it has none."""
    parts: list[float | None] = [
        {"cost": each.usd, "energy": each.kwh, "carbon": each.kg_co2, "finish": None}[plan.objective]
        for each in plan.of(job)
    ]
    total = 0.0
    for part in parts:
        if part is None:
            return None
        total += part
    return total


def _places(chips: dict[str, int]) -> str:
    return " + ".join(f"{count} chips of {pool}" for pool, count in sorted(chips.items())) or "nowhere"
