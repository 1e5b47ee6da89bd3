"""How long it takes to place many jobs on many pools so that the loss of any one vendor is survived.

    python benchmarks/placement.py [--jobs N] [--pools N] [--seed S] [--gap G] [--seconds S] [--format json]

The instance is made from a seed: chips with the prices and rates of their kind, half of the jobs trained and half
served, half of each surviving. Demands are set so that about half of all chips are in use; some prices and powers are
not known, and there is a limit on money, power and the chips of a region.
"""

import argparse
import json
import random
from typing import Any

from rich.console import Console

from anypool.measure.report import circumstances
from anypool.plan.placement import (
    Job,
    Limits,
    NoPlanError,
    NoRate,
    Options,
    PoolOffer,
    Problem,
    Rate,
    audit,
    explain,
    print_plan,
    solve,
)

# chip: vendor, providers, effective bf16 TF/s, HBM TB/s, HBM GB, USD, W at the meter, chips of a slice.
CHIPS: dict[str, tuple[str, tuple[str, ...], float, float, float, float, float, int]] = {
    "tpu-v5e": ("google", ("google",), 110, 0.82, 16, 1.20, 300, 4),
    "tpu-v5p": ("google", ("google",), 260, 2.77, 102, 4.20, 550, 4),
    "tpu-v6e": ("google", ("google",), 440, 1.64, 34, 2.70, 450, 4),
    "trn2": ("aws", ("aws",), 250, 2.9, 103, 2.20, 700, 16),
    "h100": ("nvidia", ("aws", "google", "coreweave", "lambda"), 400, 3.35, 86, 3.99, 1300, 8),
    "h200": ("nvidia", ("aws", "coreweave", "nebius"), 410, 4.8, 141, 4.50, 1350, 8),
    "b200": ("nvidia", ("coreweave", "lambda", "nebius"), 900, 7.7, 180, 6.99, 1900, 8),
    "mi300x": ("amd", ("azure", "tensorwave", "vultr"), 380, 5.3, 206, 2.20, 1350, 8),
    "910c": ("huawei", ("huawei",), 280, 3.2, 137, 2.50, 1400, 16),
}
REGIONS = {
    "us-central": 413.0,
    "us-west": 79.0,
    "us-east": 323.0,
    "eu-north": 39.0,
    "eu-west": 209.0,
    "ap-south": 630.0,
}
HOURS = 720.0
IN_USE = 0.5


def instance(jobs: int, pools: int, seed: int) -> Problem:
    """A problem of that size; the same for the same seed."""
    draw = random.Random(seed)
    offers = tuple(_pool(draw, index) for index in range(pools))
    share = IN_USE * sum(offer.chips for offer in offers) / jobs
    placed = [_job(draw, index, share, offers) for index in range(jobs)]
    rates = [each for job, billions in placed for offer in offers if (each := _rate(draw, job, billions, offer))]
    watts = sum(offer.chips * (offer.watts_per_chip or 0) for offer in offers)
    dollars = sum(offer.chips * (offer.usd_per_chip_hour or 0) for offer in offers) * HOURS
    regions = {offer.region for offer in offers}
    limits = Limits(
        budget_usd=round(0.6 * dollars),
        megawatts=round(0.7 * watts / 1e6, 3),
        chips_by_region={"eu-north": 3000} if "eu-north" in regions else {},
        grams_co2_per_kwh={region: REGIONS[region] for region in sorted(regions)},
    )
    return Problem(
        jobs=tuple(job for job, _ in placed),
        pools=offers,
        rates=tuple(rate for rate in rates if isinstance(rate, Rate)),
        no_rates=tuple(rate for rate in rates if isinstance(rate, NoRate)),
        hours=HOURS,
        limits=limits,
        losses=("vendor",),
    )


def _pool(draw: random.Random, index: int) -> PoolOffer:
    # The first pools hold one of each chip, so that every vendor is there.
    chip = list(CHIPS)[index] if index < len(CHIPS) else draw.choice(list(CHIPS))
    vendor, providers, *_, usd, watts, size = CHIPS[chip]
    chips = size * round(draw.choice((128, 256, 512, 1024, 2048)) / size)
    committed = draw.random() < 0.25
    return PoolOffer(
        name=f"{chip}-{index}",
        chip=chip,
        vendor=vendor,
        provider=draw.choice(providers),
        region=draw.choice(list(REGIONS)),
        chips=chips,
        usd_per_chip_hour=None if draw.random() < 0.05 else round(usd * draw.uniform(0.8, 1.6), 3),
        watts_per_chip=round(watts * draw.uniform(0.95, 1.1), 1),
        slice_chips=size,
        tier=draw.choice((1, 1, 2, 3)),
        roles=("train", "serve") if draw.random() < 0.7 else (draw.choice(("train", "serve")),),
        committed_chips=chips // 4 // size * size if committed else 0,
    )


def _job(draw: random.Random, index: int, share: float, offers: tuple[PoolOffer, ...]) -> tuple[Job, float]:
    """A job that takes about `share` H100s, and its billions of parameters."""
    billions = draw.choice((1.5, 8.0, 32.0, 70.0, 120.0))
    chips = share * draw.uniform(0.4, 1.6)
    regions = draw.choice(((), (), (), ("eu-north", "eu-west"), ("us-central", "us-west", "us-east")))
    known = {offer.region for offer in offers}
    regions = regions if set(regions) & known else ()
    # A few pools must do for a job bound to a place.
    chips *= 0.4 if regions else 1.0
    survives = draw.random() < 0.5
    if index % 2:
        days = draw.uniform(10, 30)
        tokens = chips * 400e12 / (6e9 * billions) * days * 86400
        job = Job(
            name=f"train-{index}",
            kind="train",
            tokens=round(tokens, -6),
            deadline_seconds=round(days * 86400),
            regions=regions,
            survives=survives,
            surviving_share=0.7,
        )
        return job, billions
    job = Job(
        name=f"serve-{index}",
        kind="serve",
        tokens_per_second=round(chips * 2200 * 70 / billions),
        time_to_first_token_seconds=draw.choice((1.0, 2.0, None)),
        regions=regions,
        # Confidential chips in one region only may be of one vendor: no such job could survive its loss.
        min_tier=draw.choice((0, 0, 0, 2)) if not regions else 1,
        survives=survives,
        surviving_share=0.7,
        may_split=draw.random() < 0.7,
    )
    return job, billions


def _rate(draw: random.Random, job: Job, billions: float, offer: PoolOffer) -> Rate | NoRate:
    _, _, teraflops, bandwidth, gigabytes, *_ = CHIPS[offer.chip]
    # 16 bytes a parameter in training with its optimizer, 2 and half as much again for the cache in serving.
    fits = max(1, -(-int(billions * (16 if job.kind == "train" else 3)) // int(gigabytes)))
    if fits > offer.chips:
        return NoRate(job.name, offer.name, f"does not fit: needs {fits} chips")
    if draw.random() < 0.05:
        return NoRate(job.name, offer.name, "its compiler rejects the program")
    stack = draw.uniform(0.7, 1.1)
    if job.kind == "train":
        speed = stack * teraflops * 1e12 / (6e9 * billions)
        return Rate(job.name, offer.name, speed, 0.8 * speed, 1.2 * speed, min_chips=fits)
    speed = stack * 2200 * 70 / billions * bandwidth / 3.35
    # Replicas are the next power of two of what fits.
    replica = 1 << (fits - 1).bit_length()
    first = draw.uniform(0.15, 1.5)
    return Rate(job.name, offer.name, speed, 0.7 * speed, 1.3 * speed, first, replica)


def measure(problem: Problem, options: Options) -> dict[str, Any]:
    """Solves and audits once; without a plan, says why."""
    try:
        plan = solve(problem, options)
    except NoPlanError:
        why = explain(problem)
        return {"why": "the time ended before that was known" if why is None else why.words()}
    return {
        "jobs": len(problem.jobs),
        "pools": len(problem.pools),
        "rates": len(problem.rates),
        "seconds": round(plan.seconds, 2),
        "gap": round(plan.gap, 5),
        "proven": plan.proven,
        "value": round(plan.value, 2),
        "how_good": plan.how_good(),
        "audit": [each.words for each in audit(problem, plan)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=40)
    parser.add_argument("--pools", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gap", type=float, default=0.01)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--plan", action="store_true", help="print the plan too")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    arguments = parser.parse_args()
    where = circumstances("scipy")
    problem = instance(arguments.jobs, arguments.pools, arguments.seed)
    options = Options(gap=arguments.gap, seconds=arguments.seconds)
    figures = measure(problem, options)
    if arguments.format == "json":
        print(json.dumps(where | {"seed": arguments.seed} | figures, indent=2))
        return
    console = Console(highlight=False)
    if arguments.plan and "why" not in figures:
        print_plan(problem, solve(problem, options), console)
    for name, value in figures.items():
        console.print(f"{name:>9}  {value if value != [] else 'nothing broken'}")


if __name__ == "__main__":
    main()
