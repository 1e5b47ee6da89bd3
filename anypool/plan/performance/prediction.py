"""One training job predicted: memory, then speed with its interval, then money, energy and carbon.

MFU has one meaning here: model FLOPs (`ModelShape.train_flops_per_token`: causal attention once, nothing computed
again) a second, over the chip's dense peak for the job's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from anypool.chips import Price, prices_of
from anypool.plan.performance.calibration import INTERVAL, Calibration, Efficiency
from anypool.plan.performance.energy import Energy, Site, energy_per_token
from anypool.plan.performance.errors import DoesNotFitError, PerformanceError
from anypool.plan.performance.job import TrainJob
from anypool.plan.performance.memory import Memory, fit
from anypool.plan.performance.roofline import WEIGHTS, StepTimes, step_times
from anypool.plan.performance.rows import Row

SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class Money:
    """usd_per_chip_hour, and where it is from."""

    usd_per_chip_hour: float
    source: str


@dataclass(frozen=True)
class Prediction:
    """Of one job. Every `low` and `high` belongs to the 80% interval of speed.

    bound_tokens_per_second_per_chip: what no software exceeds. seconds_by_group: of a predicted step.
    batch_assumed: whether the tokens of a step were not given. money: None where no price is known.
    """

    job: TrainJob
    memory: Memory
    times: StepTimes
    efficiency: Efficiency
    batch_assumed: bool
    money: Money | None
    energy: Energy

    @property
    def tokens_per_step(self) -> float:
        return self.job.tokens_per_chip * self.job.chips

    @property
    def seconds_per_step(self) -> float:
        """Never under the bound."""
        return max(self.times.weighted_seconds / self.efficiency.value, self.times.bound_seconds)

    @property
    def tokens_per_second_per_chip(self) -> float:
        return self.job.tokens_per_chip / self.seconds_per_step

    @property
    def low(self) -> float:
        """Tokens a second and chip at the interval's slow end."""
        return min(self._speed(self.efficiency.low), self.tokens_per_second_per_chip)

    @property
    def high(self) -> float:
        """At its fast end, the bound at most."""
        return self._speed(self.efficiency.high)

    def _speed(self, efficiency: float) -> float:
        return self.job.tokens_per_chip / max(self.times.weighted_seconds / efficiency, self.times.bound_seconds)

    @property
    def bound_tokens_per_second_per_chip(self) -> float:
        return self.job.tokens_per_chip / self.times.bound_seconds

    @property
    def mfu(self) -> float:
        flops = self.job.shape.train_flops_per_token(self.job.sequence_length)
        return self.tokens_per_second_per_chip * flops / self.job.peak_flops(self.job.dtype)

    @property
    def seconds_by_group(self) -> dict[str, float]:
        scale = self.seconds_per_step / self.times.weighted_seconds
        return {name: WEIGHTS[name] * seconds * scale for name, seconds in self.times.groups.items()}

    @property
    def usd_per_million_tokens(self) -> float | None:
        if self.money is None:
            return None
        return self.money.usd_per_chip_hour / SECONDS_PER_HOUR / self.tokens_per_second_per_chip * 1e6

    def run(self, tokens: float) -> Run:
        """A whole run over so many tokens: only its computing, no restarts and no checkpoints."""
        if not 0 < tokens <= 1e16:
            raise PerformanceError(f"run_tokens = {tokens:g}: must be above 0 and at most 1e16")

        def seconds(speed: float) -> float:
            return tokens / (speed * self.job.chips)

        cost = self.usd_per_million_tokens
        facility = self.energy.facility_joules_per_token
        grams = self.energy.grams_co2e_per_million_tokens
        return Run(
            tokens=tokens,
            seconds=seconds(self.tokens_per_second_per_chip),
            seconds_low=seconds(self.high),
            seconds_high=seconds(self.low),
            chip_hours=seconds(self.tokens_per_second_per_chip) * self.job.chips / SECONDS_PER_HOUR,
            usd=None if cost is None else cost * tokens / 1e6,
            facility_kwh=None if facility is None else facility * tokens / 3.6e6,
            kilograms_co2e=None if grams is None else grams * tokens / 1e9,
        )

    def as_json(self) -> dict[str, Any]:
        job = self.job
        return {
            "model": job.shape.name,
            "chip": job.chip.name,
            "chips": job.chips,
            "dtype": job.dtype,
            "stack": job.stack,
            "seq": job.sequence_length,
            "global_batch": job.global_batch,
            "tokens_per_step": self.tokens_per_step,
            "tokens_per_step_assumed": self.batch_assumed,
            "fits": True,
            "memory_needed_bytes_per_device": self.memory.needed_bytes,
            "memory_usable_bytes_per_device": self.memory.usable_bytes,
            "mesh": self.memory.mesh,
            "tokens_per_second_per_chip": self.tokens_per_second_per_chip,
            "tokens_per_second_per_chip_low": self.low,
            "tokens_per_second_per_chip_high": self.high,
            "interval": INTERVAL,
            "tokens_per_second_per_chip_bound": self.bound_tokens_per_second_per_chip,
            "seconds_per_step": self.seconds_per_step,
            "seconds_by_group": self.seconds_by_group,
            "recomputed_share": self.times.recomputed,
            "mfu": self.mfu,
            "efficiency": self.efficiency.value,
            "calibrated": self.efficiency.calibrated,
            "basis": self.efficiency.basis,
            "usd_per_million_tokens": self.usd_per_million_tokens,
            "usd_per_chip_hour": self.money.usd_per_chip_hour if self.money else None,
            "price_source": self.money.source if self.money else None,
            "energy": self.energy.as_json(),
        }


@dataclass(frozen=True)
class Run:
    """A whole run. seconds_low and seconds_high: of the 80% interval. None: not known."""

    tokens: float
    seconds: float
    seconds_low: float
    seconds_high: float
    chip_hours: float
    usd: float | None
    facility_kwh: float | None
    kilograms_co2e: float | None

    def as_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


def predict_job(
    job: TrainJob, calibration: Calibration, money: Money | None = None, site: Site | None = None
) -> Prediction:
    """Memory, then speed. money: else the cheapest dated on-demand price of the chip.

    Raises DoesNotFitError (no speed is given for what does not fit) or PerformanceError.
    """
    memory = fit(job)
    prediction = Prediction(
        job=job,
        memory=memory,
        times=step_times(job),
        efficiency=calibration.efficiency(job),
        batch_assumed=job.global_batch is None,
        money=money if money is not None else listed_price(job.chip.name),
        energy=energy_per_token(job.chip, 1.0, site or Site()),
    )
    energy = energy_per_token(job.chip, prediction.tokens_per_second_per_chip, site or Site())
    return replace(prediction, energy=energy)


def listed_price(chip: str) -> Money | None:
    """The cheapest on-demand price that the room of chips lists, with provider, region and date."""
    listed: list[Price] = [price for price in prices_of(chip) if price.kind == "on_demand"]
    if not listed:
        return None
    price = listed[0]
    where = f"{price.provider} {price.region}".strip()
    return Money(price.usd_per_chip_hour, f"{where}, {price.sku}, on demand, {price.date}")


@dataclass(frozen=True)
class Answer:
    """Of one row of a table: a prediction, or the reason why there is none."""

    row: Row
    prediction: Prediction | None
    reason: str
    fewest_chips: int | None = None

    def as_json(self) -> dict[str, Any]:
        if self.prediction is not None:
            return {"line": self.row.line} | self.prediction.as_json()
        job = self.row.job
        return {
            "line": self.row.line,
            "model": job.shape.name,
            "chip": job.chip.name,
            "chips": job.chips,
            "dtype": job.dtype,
            "stack": job.stack,
            "fits": False,
            "reason": self.reason,
            "fewest_chips": self.fewest_chips,
        }


def predict_rows(rows: Sequence[Row], calibration: Calibration, site: Site | None = None) -> list[Answer]:
    """Each row predicted. A job that does not fit is an answer too; a chip of unknown rates raises, naming the line."""
    answers = []
    for row in rows:
        price = row.usd_per_chip_hour
        money = None if price is None else Money(price, "given")
        try:
            prediction = predict_job(row.job, calibration, money, site)
        except DoesNotFitError as error:
            answers.append(Answer(row, None, str(error), error.fewest))
        except PerformanceError as error:
            raise PerformanceError(f"line {row.line}: {error}") from None
        else:
            assert math.isfinite(prediction.tokens_per_second_per_chip)
            answers.append(Answer(row, prediction, ""))
    return answers
