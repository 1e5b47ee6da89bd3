"""A plan: who runs where, what it comes to, and how good it is proven to be."""

from __future__ import annotations

from dataclasses import dataclass

from anypool.plan.placement.problem import UNITS, Objective


@dataclass(frozen=True)
class Assignment:
    """A job on a pool. hours: how long it holds the chips. committed_chips: how many of them are paid already.

    usd is None where chips of unknown price are used; kwh and kg_co2 where the power or the grid is not known.
    """

    job: str
    pool: str
    chips: int
    replicas: int
    hours: float
    tokens_per_second: float
    committed_chips: int
    usd: float | None
    kwh: float | None
    kg_co2: float | None


@dataclass(frozen=True)
class Failover:
    """Chips a surviving job takes on a pool after a loss ("vendor nvidia"), beside those it has left."""

    loss: str
    job: str
    pool: str
    chips: int
    replicas: int


@dataclass(frozen=True)
class Reserve:
    """Chips held idle for the survivors."""

    pool: str
    chips: int
    usd: float | None


@dataclass(frozen=True)
class Plan:
    """A plan that passed `audit`.

    value: of the objective, in `unit`, penalties for moves included. bound: no plan can have less.
    gap: (value - bound) / value. proven: whether the gap is at most `wanted_gap`; otherwise the time ended first.
    dropped: jobs left out, all of them not required. best_drop: whether it is proven that no more could be placed.
    usd, kwh, kg_co2: None where a part is not known. moves: pairs that are new for jobs that ran before.
    at_risk: jobs whose demand is missed if every rate is at the lower end of its interval.
    """

    objective: Objective
    value: float
    bound: float
    gap: float
    wanted_gap: float
    proven: bool
    method: str
    seconds: float
    assignments: tuple[Assignment, ...]
    failovers: tuple[Failover, ...] = ()
    reserves: tuple[Reserve, ...] = ()
    dropped: tuple[str, ...] = ()
    best_drop: bool = True
    usd: float | None = None
    kwh: float | None = None
    kg_co2: float | None = None
    megawatts: float | None = None
    chips: int = 0
    moves: tuple[tuple[str, str], ...] = ()
    at_risk: tuple[str, ...] = ()

    @property
    def unit(self) -> str:
        """The unit of value and bound."""
        return UNITS[self.objective]

    @property
    def pools(self) -> tuple[str, ...]:
        """The pools where something runs, the one with most chips first."""
        chips: dict[str, int] = {}
        for each in self.assignments:
            chips[each.pool] = chips.get(each.pool, 0) + each.chips
        return tuple(sorted(chips, key=lambda pool: (-chips[pool], pool)))

    def of(self, job: str) -> tuple[Assignment, ...]:
        """Where a job runs; () if it was dropped."""
        return tuple(each for each in self.assignments if each.job == job)

    def how_good(self) -> str:
        """In words: what is proven about this plan. Never "optimal" where it is not."""
        if not self.proven:
            better = f"a better one may exist, by at most {self.gap:.2%} of its value"
            return f"the best found in {self.seconds:.0f} s; {better}"
        drop = "" if self.best_drop else "; whether fewer jobs need to be dropped is not known: the time ended"
        if self.method == "enumeration":
            return f"the best of all plans, by enumeration{drop}"
        return f"no plan is better by more than {self.gap:.2%} (asked for: {self.wanted_gap:.2%}){drop}"
