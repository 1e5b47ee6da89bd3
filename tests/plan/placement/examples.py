"""Small problems whose answers can be worked out on paper."""

from typing import Any

from anypool.plan.placement import Job, PoolOffer, Problem, Rate


def serve(name: str = "chat", speed: float = 1000.0, **rest: Any) -> Job:
    return Job(name, "serve", tokens_per_second=speed, **rest)


def train(name: str = "base", tokens: float = 3.6e9, **rest: Any) -> Job:
    return Job(name, "train", tokens=tokens, **rest)


def pool(name: str, chips: int = 100, usd: float | None = 2.0, watts: float | None = 1000.0, **rest: Any) -> PoolOffer:
    """A pool of its own vendor, provider and region unless told otherwise."""
    place = {"vendor": name, "provider": name, "region": name} | {
        key: rest.pop(key) for key in ("vendor", "provider", "region") if key in rest
    }
    return PoolOffer(name, "cpu", chips=chips, usd_per_chip_hour=usd, watts_per_chip=watts, **place, **rest)


def problem(
    jobs: list[Job], pools: list[PoolOffer], rates: dict[tuple[str, str], float] | float = 100.0, **rest: Any
) -> Problem:
    """rates: tokens a second of a chip, the same for all pairs or by (job, pool). The period is 100 hours."""
    table = {(job.name, each.name): rates for job in jobs for each in pools} if isinstance(rates, float) else rates
    return Problem(
        jobs=tuple(jobs),
        pools=tuple(pools),
        rates=rest.pop("table", tuple(Rate(job, where, speed) for (job, where), speed in table.items())),
        hours=rest.pop("hours", 100.0),
        **rest,
    )
