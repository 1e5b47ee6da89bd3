"""Why there is no plan: an irreducible set of constraints that conflict, and the least that would have to give."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from anypool.plan.placement.columns import Group
from anypool.plan.placement.problem import Problem
from anypool.plan.placement.program import build, groups
from anypool.plan.placement.solver import Answer, run

_AMOUNTS = ("budget", "megawatts", "megawatts_in", "chips", "chips_in")
_HALVINGS = 20
# From how many of one kind on they are told in one.
_MANY = 5
_OF = {"chips": "pools", "price": "pools", "watts": "pools", "chips_in": "regions", "megawatts_in": "regions"}


@dataclass(frozen=True)
class Relaxation:
    """One change after which there is a plan. amount, unit: how much, None for a rule that has to go.

    part: the amount as a part of the limit that is there, to compare changes of different kinds.
    """

    group: Group
    words: str
    amount: float | None = None
    unit: str = ""
    part: float | None = None


@dataclass(frozen=True)
class Explanation:
    """conflict: constraints that cannot hold together, and could if any one of them went.

    irreducible: False where the time ended first, so that one of them may not belong. relaxations: single changes
    that each suffice, the smallest first. together: what suffices together where no single change does.
    all_tried: False where the time ended before every single change had been tried.
    """

    conflict: tuple[Group, ...]
    conflict_words: tuple[str, ...]
    irreducible: bool
    relaxations: tuple[Relaxation, ...]
    together: tuple[Relaxation, ...] = ()
    all_tried: bool = True
    seconds: float = 0.0

    def words(self) -> str:
        """A few sentences for a person."""
        doubt = "" if self.irreducible else " (not narrowed down to the end: the time was up)"
        untried = "" if self.all_tried else " Not every change was tried: the time was up."
        text = f"These cannot all hold{doubt}: " + "; ".join(self._conflict()) + "."
        if self.relaxations:
            helps = " Any of these would do: " + ", or ".join(each.words for each in self.relaxations) + "."
        elif self.together:
            helps = " This together would do: " + ", and ".join(each.words for each in self.together) + "."
        else:
            helps = " No change that was tried would do."
        return text + helps + untried

    def _conflict(self) -> list[str]:
        """The constraints, many of one kind in one part."""
        words = []
        for kind in dict.fromkeys(group.kind for group in self.conflict):
            same = [index for index, group in enumerate(self.conflict) if group.kind == kind]
            if len(same) <= _MANY:
                words += [self.conflict_words[index] for index in same]
                continue
            names = ", ".join(self.conflict[index].name for index in same[:_MANY])
            words.append(f"{kind} of {len(same)} {_OF.get(kind, 'jobs')} ({names} and {len(same) - _MANY} more)")
        return words


def explain(problem: Problem, *, seconds: float = 60.0) -> Explanation | None:
    """Why `problem` has no plan; None if it has one, or if the time ended before it was known."""
    clock = _Clock(problem, time.perf_counter() + seconds)
    start = time.perf_counter()
    everything = groups(problem)
    if clock.possible(()) is not False:
        return None
    conflict = _irreducible(everything, lambda kept: clock.possible(set(everything) - set(kept)) is False)
    irreducible = not clock.unknown
    clock.unknown = False
    # What is bought is asked for first, as a job less is the last thing a person wants and takes longest to work out.
    order = sorted(conflict, key=lambda group: (group.kind == "demand", group.kind not in _AMOUNTS, group))
    singles = tuple(found for group in order if (found := _relax(clock, group)) is not None)
    all_tried = not clock.unknown
    singles = tuple(sorted(singles, key=lambda each: math.inf if each.part is None else each.part))
    together = () if singles else _together(clock, conflict)
    return Explanation(
        conflict=tuple(conflict),
        conflict_words=tuple(in_words(problem, group) for group in conflict),
        irreducible=irreducible,
        relaxations=singles,
        together=together,
        all_tried=all_tried,
        seconds=time.perf_counter() - start,
    )


def in_words(problem: Problem, group: Group) -> str:
    """A constraint with its numbers."""
    limits = problem.limits
    name = group.name
    if group.kind in ("chips", "price", "watts"):
        pool = problem.pool(name)
        return {
            "chips": f"pool {name!r} has {pool.chips} chips",
            "price": f"the price of pool {name!r} is not known, and money counts (committed: {pool.committed_chips})",
            "watts": f"the power of pool {name!r} is not known, and power counts",
        }[group.kind]
    if group.kind in ("budget", "megawatts", "megawatts_in", "chips_in", "grid"):
        return {
            "budget": f"the budget is {limits.budget_usd or 0:,.0f} USD",
            "megawatts": f"there are {limits.megawatts or 0:g} MW",
            "megawatts_in": f"region {name!r} has {limits.megawatts_by_region.get(name, 0):g} MW",
            "chips_in": f"region {name!r} may use {limits.chips_by_region.get(name, 0)} chips",
            "grid": f"the carbon of region {name!r} is not known",
        }[group.kind]
    job = problem.job(name)
    if group.kind == "demand":
        if job.kind == "serve":
            return f"job {name!r} needs {job.tokens_per_second:,.0f} tokens/s{_nowhere(problem, name)}"
        hours = (job.deadline_seconds or problem.hours * 3600) / 3600
        return f"job {name!r} needs {job.tokens:,.0f} tokens in {hours:g} h{_nowhere(problem, name)}"
    return {
        "survival": f"job {name!r} survives the loss of any {' or '.join(problem.losses)}",
        "residency": f"job {name!r} may run in {', '.join(job.regions)} only",
        "tier": f"job {name!r} needs tier {job.min_tier}",
        "roles": f"job {name!r} needs pools for {', '.join(job.needs_roles)}",
        "latency": f"job {name!r} wants its first token in {job.time_to_first_token_seconds} s",
    }[group.kind]


def _nowhere(problem: Problem, job: str) -> str:
    """What is known of a job that has a rate on few pools only."""
    able = [pool.name for pool in problem.pools if (job, pool.name) in problem.rate_of]
    # A job that most pools can run is not short of pools.
    if 2 * len(able) > len(problem.pools):
        return ""
    why = {each.pool: each.reason for each in problem.no_rates if each.job == job}
    unable = [pool.name for pool in problem.pools if pool.name not in able]
    reasons = [f"{pool}: {why.get(pool, 'no rate was given')}" for pool in unable[:3]]
    more = f" and {len(unable) - 3} more" if len(unable) > 3 else ""
    return f" (has a rate on {len(able)} of {len(problem.pools)} pools; {'; '.join(reasons)}{more})"


class _Clock:
    """Asks the solver whether something is possible, until the time ends."""

    def __init__(self, problem: Problem, end: float) -> None:
        self.problem, self.end, self.unknown = problem, end, False

    def left(self) -> float:
        return max(0.01, self.end - time.perf_counter())

    def possible(self, dropped: Collection[Group], demand: dict[str, float] | None = None) -> bool | None:
        """None if the time ended before it was known."""
        if time.perf_counter() > self.end:
            self.unknown = True
            return None
        answer = run(build(self.problem, dropped=dropped, demand=demand), {}, gap=0.5, seconds=self.left())
        if answer.values is None and not answer.infeasible:
            self.unknown = True
            return None
        return answer.values is not None

    def least(self, elastic: Sequence[Group]) -> tuple[Answer, dict[Group, float]]:
        """The smallest excess over these limits, each counted as a part of its limit."""
        program = build(self.problem, elastic=elastic)
        cost = {index: 1 / _limit(self.problem, group) for group, index in program.slack.items()}
        answer = run(program, cost, gap=0.001, seconds=self.left())
        if answer.values is None:
            self.unknown |= not answer.infeasible
            return answer, {}
        return answer, {group: float(answer.values[index]) for group, index in program.slack.items()}


def _irreducible(everything: Sequence[Group], conflicts: Callable[[list[Group]], bool]) -> list[Group]:
    """A set that conflicts, of which every proper subset does not (QuickXplain, Junker 2004): few questions where the
    set is small among many constraints."""

    def narrow(background: list[Group], new: bool, candidates: list[Group]) -> list[Group]:
        if new and conflicts(background):
            return []
        if len(candidates) == 1:
            return candidates
        half = len(candidates) // 2
        first, second = candidates[:half], candidates[half:]
        from_second = narrow(background + first, bool(first), second)
        from_first = narrow(background + from_second, bool(from_second), first)
        return from_first + from_second

    return sorted(narrow([], False, list(everything)))


def _relax(clock: _Clock, group: Group) -> Relaxation | None:
    """The least change of one constraint after which there is a plan; None if none of that kind is enough."""
    problem = clock.problem
    if group.kind in _AMOUNTS:
        answer, excess = clock.least([group])
        if answer.values is None:
            return None
        return _amount(problem, group, excess[group])
    if clock.possible([group]) is not True:
        return None
    name = group.name
    if group.kind != "demand":
        words = {
            "survival": _dropped(group),
            "residency": f"let job {name!r} run elsewhere",
            "tier": f"let job {name!r} run on a lower tier",
            "roles": f"let job {name!r} run on pools without those roles",
            "latency": f"allow job {name!r} a later first token",
            "price": f"find out the price of pool {name!r}",
            "watts": f"find out the power of pool {name!r}",
            "grid": f"find out the carbon of region {name!r}",
        }[group.kind]
        return Relaxation(group, words)
    return _less_demand(clock, group)


def _less_demand(clock: _Clock, group: Group) -> Relaxation:
    """How much of its demand can be met, by halving; the whole job has to go where nothing can."""
    job = clock.problem.job(group.name)
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if clock.possible((), {job.name: middle}):
            low = middle
        else:
            high = middle
    if not low:
        return Relaxation(group, _dropped(group), part=1.0)
    if job.kind == "serve":
        assert job.tokens_per_second is not None
        amount = job.tokens_per_second * (1 - low)
        words = f"{_round_up(amount)} tokens/s less of job {job.name!r}"
        return Relaxation(group, words, amount, "tokens/s", 1 - low)
    hours = (job.deadline_seconds or clock.problem.hours * 3600) / 3600 * (1 / low - 1)
    return Relaxation(group, f"{_round_up(hours)} h more for job {job.name!r}", hours, "h", 1 / low - 1)


def _amount(problem: Problem, group: Group, excess: float) -> Relaxation:
    """An excess in the unit of its limit, rounded up so that it is enough."""
    name = group.name
    if group.kind == "chips":
        excess = round(excess) * problem.pool(name).slice_chips
    part = excess / _limit(problem, group, chips=True)
    unit, where = {
        "budget": ("USD", ""),
        "megawatts": ("MW", ""),
        "megawatts_in": ("MW", f" in {name!r}"),
        "chips": ("chips", f" in pool {name!r}"),
        "chips_in": ("chips", f" in {name!r}"),
    }[group.kind]
    return Relaxation(group, f"{_round_up(excess)} {unit} more{where}", excess, unit, part)


def _together(clock: _Clock, conflict: Sequence[Group]) -> tuple[Relaxation, ...]:
    """The smallest excess over all limits of amounts at once, where that is enough; else nothing."""
    elastic = [group for group in groups(clock.problem) if group.kind in _AMOUNTS]
    answer, excess = clock.least(elastic)
    if answer.values is None:
        return _drop_all(clock, conflict)
    return tuple(_amount(clock.problem, group, value) for group, value in excess.items() if value > 1e-6)


def _drop_all(clock: _Clock, conflict: Sequence[Group]) -> tuple[Relaxation, ...]:
    """Survivals to give up, or jobs to leave out, each from a conflict of its own, until there is a plan."""
    everything = groups(clock.problem)
    gone: set[Group] = set()
    found = list(conflict)
    while True:
        # Without its survival a job still runs: that is given up before the job is.
        softest = [group for kind in ("survival", "demand") for group in found if group.kind == kind]
        if not softest:
            return ()
        gone.add(softest[0])
        possible = clock.possible(gone)
        if possible is None:
            return ()
        if possible:
            return tuple(Relaxation(group, _dropped(group)) for group in sorted(gone))
        rest = [group for group in everything if group not in gone]
        found = _irreducible(rest, lambda kept: clock.possible(set(everything) - set(kept)) is False)


def _dropped(group: Group) -> str:
    return f"drop the survival of job {group.name!r}" if group.kind == "survival" else f"drop job {group.name!r}"


def _limit(problem: Problem, group: Group, chips: bool = False) -> float:
    """What the limit is now; 1 where it is nothing. Pools count slices, or chips where asked to."""
    limits = problem.limits
    if group.kind == "chips":
        pool = problem.pool(group.name)
        return float(pool.chips if chips else pool.chips // pool.slice_chips)
    now = {
        "budget": limits.budget_usd,
        "megawatts": limits.megawatts,
        "megawatts_in": limits.megawatts_by_region.get(group.name),
        "chips_in": limits.chips_by_region.get(group.name),
    }[group.kind]
    return float(now or 1.0)


def _round_up(amount: float) -> str:
    """Three digits, rounded up so that it is enough; to the hundred-thousandth part that halving leaves open."""
    amount *= 1 - 1e-5
    if amount >= 1000:
        return f"{math.ceil(amount):,}"
    digits = 2 - math.floor(math.log10(amount)) if amount > 0 else 0
    return f"{math.ceil(amount * 10**digits) / 10**digits:g}"
