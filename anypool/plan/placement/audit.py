"""A second opinion: every constraint and every figure of a plan, from the plan and the problem alone.

Nothing here is shared with the programme, not even how chips are counted: a mistake there must show here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from anypool.plan.placement.plan import Plan
from anypool.plan.placement.problem import Job, PoolOffer, Problem, Rate

# Of each limit: what floating point may take from it. The solver's own tolerance is a tenth of this.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Use:
    """A job on a pool, as far as the audit needs it."""

    job: str
    pool: str
    chips: int


@dataclass(frozen=True)
class Broken:
    """A constraint that does not hold."""

    what: str
    words: str


class Taking(Protocol):
    """An Assignment, a Failover or a Use."""

    @property
    def job(self) -> str: ...
    @property
    def pool(self) -> str: ...
    @property
    def chips(self) -> int: ...


@dataclass(frozen=True)
class Bill:
    """What a plan comes to. Lists follow the uses; None where a price, a power or a grid is not known."""

    value: float
    hours: list[float]
    speeds: list[float]
    committed: list[int]
    usd: list[float | None]
    kwh: list[float | None]
    kg_co2: list[float | None]
    reserve_usd: list[float | None]
    total_usd: float | None
    total_kwh: float | None
    total_kg_co2: float | None
    megawatts: float | None
    moves: list[tuple[str, str]]


def audit(problem: Problem, plan: Plan) -> tuple[Broken, ...]:
    """What is wrong with `plan`; () if nothing is: constraints, survival, every figure."""
    known_jobs = {job.name for job in problem.jobs}
    known_pools = {pool.name for pool in problem.pools}
    broken = [
        Broken("names", f"{kind} {name!r} is not in the problem")
        for kind, name, known in [
            *(("job", each.job, known_jobs) for each in plan.assignments),
            *(("job", each.job, known_jobs) for each in plan.failovers),
            *(("pool", each.pool, known_pools) for each in plan.assignments),
            *(("pool", each.pool, known_pools) for each in plan.failovers),
            *(("pool", each.pool, known_pools) for each in plan.reserves),
            *(("job", name, known_jobs) for name in plan.dropped),
        ]
        if name not in known
    ]
    if broken:
        return tuple(broken)
    reserve = {each.pool: each.chips for each in plan.reserves}
    broken += check(problem, plan.assignments, reserve, plan.dropped)
    after: dict[str, list[Taking]] = {}
    for each in plan.failovers:
        after.setdefault(each.loss, []).append(each)
    for scope in problem.losses:
        for name in sorted({pool.of(scope) for pool in problem.pools}):
            moved = after.pop(f"{scope} {name}", [])
            broken += check_loss(problem, plan.assignments, reserve, plan.dropped, (scope, name), moved)
    broken += [Broken("losses", f"failover after {loss!r}, which is no loss of the problem") for loss in after]
    if not broken:
        broken += _check_figures(problem, plan, bill(problem, plan.assignments, reserve))
    return tuple(broken)


def check(
    problem: Problem, uses: Sequence[Taking], reserve: Mapping[str, int], dropped: Iterable[str] = ()
) -> list[Broken]:
    """What is wrong before any loss, the figures aside."""
    dropped = set(dropped)
    broken = _pairs(problem, uses) + _reserves(problem, reserve)
    for job in problem.jobs:
        own = [use for use in uses if use.job == job.name]
        if job.name in dropped:
            if job.required:
                broken.append(Broken("demand", f"job {job.name!r} is required and was dropped"))
            if own:
                broken.append(Broken("demand", f"job {job.name!r} was dropped and runs on {own[0].pool!r}"))
        else:
            broken += _demand(problem, job, own, 1.0)
    if any(each.what == "pair" for each in broken):
        return broken
    chips = _chips_by_pool(problem, uses)
    for pool, held in reserve.items():
        chips[pool] += held
    broken += _places(problem, chips, "")
    budget = problem.limits.budget_usd
    if budget is not None:
        spent = bill(problem, uses, reserve).total_usd
        if spent is None or spent > budget * (1 + _TOLERANCE) + 1e-6:
            broken.append(Broken("budget", f"the plan spends {spent} USD of {budget:,.2f}"))
    return broken


def check_loss(
    problem: Problem,
    uses: Sequence[Taking],
    reserve: Mapping[str, int],
    dropped: Iterable[str],
    loss: tuple[Any, str],
    moved: Sequence[Taking],
) -> list[Broken]:
    """What is wrong after one (scope, name) is lost and survivors take `moved` beside what they have left."""
    scope, name = loss
    when = f" after the loss of {scope} {name}"
    survivors = {job.name for job in problem.jobs if job.survives and job.name not in set(dropped)}
    broken = _pairs(problem, moved)
    for use in moved:
        if problem.pool(use.pool).of(scope) == name:
            broken.append(Broken("survival", f"job {use.job!r} fails over to pool {use.pool!r}, which is lost{when}"))
        if use.job not in survivors:
            broken.append(Broken("survival", f"job {use.job!r} fails over and need not survive{when}"))
    left = [use for use in uses if problem.pool(use.pool).of(scope) != name]
    for job in problem.jobs:
        if job.name not in survivors:
            continue
        stayed = [use for use in left if use.job == job.name]
        new = [use for use in moved if use.job == job.name]
        if not job.may_split and stayed and new:
            broken.append(Broken("survival", f"job {job.name!r} keeps its pool and fails over all the same{when}"))
        broken += [
            Broken("survival", f"{each.words}{when}")
            for each in _demand(problem, job, [*stayed, *new], job.surviving_share)
        ]
    if any(each.what == "pair" for each in broken):
        return broken
    staying = [use for use in left if use.job in survivors]
    broken += _places(problem, _chips_by_pool(problem, [*staying, *moved]), when)
    if problem.reserve == "held":
        # A training job gives its chips back when it is done, and the loss may come after that.
        serving = [use for use in left if use.job not in survivors and problem.job(use.job).kind == "serve"]
        giving = _chips_by_pool(problem, serving)
        for pool, chips in _chips_by_pool(problem, moved).items():
            room = reserve.get(pool, 0) + giving[pool]
            if chips > room:
                broken.append(Broken("reserve", f"pool {pool!r}: {chips} chips are taken of {room} in reserve{when}"))
    return broken


def bill(problem: Problem, uses: Sequence[Taking], reserve: Mapping[str, int]) -> Bill:
    """What the uses and the reserve come to. A commitment covers whoever holds its chips longest."""
    hours = [_hours(problem, use) for use in uses]
    committed = _committed(problem, uses, hours, reserve)
    usd: list[float | None] = []
    kwh: list[float | None] = []
    carbon: list[float | None] = []
    for use, held, covered in zip(uses, hours, committed[: len(uses)], strict=True):
        pool = problem.pool(use.pool)
        usd.append(_paid(pool, use.chips - covered, held))
        kwh.append(None if pool.watts_per_chip is None else pool.watts_per_chip * use.chips * held / 1000)
        carbon.append(_carbon(problem, pool, kwh[-1]))
    reserve_usd: list[float | None] = []
    reserve_kwh: list[float | None] = []
    reserve_carbon: list[float | None] = []
    for (name, chips), covered in zip(reserve.items(), committed[len(uses) :], strict=True):
        pool = problem.pool(name)
        reserve_usd.append(_paid(pool, chips - covered, problem.hours))
        # A reserve is counted as if it drew full power: nobody knows what idle chips of every kind draw.
        reserve_kwh.append(None if pool.watts_per_chip is None else pool.watts_per_chip * chips * problem.hours / 1000)
        reserve_carbon.append(_carbon(problem, pool, reserve_kwh[-1]))
    before = {job for job, _ in problem.previous}
    moves = sorted({(use.job, use.pool) for use in uses if use.job in before} - set(problem.previous))
    totals = {
        "cost": _total([*usd, *reserve_usd]),
        "energy": _total([*kwh, *reserve_kwh]),
        "carbon": _total([*carbon, *reserve_carbon]),
        "finish": sum(
            problem.job(use.job).priority * held * 3600
            for use, held in zip(uses, hours, strict=True)
            if problem.job(use.job).kind == "train"
        ),
    }
    value = totals[problem.objective]
    everything = [*((use.pool, use.chips) for use in uses), *reserve.items()]
    watts = [None if (w := problem.pool(pool).watts_per_chip) is None else w * chips for pool, chips in everything]
    total_watts = _total(watts)
    return Bill(
        value=math.nan if value is None else value + problem.move_penalty * len(moves),
        hours=hours,
        speeds=[use.chips * _speed(problem, problem.rate_of[use.job, use.pool]) for use in uses],
        committed=committed[: len(uses)],
        usd=usd,
        kwh=kwh,
        kg_co2=carbon,
        reserve_usd=reserve_usd,
        total_usd=totals["cost"],
        total_kwh=totals["energy"],
        total_kg_co2=totals["carbon"],
        megawatts=None if total_watts is None else total_watts / 1e6,
        moves=moves,
    )


def at_risk(problem: Problem, uses: Sequence[Taking]) -> tuple[str, ...]:
    """Jobs that run, and miss their demand where every rate is at the lower end of its interval."""
    low = [rate.low if rate.low is not None else rate.tokens_per_second_per_chip for rate in problem.rates]
    slow = {(rate.job, rate.pool): value for rate, value in zip(problem.rates, low, strict=True)}
    late = []
    for job in problem.jobs:
        speed = sum(use.chips * slow[use.job, use.pool] for use in uses if use.job == job.name)
        if speed and speed < _needed(problem, job) * (1 - _TOLERANCE):
            late.append(job.name)
    return tuple(late)


def _pairs(problem: Problem, uses: Sequence[Taking]) -> list[Broken]:
    """Rules of a job and a pool."""
    broken = []
    if len({(use.job, use.pool) for use in uses}) < len(uses):
        broken.append(Broken("pair", "a job has two entries on one pool"))
    for use in uses:
        job, pool = problem.job(use.job), problem.pool(use.pool)
        rate = problem.rate_of.get((use.job, use.pool))
        pair = f"job {use.job!r} on pool {use.pool!r}"
        if rate is None:
            broken.append(Broken("pair", f"{pair}: there is no rate for that"))
            continue
        if use.chips <= 0 or use.chips % pool.slice_chips:
            broken.append(Broken("pair", f"{pair}: {use.chips} chips is no multiple of {pool.slice_chips}"))
        if use.chips < rate.min_chips:
            broken.append(Broken("pair", f"{pair}: {use.chips} chips, but the model needs {rate.min_chips}"))
        if job.kind == "serve" and use.chips % _replica(pool, rate):
            broken.append(Broken("pair", f"{pair}: {use.chips} chips are no whole replicas of {_replica(pool, rate)}"))
        if rate.max_chips is not None and use.chips > rate.max_chips:
            broken.append(Broken("pair", f"{pair}: {use.chips} chips, but its rate holds up to {rate.max_chips}"))
        if job.regions and pool.region not in job.regions:
            broken.append(Broken("residency", f"{pair}: region {pool.region!r} is not allowed"))
        if pool.tier < job.min_tier:
            broken.append(Broken("tier", f"{pair}: tier {pool.tier} is below {job.min_tier}"))
        missing = set(job.roles or (job.kind,)) - set(pool.roles)
        if missing:
            broken.append(Broken("roles", f"{pair}: the pool lacks {sorted(missing)}"))
        wanted = job.time_to_first_token_seconds
        first = rate.time_to_first_token_seconds
        if wanted is not None and (first is None or first > wanted):
            broken.append(Broken("latency", f"{pair}: first token after {first} s, allowed are {wanted}"))
        broken += _unknown(problem, pool, pair)
    return broken


def _reserves(problem: Problem, reserve: Mapping[str, int]) -> list[Broken]:
    if reserve and problem.reserve != "held":
        return [Broken("reserve", "chips are held, but the problem asks for none to be")]
    broken = []
    for name, chips in reserve.items():
        pool = problem.pool(name)
        if chips <= 0 or chips % pool.slice_chips:
            broken.append(Broken("reserve", f"pool {name!r}: {chips} chips held are no multiple of its slices"))
        broken += _unknown(problem, pool, f"the reserve on pool {name!r}")
    return broken


def _unknown(problem: Problem, pool: PoolOffer, what: str) -> list[Broken]:
    """Power and carbon that count and are not known."""
    broken = []
    limits = problem.limits
    power = limits.megawatts is not None or pool.region in limits.megawatts_by_region
    if pool.watts_per_chip is None and (power or problem.objective in ("energy", "carbon")):
        broken.append(Broken("watts", f"{what}: power counts here, and the pool's is not known"))
    if problem.objective == "carbon" and pool.region not in limits.grams_co2_per_kwh:
        broken.append(Broken("grid", f"{what}: the carbon of region {pool.region!r} is not known"))
    return broken


def _demand(problem: Problem, job: Job, own: Sequence[Taking], share: float) -> list[Broken]:
    pools = {use.pool for use in own}
    if len(pools) > 1 and not job.may_split:
        return [Broken("demand", f"job {job.name!r} runs on {len(pools)} pools and may not be split")]
    rates = [(use.chips, problem.rate_of.get((use.job, use.pool))) for use in own]
    speed = sum(chips * _speed(problem, rate) for chips, rate in rates if rate is not None)
    needed = _needed(problem, job) * share
    if speed < needed * (1 - _TOLERANCE):
        return [Broken("demand", f"job {job.name!r} gets {speed:,.3f} tokens/s of {needed:,.3f}")]
    return []


def _places(problem: Problem, chips: Mapping[str, int], when: str) -> list[Broken]:
    """Chips of pools and regions, prices that are not known, megawatts."""
    broken = []
    limits = problem.limits
    for pool in problem.pools:
        used = chips[pool.name]
        if used > pool.chips:
            broken.append(Broken("chips", f"pool {pool.name!r}: {used} chips of {pool.chips}{when}"))
        priced = problem.objective == "cost" or limits.budget_usd is not None
        if pool.usd_per_chip_hour is None and priced and used > pool.committed_chips:
            unpaid = f"{used} chips of {pool.committed_chips} committed, and beyond that its price is not known"
            broken.append(Broken("price", f"pool {pool.name!r}: {unpaid}{when}"))
    for region, most in limits.chips_by_region.items():
        used = sum(chips[pool.name] for pool in problem.pools if pool.region == region)
        if used > most:
            broken.append(Broken("chips_in", f"region {region!r}: {used} chips of {most}{when}"))
    power = {pool.name: chips[pool.name] * (pool.watts_per_chip or 0) / 1e6 for pool in problem.pools}
    for region, most_megawatts in limits.megawatts_by_region.items():
        drawn = sum(power[pool.name] for pool in problem.pools if pool.region == region)
        if drawn > most_megawatts * (1 + _TOLERANCE):
            broken.append(Broken("megawatts_in", f"region {region!r}: {drawn:.6f} MW of {most_megawatts:g}{when}"))
    if limits.megawatts is not None and sum(power.values()) > limits.megawatts * (1 + _TOLERANCE):
        drawn = sum(power.values())
        broken.append(Broken("megawatts", f"{drawn:.6f} MW of {limits.megawatts:g}{when}"))
    return broken


def _check_figures(problem: Problem, plan: Plan, found: Bill) -> list[Broken]:
    """The plan's own figures against the audit's."""
    pairs: list[tuple[str, float | None, float | None]] = [
        ("value", plan.value, found.value),
        ("usd", plan.usd, found.total_usd),
        ("kwh", plan.kwh, found.total_kwh),
        ("kg_co2", plan.kg_co2, found.total_kg_co2),
        ("megawatts", plan.megawatts, found.megawatts),
        ("chips", plan.chips, sum(use.chips for use in plan.assignments) + sum(each.chips for each in plan.reserves)),
        ("gap", plan.gap, (plan.value - plan.bound) / plan.value if plan.value else 0.0),
    ]
    for index, each in enumerate(plan.assignments):
        pairs += [
            (f"hours of {each.job!r} on {each.pool!r}", each.hours, found.hours[index]),
            (f"tokens_per_second of {each.job!r} on {each.pool!r}", each.tokens_per_second, found.speeds[index]),
            (f"committed_chips of {each.job!r} on {each.pool!r}", each.committed_chips, found.committed[index]),
            (f"usd of {each.job!r} on {each.pool!r}", each.usd, found.usd[index]),
            (f"kwh of {each.job!r} on {each.pool!r}", each.kwh, found.kwh[index]),
            (f"kg_co2 of {each.job!r} on {each.pool!r}", each.kg_co2, found.kg_co2[index]),
        ]
        replicas = 1
        if problem.job(each.job).kind == "serve":
            replicas = each.chips // _replica(problem.pool(each.pool), problem.rate_of[each.job, each.pool])
        pairs.append((f"replicas of {each.job!r} on {each.pool!r}", each.replicas, replicas))
    for held, usd in zip(plan.reserves, found.reserve_usd, strict=True):
        pairs.append((f"usd of the reserve on {held.pool!r}", held.usd, usd))
    broken = [
        Broken("figures", f"{name} is {said}, the audit finds {right}")
        for name, said, right in pairs
        if (said is None) != (right is None)
        or (said is not None and right is not None and not math.isclose(said, right, rel_tol=1e-6, abs_tol=1e-6))
    ]
    if plan.proven != (plan.gap <= plan.wanted_gap + 1e-9):
        broken.append(Broken("figures", f"proven = {plan.proven}, but the gap is {plan.gap:.4%}"))
    if list(plan.moves) != found.moves:
        broken.append(Broken("figures", f"moves = {plan.moves}, the audit finds {found.moves}"))
    if plan.at_risk != at_risk(problem, plan.assignments):
        broken.append(Broken("figures", f"at_risk = {plan.at_risk} is wrong"))
    return broken


def _committed(
    problem: Problem, uses: Sequence[Taking], hours: Sequence[float], reserve: Mapping[str, int]
) -> list[int]:
    """Committed chips of every use, then of every reserve. All jobs start together, so the longest are covered first:
    at any time as many chips are covered as there are in use, up to the commitment."""
    everything = [(use.pool, use.chips, held) for use, held in zip(uses, hours, strict=True)]
    everything += [(pool, chips, problem.hours) for pool, chips in reserve.items()]
    left = {pool.name: pool.committed_chips for pool in problem.pools}
    covered = [0] * len(everything)
    for index in sorted(range(len(everything)), key=lambda index: -everything[index][2]):
        pool, chips, _ = everything[index]
        covered[index] = min(chips, left[pool])
        left[pool] -= covered[index]
    return covered


def _paid(pool: PoolOffer, chips: int, hours: float) -> float | None:
    if chips == 0:
        return 0.0
    return None if pool.usd_per_chip_hour is None else pool.usd_per_chip_hour * chips * hours


def _carbon(problem: Problem, pool: PoolOffer, kwh: float | None) -> float | None:
    grams = problem.limits.grams_co2_per_kwh.get(pool.region)
    return None if kwh is None or grams is None else kwh * grams / 1000


def _total(parts: Iterable[float | None]) -> float | None:
    total = 0.0
    for part in parts:
        if part is None:
            return None
        total += part
    return total


def _chips_by_pool(problem: Problem, uses: Iterable[Taking]) -> dict[str, int]:
    chips = {pool.name: 0 for pool in problem.pools}
    for use in uses:
        chips[use.pool] += use.chips
    return chips


def _hours(problem: Problem, use: Taking) -> float:
    job = problem.job(use.job)
    if job.kind == "serve" or job.tokens is None:
        return problem.hours
    return job.tokens / (use.chips * _speed(problem, problem.rate_of[use.job, use.pool])) / 3600


def _needed(problem: Problem, job: Job) -> float:
    """The tokens a second a job needs."""
    if job.tokens_per_second is not None:
        return job.tokens_per_second
    assert job.tokens is not None
    return job.tokens / (job.deadline_seconds or problem.hours * 3600)


def _replica(pool: PoolOffer, rate: Rate) -> int:
    return -(-rate.min_chips // pool.slice_chips) * pool.slice_chips


def _speed(problem: Problem, rate: Rate) -> float:
    low = problem.rates_used == "low" and rate.low is not None
    return rate.low if low and rate.low is not None else rate.tokens_per_second_per_chip
