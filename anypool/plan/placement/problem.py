"""What is to be placed: jobs, the pools on offer, how fast each would run on each, and the limits.

Everything is checked when it is made: what is here is a problem that makes sense, though perhaps one without an answer.
Units stand in the names. A missing number is None and never a guess; `columns.py` says what follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Literal

from anypool.plan.placement.errors import NowhereError, PlacementError, member, members, number, text, truth, whole
from anypool.pools.fleet import ROLES

Kind = Literal["train", "serve"]
Objective = Literal["cost", "energy", "carbon", "finish"]
Scope = Literal["vendor", "provider", "region"]
KINDS = ("train", "serve")
UNITS: dict[str, str] = {"cost": "USD", "energy": "kWh", "carbon": "kg CO2e", "finish": "weighted seconds"}
OBJECTIVES = tuple(UNITS)
SCOPES = ("vendor", "provider", "region")
TIERS = (0, 3)
YEAR_HOURS = 8784


@dataclass(frozen=True)
class Job:
    """One thing to run for the whole period (serve) or until it is done (train).

    tokens, deadline_seconds: of training; the deadline counts from the start of the period, None = the period's end.
    tokens_per_second: of serving, generated tokens. time_to_first_token_seconds: the longest that is acceptable.
    regions: where its data may be; () = anywhere. min_tier: 0 (development) to 3 (confidential chips).
    roles: which roles a pool must have; () = the job's kind.
    survives: it still fits after any one of the problem's losses, then with `surviving_share` of its demand (of its
    tokens per second; of its speed, for training). Jobs that do not survive give their chips to those that do
    (to a reserve that is held, only serving jobs do).
    required: False lets the planner drop it; among those, the largest sum of `priority` is placed.
    may_split: several pools may serve it together. A training job runs on one pool.
    """

    name: str
    kind: Kind
    tokens: float | None = None
    tokens_per_second: float | None = None
    deadline_seconds: float | None = None
    time_to_first_token_seconds: float | None = None
    regions: tuple[str, ...] = ()
    min_tier: int = 0
    roles: tuple[str, ...] = ()
    survives: bool = False
    surviving_share: float = 1.0
    required: bool = True
    priority: float = 1.0
    may_split: bool = False

    def __post_init__(self) -> None:
        text("job", "name", self.name, "chat")
        me = f"job {self.name!r}"
        member(me, "kind", self.kind, KINDS)
        for name in ("survives", "required", "may_split"):
            truth(me, name, getattr(self, name))
        if self.kind == "train":
            fix = "write the tokens of the whole run"
            number(me, "tokens", self.tokens, 1e3, 1e16, "tokens", fix)
            self._not_here(me, "tokens_per_second", "time_to_first_token_seconds")
            if self.may_split:
                raise PlacementError(f"{me}: may_split = True: a training job runs on one pool; set it to False")
        else:
            fix = "write the tokens generated a second over all its requests"
            number(me, "tokens_per_second", self.tokens_per_second, 1e-3, 1e11, "tokens/s", fix)
            self._not_here(me, "tokens", "deadline_seconds")
        if self.deadline_seconds is not None:
            fix = "write seconds, one day is 86400"
            number(me, "deadline_seconds", self.deadline_seconds, 1, 10 * YEAR_HOURS * 3600, "s", fix)
        if self.time_to_first_token_seconds is not None:
            fix = "write seconds, not milliseconds"
            number(me, "time_to_first_token_seconds", self.time_to_first_token_seconds, 1e-3, 600, "s", fix)
        if not isinstance(self.regions, tuple) or not all(isinstance(region, str) for region in self.regions):
            raise PlacementError(f'{me}: regions = {self.regions!r}: must be a tuple of texts, such as ("us-east5",)')
        members(me, "roles", self.roles, ROLES)
        whole(me, "min_tier", self.min_tier, *TIERS, "tier", "0 is development, 3 is confidential chips")
        number(me, "surviving_share", self.surviving_share, 0.01, 1, "", "a share of the demand, 1 is all of it")
        number(me, "priority", self.priority, 1e-3, 1e3, "", "1 is usual, 2 counts as much as two of 1")

    def _not_here(self, me: str, *names: str) -> None:
        for name in names:
            if getattr(self, name) is not None:
                raise PlacementError(f"{me}: {name} = {getattr(self, name)!r}: not of a {self.kind} job; remove it")

    @property
    def needs_roles(self) -> tuple[str, ...]:
        """The roles a pool must have."""
        return self.roles or (self.kind,)


@dataclass(frozen=True)
class PoolOffer:
    """Chips of one kind in one place that could be used.

    chips: all that are there, in use together at most. slice_chips: they are taken in multiples of that.
    usd_per_chip_hour: of chips beyond the commitment; None = not known.
    watts_per_chip: at the meter: host, network and cooling included; None = not known.
    committed_chips: already paid for the whole period: using them costs nothing more. committed_usd: what was paid
    (gone either way; reported where it would stand idle).
    """

    name: str
    chip: str
    vendor: str
    provider: str
    region: str
    chips: int
    usd_per_chip_hour: float | None = None
    watts_per_chip: float | None = None
    slice_chips: int = 1
    tier: int = 0
    roles: tuple[str, ...] = ("train", "serve")
    committed_chips: int = 0
    committed_usd: float = 0.0

    def __post_init__(self) -> None:
        text("pool", "name", self.name, "google-core")
        me = f"pool {self.name!r}"
        for name in ("chip", "vendor", "provider", "region"):
            example = {"chip": "tpu-v6e", "region": "us-east5"}.get(name, "google")
            text(me, name, getattr(self, name), example)
        whole(me, "chips", self.chips, 1, 10_000_000, "chips", "leave a pool without chips out")
        whole(me, "slice_chips", self.slice_chips, 1, 100_000, "chips", "8 for a host of eight, 1 if chips come singly")
        if self.chips % self.slice_chips:
            fix = f"write a multiple of slice_chips = {self.slice_chips}"
            raise PlacementError(f"{me}: chips = {self.chips}: chips come in slices; {fix}")
        if self.usd_per_chip_hour is not None:
            fix = "for one chip and one hour; None if not known, committed_chips for what is paid already"
            number(me, "usd_per_chip_hour", self.usd_per_chip_hour, 0.001, 200, "USD", fix)
        if self.watts_per_chip is not None:
            fix = "watts, not kilowatts, of one chip with its part of host and cooling; None if not known"
            number(me, "watts_per_chip", self.watts_per_chip, 1, 10_000, "W", fix)
        whole(me, "tier", self.tier, *TIERS, "tier", "0 is development, 3 is confidential chips")
        members(me, "roles", self.roles, ROLES)
        whole(me, "committed_chips", self.committed_chips, 0, self.chips, "chips", "no more than chips")
        number(me, "committed_usd", self.committed_usd, 0, 1e12, "USD", "what was paid for this period")
        if self.committed_usd and not self.committed_chips:
            raise PlacementError(f"{me}: committed_usd = {self.committed_usd!r}: for no chips; set committed_chips too")

    def of(self, scope: Scope) -> str:
        """Its vendor, provider or region."""
        return {"vendor": self.vendor, "provider": self.provider, "region": self.region}[scope]


@dataclass(frozen=True)
class Rate:
    """How fast a job runs on a pool, as predicted or measured.

    low, high: the interval of the prediction; None = the value itself. min_chips: the smallest number of chips on which
    the model fits (a replica, when serving). max_chips: training only: up to where the rate for each chip holds.
    """

    job: str
    pool: str
    tokens_per_second_per_chip: float
    low: float | None = None
    high: float | None = None
    time_to_first_token_seconds: float | None = None
    min_chips: int = 1
    max_chips: int | None = None

    def __post_init__(self) -> None:
        me = f"rate of job {self.job!r} on pool {self.pool!r}"
        fix = "tokens a second of one chip; leave the pair out (or say why with NoRate) if it cannot run"
        typical = number(me, "tokens_per_second_per_chip", self.tokens_per_second_per_chip, 1e-4, 1e8, "tokens/s", fix)
        if self.low is not None:
            number(me, "low", self.low, 1e-4, typical, "tokens/s", "no more than the rate itself")
        if self.high is not None:
            number(me, "high", self.high, typical, 1e8, "tokens/s", "no less than the rate itself")
        if self.time_to_first_token_seconds is not None:
            fix = "write seconds, not milliseconds"
            number(me, "time_to_first_token_seconds", self.time_to_first_token_seconds, 1e-4, 600, "s", fix)
        whole(me, "min_chips", self.min_chips, 1, 1_000_000, "chips", "the fewest on which it fits")
        if self.max_chips is not None:
            whole(me, "max_chips", self.max_chips, self.min_chips, 10_000_000, "chips", "no fewer than min_chips")


@dataclass(frozen=True)
class NoRate:
    """Why a job cannot run on a pool: "does not fit: needs 141 GiB of 80 GiB"."""

    job: str
    pool: str
    reason: str

    def __post_init__(self) -> None:
        text(f"job {self.job!r} on pool {self.pool!r}", "reason", self.reason, "does not fit")


@dataclass(frozen=True)
class Limits:
    """What may not be exceeded; None and missing regions are without limit.

    budget_usd: money spent in the period beyond what is committed. megawatts: everything running at once.
    grams_co2_per_kwh: of each region's electricity; needed for the objective "carbon" only.
    """

    budget_usd: float | None = None
    megawatts: float | None = None
    megawatts_by_region: Mapping[str, float] = field(default_factory=dict)
    chips_by_region: Mapping[str, int] = field(default_factory=dict)
    grams_co2_per_kwh: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("megawatts_by_region", "chips_by_region", "grams_co2_per_kwh"):
            value = getattr(self, name)
            if not isinstance(value, Mapping):
                raise PlacementError(f"limits: {name} = {value!r}: must map regions to numbers")
            object.__setattr__(self, name, MappingProxyType(dict(value)))
        if self.budget_usd is not None:
            number("limits", "budget_usd", self.budget_usd, 0, 1e12, "USD", "money for the whole period")
        megawatts = "megawatts, not watts or kilowatts"
        if self.megawatts is not None:
            number("limits", "megawatts", self.megawatts, 0, 20_000, "MW", megawatts)
        for region, value in self.megawatts_by_region.items():
            number("limits", f"megawatts_by_region[{region!r}]", value, 0, 20_000, "MW", megawatts)
        for region, value in self.chips_by_region.items():
            whole("limits", f"chips_by_region[{region!r}]", value, 0, 100_000_000, "chips", "all pools there together")
        for region, value in self.grams_co2_per_kwh.items():
            # A figure between 0 and 1 is kilograms; only a grid without any emission has 0.
            fix = "grams, not kilograms, of CO2e for one kWh"
            number("limits", f"grams_co2_per_kwh[{region!r}]", value, 1 if value else 0, 2000, "g/kWh", fix)


@dataclass(frozen=True)
class Problem:
    """Jobs, pools, rates, limits: everything a plan depends on.

    hours: the period for which the plan holds. losses: which kind of thing may be lost, one at a time, for the jobs
    that survive. reserve: "listed": what the survivors move to must be on offer when the loss happens; "held": it is
    taken and paid for the whole period. rates_used: "typical", or "low" to plan with the lower end of every rate.
    previous: (job, pool) pairs where jobs run now; each pair of a plan that is not among them, of a job that is, costs
    `move_penalty` in the objective's own unit.
    """

    jobs: tuple[Job, ...]
    pools: tuple[PoolOffer, ...]
    rates: tuple[Rate, ...]
    hours: float
    objective: Objective = "cost"
    limits: Limits = field(default_factory=Limits)
    no_rates: tuple[NoRate, ...] = ()
    losses: tuple[Scope, ...] = ()
    reserve: Literal["listed", "held"] = "listed"
    rates_used: Literal["typical", "low"] = "typical"
    previous: tuple[tuple[str, str], ...] = ()
    move_penalty: float = 0.0

    def __post_init__(self) -> None:
        number("problem", "hours", self.hours, 1 / 60, 10 * YEAR_HOURS, "h", "a month is 720")
        member("problem", "objective", self.objective, OBJECTIVES)
        member("problem", "reserve", self.reserve, ("listed", "held"))
        member("problem", "rates_used", self.rates_used, ("typical", "low"))
        members("problem", "losses", self.losses, SCOPES)
        number("problem", "move_penalty", self.move_penalty, 0, 1e12, UNITS[self.objective], "0 lets jobs move freely")
        for kind, named in (("job", self.jobs), ("pool", self.pools)):
            if not named:
                raise PlacementError(f"problem: {kind}s is empty; give at least one")
            names = [each.name for each in named]
            for name in names:
                if names.count(name) > 1:
                    raise PlacementError(f"problem: two {kind}s are named {name!r}; give each its own name")
        self._check_pairs()
        self._check_regions()
        for job in self.jobs:
            if job.deadline_seconds is not None and job.deadline_seconds > self.hours * 3600 * (1 + 1e-9):
                fix = "make the period longer or the deadline earlier"
                late = f"deadline_seconds = {job.deadline_seconds:g} is after the period's end"
                raise PlacementError(f"job {job.name!r}: {late} at {self.hours * 3600:g} s; {fix}")
        survivors = [job.name for job in self.jobs if job.survives]
        if survivors and not self.losses:
            raise PlacementError(f'job {survivors[0]!r}: survives = True, but losses = (): say what, e.g. ("vendor",)')
        if self.losses and not survivors:
            fix = "set survives of one, or remove losses"
            raise PlacementError(f"problem: losses = {self.losses!r}, but no job survives; {fix}")
        if self.objective == "finish" and not any(job.kind == "train" for job in self.jobs):
            raise PlacementError("problem: objective = 'finish': no job trains, so nothing finishes; use 'cost'")

    def _check_pairs(self) -> None:
        jobs = [job.name for job in self.jobs]
        pools = [pool.name for pool in self.pools]
        seen: set[tuple[str, str]] = set()
        pairs: tuple[Rate | NoRate, ...] = (*self.rates, *self.no_rates)
        for index, each in enumerate(pairs):
            where = f"rates[{index}]" if index < len(self.rates) else f"no_rates[{index - len(self.rates)}]"
            member(where, "job", each.job, jobs)
            member(where, "pool", each.pool, pools)
            if (each.job, each.pool) in seen:
                raise PlacementError(f"{where}: job {each.job!r} on pool {each.pool!r} was given before; give it once")
            seen.add((each.job, each.pool))
        for rate in self.rates:
            if rate.max_chips is not None and self.job(rate.job).kind == "serve":
                fix = "max_chips is for training; a replica has min_chips"
                raise PlacementError(f"rate of job {rate.job!r} on pool {rate.pool!r}: {fix}")
        for index, (job, pool) in enumerate(self.previous):
            member(f"previous[{index}]", "job", job, jobs)
            member(f"previous[{index}]", "pool", pool, pools)

    def _check_regions(self) -> None:
        regions = sorted({pool.region for pool in self.pools})
        for name in ("megawatts_by_region", "chips_by_region", "grams_co2_per_kwh"):
            for region in getattr(self.limits, name):
                member("limits", name, region, regions)
        for job in self.jobs:
            if job.regions and not set(job.regions) & set(regions):
                raise NowhereError(
                    f"job {job.name!r}: regions = {job.regions!r}: no pool is in any; known here: {', '.join(regions)}"
                )

    @cached_property
    def _jobs(self) -> dict[str, Job]:
        return {job.name: job for job in self.jobs}

    @cached_property
    def _pools(self) -> dict[str, PoolOffer]:
        return {pool.name: pool for pool in self.pools}

    @cached_property
    def rate_of(self) -> dict[tuple[str, str], Rate]:
        """The rates by (job, pool)."""
        return {(rate.job, rate.pool): rate for rate in self.rates}

    def job(self, name: str) -> Job:
        """The job of that name. Raises PlacementError."""
        return self._jobs[member("problem", "job", name, self._jobs)]

    def pool(self, name: str) -> PoolOffer:
        """The pool of that name. Raises PlacementError."""
        return self._pools[member("problem", "pool", name, self._pools)]

    def without(
        self,
        *,
        vendor: str | None = None,
        provider: str | None = None,
        region: str | None = None,
        pool: str | None = None,
    ) -> Problem:
        """The same problem as if these pools did not exist. Raises PlacementError for names it does not have.

        Limits of regions that no pool is left in go too, and so do the pairs of `previous` there.
        """
        gone = {name for name in self._pools if pool == name}
        if pool is not None:
            self.pool(pool)
        for scope, value in (("vendor", vendor), ("provider", provider), ("region", region)):
            if value is not None:
                member("without", scope, value, sorted({each.of(scope) for each in self.pools}))  # type: ignore[arg-type]
                gone |= {each.name for each in self.pools if each.of(scope) == value}  # type: ignore[arg-type]
        if len(gone) == len(self.pools):
            raise NowhereError("without: no pool is left; keep at least one")
        pools = tuple(each for each in self.pools if each.name not in gone)
        regions = {each.region for each in pools}
        before = self.limits
        limits = replace(
            before,
            megawatts_by_region={key: value for key, value in before.megawatts_by_region.items() if key in regions},
            chips_by_region={key: value for key, value in before.chips_by_region.items() if key in regions},
            grams_co2_per_kwh={key: value for key, value in before.grams_co2_per_kwh.items() if key in regions},
        )
        return replace(
            self,
            pools=pools,
            rates=tuple(rate for rate in self.rates if rate.pool not in gone),
            no_rates=tuple(each for each in self.no_rates if each.pool not in gone),
            previous=tuple(pair for pair in self.previous if pair[1] not in gone),
            limits=limits,
        )
