"""The mixed-integer programme of a placement problem, as arrays for `scipy.optimize.milp`.

README.md in this folder writes it out. Every row belongs to a `Group`; a programme can be built without some groups, or
with one or more of them elastic, which is how an infeasible problem is explained.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from anypool.plan.placement.columns import Column, Group, Loss, columns, losses, needs_price, rules_against, unknowns
from anypool.plan.placement.problem import Job, PoolOffer, Problem

Terms = dict[int, float]


@dataclass
class Program:
    """minimise `cost` over variables in low..high, with row_low <= matrix @ variables <= row_high.

    taken: variable of each column. failover: of each column in each loss. held: reserved slices by pool.
    placed: of each job that may be dropped. slack: of each elastic group, in the group's own unit.
    """

    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)
    cost: dict[int, float] = field(default_factory=dict)
    rows: list[tuple[Terms, float, float]] = field(default_factory=list)
    taken: dict[int, Column] = field(default_factory=dict)
    failover: dict[int, tuple[Loss, Column]] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    placed: dict[str, int] = field(default_factory=dict)
    slack: dict[Group, int] = field(default_factory=dict)

    def variable(self, high: float, *, whole: bool = False) -> int:
        self.low.append(0.0)
        self.high.append(high)
        self.whole.append(int(whole))
        return len(self.low) - 1

    def row(self, terms: Terms, low: float = -np.inf, high: float = np.inf) -> None:
        self.rows.append((terms, low, high))

    def matrix(self) -> Any:
        """The rows as a sparse matrix."""
        pointers = np.cumsum([0, *(len(terms) for terms, _, _ in self.rows)])
        indices = [index for terms, _, _ in self.rows for index in terms]
        values = [value for terms, _, _ in self.rows for value in terms.values()]
        return csr_array((values, indices, pointers), shape=(len(self.rows), len(self.low)))


def build(
    problem: Problem,
    *,
    dropped: Collection[Group] = (),
    elastic: Collection[Group] = (),
    demand: Mapping[str, float] | None = None,
    at_least: float | None = None,
) -> Program:
    """The programme of `problem`, its objective in `cost`.

    dropped: groups that are left out. elastic: groups of amounts (budget, megawatts, chips) that may be exceeded by
    their slack. demand: jobs of which a smaller part is to be met. at_least: the sum of priorities of the jobs placed
    among those that are not required.
    """
    return _Builder(problem, frozenset(dropped), frozenset(elastic), demand or {}, at_least).build()


def groups(problem: Problem) -> list[Group]:
    """Every constraint of the problem by name."""
    limits = problem.limits
    found = [Group("demand", job.name) for job in problem.jobs if job.required]
    found += [Group("survival", job.name) for job in problem.jobs if job.survives]
    found += [Group("chips", pool.name) for pool in problem.pools]
    found += [Group("chips_in", region) for region in limits.chips_by_region]
    found += [Group("megawatts_in", region) for region in limits.megawatts_by_region]
    found += [Group("megawatts")] if limits.megawatts is not None else []
    found += [Group("budget")] if limits.budget_usd is not None else []
    if needs_price(problem):
        found += [Group("price", pool.name) for pool in problem.pools if pool.usd_per_chip_hour is None]
    against = {
        group
        for rate in problem.rates
        for group in rules_against(problem, problem.job(rate.job), problem.pool(rate.pool), rate)
    }
    return found + sorted(against)


@dataclass
class _Builder:
    problem: Problem
    dropped: frozenset[Group]
    elastic: frozenset[Group]
    demand: Mapping[str, float]
    at_least: float | None

    def build(self) -> Program:
        self.program = Program()
        self.by_job: dict[str, list[int]] = {job.name: [] for job in self.problem.jobs}
        self.by_pool: dict[str, list[int]] = {pool.name: [] for pool in self.problem.pools}
        for group in sorted(self.elastic):
            self.program.slack[group] = self.program.variable(np.inf, whole=group.kind in ("chips", "chips_in"))
        for job in self.problem.jobs:
            for column in self._columns(job, self.demand.get(job.name, 1.0), self.problem.objective == "finish"):
                index = self.program.variable(column.most, whole=True)
                self.program.taken[index] = column
                self.by_job[job.name].append(index)
                self.by_pool[column.pool].append(index)
        for job in self.problem.jobs:
            self._demand(job)
        if self.problem.reserve == "held" and self.problem.losses:
            for pool in self.problem.pools:
                usable = unknowns(self.problem, pool) <= self.dropped
                slices = pool.chips // pool.slice_chips if usable else 0
                self.program.held[pool.name] = self.program.variable(slices, whole=True)
        self._limits(self._use_now(), self.problem.pools)
        for loss in losses(self.problem):
            self._survive(loss)
        self._money()
        self._objective()
        if self.at_least is not None:
            priority = {index: self.problem.job(name).priority for name, index in self.program.placed.items()}
            self.program.row(priority, low=self.at_least - 1e-6)
        return self.program

    def _columns(self, job: Job, demand: float, sizes: bool) -> Iterable[Column]:
        for pool in self.problem.pools:
            rate = self.problem.rate_of.get((job.name, pool.name))
            if rate is None or not rules_against(self.problem, job, pool, rate) <= self.dropped:
                continue
            group = Group("chips", pool.name)
            capped = group not in self.dropped and group not in self.elastic
            yield from columns(self.problem, job, pool, demand=demand, capped=capped, sizes=sizes)

    def _demand(self, job: Job) -> None:
        """What a job asks for is met, or the job is dropped where it may be."""
        if Group("demand", job.name) in self.dropped:
            return
        terms = {index: self.program.taken[index].share for index in self.by_job[job.name]}
        demand = self.demand.get(job.name, 1.0)
        if not job.required:
            index = self.program.variable(1, whole=True)
            self.program.placed[job.name] = index
            terms[index] = -1.0 if not job.may_split else -demand
        least = 0.0 if not job.required else demand if job.may_split else 1.0
        self.program.row(terms, low=least, high=np.inf if job.may_split else least)

    def _use_now(self) -> dict[str, Terms]:
        """By pool, what makes up the chips in use."""
        use = {
            pool: {index: float(self.program.taken[index].chips) for index in indices}
            for pool, indices in self.by_pool.items()
        }
        for pool, index in self.program.held.items():
            use[pool][index] = float(self.problem.pool(pool).slice_chips)
        return use

    def _limits(self, use: Mapping[str, Terms], pools: Iterable[PoolOffer]) -> None:
        """Chips of each pool and region, and megawatts, for what is in use at one time."""
        limits = self.problem.limits
        for pool in pools:
            self._at_most(Group("chips", pool.name), pool.chips, [(use[pool.name], 1.0)])
            if pool.usd_per_chip_hour is None and needs_price(self.problem):
                self._at_most(Group("price", pool.name), pool.committed_chips, [(use[pool.name], 1.0)])
        for region, chips in limits.chips_by_region.items():
            there = [(use[pool.name], 1.0) for pool in pools if pool.region == region]
            self._at_most(Group("chips_in", region), chips, there)
        for region, megawatts in limits.megawatts_by_region.items():
            there = [(use[pool.name], (pool.watts_per_chip or 0) / 1e6) for pool in pools if pool.region == region]
            self._at_most(Group("megawatts_in", region), megawatts, there)
        if limits.megawatts is not None:
            everywhere = [(use[pool.name], (pool.watts_per_chip or 0) / 1e6) for pool in pools]
            self._at_most(Group("megawatts"), limits.megawatts, everywhere)

    def _at_most(self, group: Group, limit: float, parts: Iterable[tuple[Terms, float]]) -> None:
        if group in self.dropped:
            return
        terms: Terms = {}
        for part, factor in parts:
            for index, value in part.items():
                terms[index] = terms.get(index, 0.0) + factor * value
        if not terms:
            return
        # Rows of money and power are scaled to their limit: the solver's tolerance is absolute.
        scale = 1.0 if group.kind in ("chips", "chips_in", "price") or not limit else limit
        terms = {index: value / scale for index, value in terms.items() if value}
        if group in self.program.slack:
            step = self.problem.pool(group.name).slice_chips if group.kind == "chips" else 1.0
            terms[self.program.slack[group]] = -step / scale
        self.program.row(terms, high=limit / scale)

    def _survive(self, loss: Loss) -> None:
        """After the loss: survivors stay where they are and move to where there is room; the others give way."""
        left = [pool for pool in self.problem.pools if pool.name not in loss.pools]
        survivors = [
            job
            for job in self.problem.jobs
            if job.survives and not {Group("survival", job.name), Group("demand", job.name)} & self.dropped
        ]
        new: dict[str, Terms] = {pool.name: {} for pool in left}
        for job in survivors:
            share = job.surviving_share * self.demand.get(job.name, 1.0)
            terms = dict.fromkeys(self.by_job[job.name], 1.0)
            if job.may_split:
                terms = {index: self.program.taken[index].share for index in self.by_job[job.name]}
            met = {index: value for index, value in terms.items() if self.program.taken[index].pool not in loss.pools}
            for column in self._columns(job, share, sizes=False):
                if column.pool in loss.pools:
                    continue
                index = self.program.variable(column.most, whole=True)
                self.program.failover[index] = (loss, column)
                met[index] = column.share
                new[column.pool][index] = float(column.chips)
            least = share if job.may_split else 1.0
            if job.name in self.program.placed:
                met[self.program.placed[job.name]] = -least
                least = 0.0
            self.program.row(met, low=least)
        staying = {job.name for job in survivors}
        use = {
            pool.name: {
                index: float(self.program.taken[index].chips)
                for index in self.by_pool[pool.name]
                if self.program.taken[index].job in staying
            }
            for pool in left
        }
        if self.program.held:
            self._from_reserve(new, left, staying)
        self._limits({name: terms | new[name] for name, terms in use.items()}, left)

    def _from_reserve(self, new: Mapping[str, Terms], left: Iterable[PoolOffer], staying: Collection[str]) -> None:
        """What moves fits into the reserve of its new pool and the chips of those who give way there.

        Only serving jobs count for that: a training job has its chips no longer than until it is done.
        """
        for pool in left:
            terms = dict(new[pool.name])
            if not terms:
                continue
            terms[self.program.held[pool.name]] = -float(pool.slice_chips)
            for index in self.by_pool[pool.name]:
                job = self.problem.job(self.program.taken[index].job)
                if job.kind == "serve" and job.name not in staying:
                    terms[index] = -float(self.program.taken[index].chips)
            self.program.row(terms, high=0.0)

    def _sum(self, per_chip_hour: Callable[[PoolOffer], float]) -> Terms:
        """A sum over all chip-hours, each weighted by its pool."""
        terms: Terms = {}
        for index, column in self.program.taken.items():
            terms[index] = per_chip_hour(self.problem.pool(column.pool)) * column.chips * column.hours
        for name, index in self.program.held.items():
            pool = self.problem.pool(name)
            terms[index] = per_chip_hour(pool) * pool.slice_chips * self.problem.hours
        return terms

    def _money(self) -> None:
        """The money spent, less what the commitments cover, and the budget."""
        spent = self._sum(lambda pool: pool.usd_per_chip_hour or 0.0)
        if not needs_price(self.problem):
            self.spent = spent
            return
        for pool in self.problem.pools:
            if pool.committed_chips and pool.usd_per_chip_hour is not None:
                self._commitment(pool, pool.usd_per_chip_hour, spent)
        self.spent = spent
        if self.problem.limits.budget_usd is not None:
            self._at_most(Group("budget"), self.problem.limits.budget_usd, [(spent, 1.0)])

    def _commitment(self, pool: PoolOffer, price: float, spent: Terms) -> None:
        """Committed chips go to whom they save most: chips of one job are covered for as long as it runs."""
        covered: Terms = {}
        always: Terms = {}
        for index in self.by_pool[pool.name]:
            column = self.program.taken[index]
            if self.problem.job(column.job).kind == "serve":
                always[index] = -float(column.chips)
                continue
            cover = self.program.variable(min(pool.committed_chips, column.chips))
            self.program.row({cover: 1.0, index: -float(column.chips)}, high=0.0)
            spent[cover] = -price * column.hours
            covered[cover] = 1.0
        if pool.name in self.program.held:
            always[self.program.held[pool.name]] = -float(pool.slice_chips)
        if always:
            cover = self.program.variable(pool.committed_chips)
            self.program.row({cover: 1.0} | always, high=0.0)
            spent[cover] = -price * self.problem.hours
            covered[cover] = 1.0
        if covered:
            self.program.row(covered, high=float(pool.committed_chips))

    def _objective(self) -> None:
        grams = self.problem.limits.grams_co2_per_kwh
        if self.problem.objective == "cost":
            cost = dict(self.spent)
        elif self.problem.objective == "energy":
            cost = self._sum(lambda pool: (pool.watts_per_chip or 0.0) / 1000)
        elif self.problem.objective == "carbon":
            cost = self._sum(lambda pool: (pool.watts_per_chip or 0.0) / 1000 * grams.get(pool.region, 0.0) / 1000)
        else:
            cost = {
                index: self.problem.job(column.job).priority * column.hours * 3600
                for index, column in self.program.taken.items()
                if self.problem.job(column.job).kind == "train"
            }
        self.program.cost = cost
        if self.problem.move_penalty:
            self._moves()

    def _moves(self) -> None:
        """A penalty on every pair that was not in the previous plan, of jobs that were."""
        previous = set(self.problem.previous)
        known = {job for job, _ in previous}
        for index, column in list(self.program.taken.items()):
            if column.job not in known or (column.job, column.pool) in previous:
                continue
            used = index
            if column.most > 1:
                used = self.program.variable(1, whole=True)
                self.program.row({index: 1.0, used: -float(column.most)}, high=0.0)
            self.program.cost[used] = self.program.cost.get(used, 0.0) + self.problem.move_penalty
