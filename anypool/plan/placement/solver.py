"""From a problem to a plan: the programme is solved, what it says becomes a plan, and the plan is audited."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from anypool.plan.placement.audit import Use, at_risk, audit, bill
from anypool.plan.placement.errors import AuditError, NoPlanError, NoPlanFoundError, member, number
from anypool.plan.placement.exhaustive import count_plans, enumerate_best
from anypool.plan.placement.plan import Assignment, Failover, Plan, Reserve
from anypool.plan.placement.problem import Problem
from anypool.plan.placement.program import Program, build

Uses = tuple[Use, ...]
Losses = dict[str, Uses]
# Up to so many plans are tried one by one; more go to the solver.
FEW_PLANS = 500


@dataclass(frozen=True)
class Options:
    """gap: how far from the best a plan may be, as a part of its value. seconds: when to stop with what there is.

    method: "auto" enumerates where there are few plans and solves otherwise.
    """

    gap: float = 0.01
    seconds: float = 120.0
    method: Literal["auto", "milp", "enumeration"] = "auto"

    def __post_init__(self) -> None:
        number("options", "gap", self.gap, 0, 0.5, "", "a part, 0.01 is one percent")
        number("options", "seconds", self.seconds, 0.01, 86400, "s", "60 is usual")
        member("options", "method", self.method, ("auto", "milp", "enumeration"))


@dataclass(frozen=True)
class Answer:
    """What the solver said. values: None where it found nothing. bound: no solution has less."""

    values: Any
    bound: float
    infeasible: bool


def solve(problem: Problem, options: Options | None = None) -> Plan:
    """The best plan for `problem`, to within `options.gap`, or the best found in `options.seconds`.

    Raises NoPlanError if there is none (see `explain`), NoPlanFoundError if the time ended before one was found.
    """
    options = options or Options()
    start = time.perf_counter()
    few = options.method == "auto" and count_plans(problem, FEW_PLANS) is not None
    if few or options.method == "enumeration":
        found = enumerate_best(problem)
        if found is None:
            raise NoPlanError("no plan meets all constraints: every one was tried; explain() says what conflicts")
        uses, reserve, after, dropped = found
        seconds = time.perf_counter() - start
        return make_plan(
            problem, uses, reserve, after, dropped, bound=None, method="enumeration", seconds=seconds, options=options
        )
    return _by_programme(problem, options, start)


def _by_programme(problem: Problem, options: Options, start: float) -> Plan:
    def left() -> float:
        return max(0.01, options.seconds - (time.perf_counter() - start))

    at_least, best_drop = None, True
    if any(not job.required for job in problem.jobs):
        at_least, best_drop = _most_placed(problem, options.seconds / 3)
    program = build(problem, at_least=at_least)
    answer = run(program, program.cost, gap=options.gap, seconds=left())
    if answer.infeasible:
        raise NoPlanError("no plan meets all constraints; explain() says which conflict and what would help")
    if answer.values is None:
        raise NoPlanFoundError(
            f"no plan was found in {options.seconds:g} s, and none is proven impossible: allow more seconds"
        )
    values = answer.values
    if problem.objective == "finish":
        values = _fewest_chips(problem, program, values, at_least, min(left(), options.seconds / 5))
    uses, reserve, after, dropped = read(problem, program, values)
    seconds = time.perf_counter() - start
    plan = make_plan(
        problem, uses, reserve, after, dropped, bound=answer.bound, method="milp", seconds=seconds, options=options
    )
    return replace(plan, best_drop=best_drop)


def run(program: Program, cost: Mapping[int, float], *, gap: float, seconds: float) -> Answer:
    """Minimises `cost` over the programme. Deterministic but for the time limit."""
    rows = program.rows
    if not program.low:
        # The solver takes no programme without variables: nothing can run anywhere, which is enough or not.
        infeasible = any(row[1] > 0 or row[2] < 0 for row in rows)
        return Answer(None if infeasible else np.zeros(0), 0.0, infeasible)
    vector = np.zeros(len(program.low))
    for index, value in cost.items():
        vector[index] = value
    # The solver's tolerances are absolute: costs of millions and of cents are brought to the same size.
    scale = float(np.abs(vector).max()) or 1.0
    constraints = LinearConstraint(program.matrix(), [row[1] for row in rows], [row[2] for row in rows])
    result = milp(
        vector / scale,
        integrality=program.whole,
        bounds=Bounds(program.low, program.high),
        constraints=constraints,
        options={"mip_rel_gap": gap, "time_limit": seconds, "presolve": True},
    )
    if result.status not in (0, 1, 2):
        # Neither solved, nor out of time, nor infeasible: bounds and rows of ours are always finite below.
        raise NoPlanFoundError(f"the solver gave up: {result.message}")
    bound = result.mip_dual_bound if result.mip_dual_bound is not None else -math.inf
    if result.x is not None and not np.any(vector):
        bound = 0.0
    return Answer(result.x, float(bound) * scale, infeasible=result.status == 2)


def _most_placed(problem: Problem, seconds: float) -> tuple[float, bool]:
    """The largest sum of priorities that can be placed, and whether that is proven."""
    program = build(problem)
    cost = {index: -problem.job(name).priority for name, index in program.placed.items()}
    answer = run(program, cost, gap=1e-6, seconds=seconds)
    if answer.infeasible:
        raise NoPlanError("no plan meets all constraints, even with every job dropped that need not run")
    if answer.values is None:
        return 0.0, False
    placed = sum(-value for index, value in cost.items() if answer.values[index] > 0.5)
    return placed, placed >= -answer.bound - 1e-6


def _fewest_chips(problem: Problem, program: Program, values: Any, at_least: float | None, seconds: float) -> Any:
    """As fast a plan with no more chips than it needs: speed alone leaves that open."""
    tight = build(problem, at_least=at_least)
    value = sum(weight * round(values[index]) for index, weight in program.cost.items())
    scale = max(1.0, abs(value))
    tight.row({index: weight / scale for index, weight in tight.cost.items()}, high=value / scale * (1 + 1e-9))
    chips = {index: float(column.chips) for index, column in tight.taken.items()}
    chips |= {index: float(problem.pool(pool).slice_chips) for pool, index in tight.held.items()}
    answer = run(tight, chips, gap=0.01, seconds=seconds)
    return values if answer.values is None else answer.values


def read(problem: Problem, program: Program, values: Any) -> tuple[Uses, dict[str, int], Losses, tuple[str, ...]]:
    """Uses, reserve, failovers by loss and dropped jobs, from the solver's numbers."""
    dropped = tuple(name for name, index in program.placed.items() if values[index] < 0.5)
    counts: dict[tuple[str, str], int] = {}
    met: dict[tuple[str, str], float] = {}
    for index, column in program.taken.items():
        count = round(values[index])
        if count and column.job not in dropped:
            counts[column.job, column.pool] = count * column.chips
            met[column.job, column.pool] = count * column.share
    uses = tuple(Use(job, pool, chips) for (job, pool), chips in counts.items())
    # The programme leaves open whether a survivor takes more than it needs, as that costs nothing: it does not here.
    by_need: dict[tuple[str, str], list[tuple[str, int, float, int]]] = {}
    have: dict[tuple[str, str], float] = {}
    for index, (loss, column) in program.failover.items():
        key = (loss.label, column.job)
        if key not in have:
            have[key] = sum(part for (job, pool), part in met.items() if job == column.job and pool not in loss.pools)
        count = round(values[index])
        if count and column.job not in dropped:
            by_need.setdefault(key, []).append((column.pool, column.chips, column.share, count))
    after: dict[str, list[Use]] = {}
    for (label, name), moved in by_need.items():
        job = problem.job(name)
        need = (job.surviving_share if job.may_split else 1.0) - have[label, name]
        for pool, chips, share, count in sorted(moved, key=lambda each: -each[2] * each[3]):
            taken = min(count, max(0, math.ceil(need / share - 1e-9)))
            need -= taken * share
            if taken:
                after.setdefault(label, []).append(Use(name, pool, taken * chips))
    reserve = _reserve(problem, program, values, uses, after)
    return uses, reserve, {label: tuple(moved) for label, moved in after.items()}, dropped


def _reserve(
    problem: Problem, program: Program, values: Any, uses: Uses, after: Mapping[str, Sequence[Use]]
) -> dict[str, int]:
    """What is held, no more than some loss asks for: where holding costs nothing the programme leaves that open."""
    giving_way = {job.name for job in problem.jobs if job.kind == "serve" and not job.survives}
    reserve = {}
    for name, index in program.held.items():
        size = problem.pool(name).slice_chips
        giving = sum(use.chips for use in uses if use.pool == name and use.job in giving_way)
        moved = [sum(use.chips for use in each if use.pool == name) for each in after.values()]
        chips = min(round(values[index]) * size, max(0, -(-(max(moved, default=0) - giving) // size) * size))
        if chips:
            reserve[name] = chips
    return reserve


def make_plan(
    problem: Problem,
    uses: Sequence[Use],
    reserve: Mapping[str, int],
    after: Mapping[str, Sequence[Use]],
    dropped: Sequence[str],
    *,
    bound: float | None,
    method: str,
    seconds: float,
    options: Options,
) -> Plan:
    """The plan with its figures, audited. bound: None where nothing less is possible. Raises AuditError."""
    figures = bill(problem, uses, reserve)
    value = figures.value
    lowest = value if bound is None else min(bound, value)
    # Costs are never negative: a solver that ran out of time may not even know that.
    lowest = max(lowest, 0.0)
    gap = (value - lowest) / value if value else 0.0
    assignments = [
        Assignment(
            job=use.job,
            pool=use.pool,
            chips=use.chips,
            replicas=_replicas(problem, use),
            hours=figures.hours[index],
            tokens_per_second=figures.speeds[index],
            committed_chips=figures.committed[index],
            usd=figures.usd[index],
            kwh=figures.kwh[index],
            kg_co2=figures.kg_co2[index],
        )
        for index, use in enumerate(uses)
    ]
    plan = Plan(
        objective=problem.objective,
        value=value,
        bound=lowest,
        gap=gap,
        wanted_gap=options.gap,
        proven=gap <= options.gap + 1e-9,
        method=method,
        seconds=seconds,
        assignments=tuple(assignments),
        failovers=tuple(
            Failover(loss, use.job, use.pool, use.chips, _replicas(problem, use))
            for loss, moved in after.items()
            for use in moved
        ),
        reserves=tuple(
            Reserve(pool, chips, usd) for (pool, chips), usd in zip(reserve.items(), figures.reserve_usd, strict=True)
        ),
        dropped=tuple(dropped),
        usd=figures.total_usd,
        kwh=figures.total_kwh,
        kg_co2=figures.total_kg_co2,
        megawatts=figures.megawatts,
        chips=sum(use.chips for use in uses) + sum(reserve.values()),
        moves=tuple(figures.moves),
        at_risk=at_risk(problem, uses),
    )
    broken = audit(problem, plan)
    if broken:
        raise AuditError("the plan breaks its own problem: " + "; ".join(each.words for each in broken))
    return plan


def _replicas(problem: Problem, use: Use) -> int:
    if problem.job(use.job).kind == "train":
        return 1
    rate, pool = problem.rate_of[use.job, use.pool], problem.pool(use.pool)
    return use.chips // (-(-rate.min_chips // pool.slice_chips) * pool.slice_chips)
