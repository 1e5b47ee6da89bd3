"""From measured rows to an efficiency with its uncertainty, for any model, chip, dtype and software.

The logarithm of a row's efficiency (weighted least time over measured time) is a mean plus what the row shares with
others: with all of its software and kind of model, of its software and precision, and so on down to the same model on
the same chip with the same software. Each such effect is a Gaussian of its own variance, which is partial pooling: an
effect seen in many rows is believed, one seen in few is drawn to the level above. Prediction and interval follow in
closed form (best linear unbiased prediction; Robinson 1991, Henderson 1975). The variances, seven numbers in all, are
those that make the rows likeliest, held near a prior so that few rows suffice.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from anypool.plan.performance.errors import PerformanceError
from anypool.plan.performance.job import TrainJob
from anypool.plan.performance.roofline import step_times
from anypool.plan.performance.rows import Row

Floats = NDArray[np.float64]

# What rows share, each with a reason to exist. `kind` is dense or moe, `precision` bf16 or low.
EFFECTS: dict[str, tuple[str, ...]] = {
    "software and kind": ("stack", "kind"),  # the same H100 and model differ twofold between two libraries
    "software and precision": ("stack", "precision"),  # how well a library quantises
    "kind and precision": ("kind", "precision"),  # low precision gains less in mixtures: 1.2 against 1.5
    "chip, software, kind": ("chip", "stack", "kind"),  # the cell of published tables
    "chip, software, model": ("chip", "stack", "model"),  # what is tuned for one model
    "model and precision": ("model", "precision"),  # sizes that suit quantised products, on any chip
}
# How far the mean may be from what is expected before any row is seen: within a factor 1.9 in 4 of 5 cases.
PRIOR_VARIANCE = 0.25
# Standard deviation expected of an effect, and widths of that expectation and of that of repeated runs, in logarithms.
EFFECT_DEVIATION, EFFECT_WIDTH, REPEAT_WIDTH = 0.12, 0.75, 0.25
INTERVAL = 0.80
# Standard normal quantile of (1 + INTERVAL) / 2.
QUANTILE = 1.2816
VERSION = 1


@dataclass(frozen=True)
class Prior:
    """What is expected before any row is seen. mean: of log efficiency. repeat: deviation between like runs."""

    mean: float
    repeat: float


TRAINING = Prior(mean=math.log(0.5), repeat=0.03)


@dataclass(frozen=True)
class Point:
    """One calibration row as the model sees it. log_efficiency: weighted least time over measured time."""

    model: str
    chip: str
    vendor: str
    stack: str
    kind: str
    precision: str
    log_efficiency: float
    tokens_per_second_per_chip: float
    source: str


@dataclass(frozen=True)
class Efficiency:
    """value: the median. low, high: within which 4 of 5 measured ones are expected. basis: what it rests on."""

    value: float
    low: float
    high: float
    deviation: float
    calibrated: bool
    basis: str


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found. variances: of each effect of EFFECTS and "repeat", in squared logarithms.

    uncalibrated_deviation: of the error when a whole vendor is left out, for chips that no row has.
    """

    date: str
    points: tuple[Point, ...]
    variances: Mapping[str, float]
    uncalibrated_deviation: float
    residuals: tuple[float, ...]
    prior: Prior = TRAINING

    def efficiency(self, job: TrainJob) -> Efficiency:
        """For a job that need not be among the rows."""
        asked = _point(job, 1.0, 1.0, "")
        mean, deviation = predict_logs(self.points, [asked], self.variances, self.prior)
        same_chip = [point for point in self.points if point.chip == asked.chip]
        width = float(deviation[0])
        if not same_chip:
            width = max(width, self.uncalibrated_deviation)
        value = math.exp(float(mean[0]))
        spread = math.exp(QUANTILE * width)
        return Efficiency(value, value / spread, value * spread, width, bool(same_chip), self._basis(asked))

    def _basis(self, asked: Point) -> str:
        chip = [point for point in self.points if point.chip == asked.chip]
        if not chip:
            return f"uncalibrated: no row of a {asked.chip}; interval as when a whole vendor is left out"
        cell = [point for point in chip if (point.stack, point.kind) == (asked.stack, asked.kind)]
        if not cell:
            return f"{_rows(len(chip))} of a {asked.chip}, none with {asked.stack} and a {asked.kind} model"
        same = sum((point.model, point.precision) == (asked.model, asked.precision) for point in cell)
        end = f", {same} of them of this model and precision" if same else ", none of this model and precision"
        return f"{_rows(len(cell))} of a {asked.chip} with {asked.stack} and {asked.kind} models{end}"

    def as_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "date": self.date,
            "variances": dict(self.variances),
            "prior": dict(self.prior.__dict__),
            "uncalibrated_deviation": self.uncalibrated_deviation,
            "points": [
                point.__dict__ | {"leave_one_out_residual": residual}
                for point, residual in zip(self.points, self.residuals, strict=True)
            ],
        }

    @classmethod
    def from_json(cls, data: Any) -> Calibration:
        """Raises PerformanceError for what `as_json` did not make."""
        try:
            if data["version"] != VERSION or set(data["variances"]) != {*EFFECTS, "repeat"}:
                raise PerformanceError(
                    "the calibration is of another version: make it anew with `anypool plan calibrate`"
                )
            residuals = tuple(float(point["leave_one_out_residual"]) for point in data["points"])
            points = tuple(
                Point(**{key: value for key, value in point.items() if key != "leave_one_out_residual"})
                for point in data["points"]
            )
            deviation = float(data["uncalibrated_deviation"])
            prior = Prior(**data["prior"])
            return cls(str(data["date"]), points, dict(data["variances"]), deviation, residuals, prior)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, PerformanceError):
                raise
            raise PerformanceError(
                f"not a calibration: {type(error).__name__} {error}: make one with `anypool plan calibrate`"
            ) from None

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Raises PerformanceError."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PerformanceError(f"calibration {path} cannot be read: {error}") from None
        return cls.from_json(data)


def calibrate(rows: Sequence[Row], date: str | None = None) -> Calibration:
    """Fits the variances to the rows that have a speed. Raises PerformanceError if there are fewer than 3.

    date: of the calibration, today unless given.
    """
    points = points_of(rows)
    if len(points) < 3:
        raise PerformanceError(f"tok_s_chip: {len(points)} rows have a speed; a calibration needs at least 3")
    return calibrate_points(points, TRAINING, date)


def calibrate_points(points: tuple[Point, ...], prior: Prior, date: str | None = None) -> Calibration:
    """As `calibrate`, for points of any kind of work."""
    variances = fit_variances(points, prior)
    everyone = list(range(len(points)))
    residuals = [error for error, _ in left_out(points, everyone, prior, variances)]
    vendors = [point.vendor for point in points]
    # With one vendor there is nobody to learn another's from: the prior's width stands in.
    deviation = math.sqrt(PRIOR_VARIANCE + sum(variances.values()))
    if len(set(vendors)) > 1:
        errors = [error for error, _ in left_out(points, vendors, prior, variances)]
        deviation = float(np.sqrt(np.mean(np.square(errors))))
    day = date or datetime.datetime.now(datetime.UTC).date().isoformat()
    return Calibration(day, points, variances, deviation, tuple(residuals), prior)


def points_of(rows: Sequence[Row]) -> tuple[Point, ...]:
    """The rows that have a speed."""
    return tuple(
        _point(row.job, row.tokens_per_second_per_chip, step_times(row.job).weighted_seconds, row.source)
        for row in rows
        if row.tokens_per_second_per_chip is not None
    )


def _point(job: TrainJob, tokens_per_second: float, weighted_seconds: float, source: str) -> Point:
    measured = job.tokens_per_chip / tokens_per_second
    return Point(
        model=job.shape.name,
        chip=job.chip.name,
        vendor=job.chip.vendor,
        stack=job.stack,
        kind=job.shape.kind,
        precision=job.precision,
        log_efficiency=math.log(weighted_seconds / measured),
        tokens_per_second_per_chip=tokens_per_second,
        source=source,
    )


def _shared(rows: Sequence[Point], columns: Sequence[Point]) -> dict[str, Floats]:
    """For each effect, 1 where two rows share it."""
    shared = {}
    for effect, keys in EFFECTS.items():
        numbers: dict[tuple[str, ...], int] = {}
        left, right = (
            np.array([numbers.setdefault(tuple(getattr(p, key) for key in keys), len(numbers)) for p in points])
            for points in (rows, columns)
        )
        shared[effect] = (left[:, None] == right[None, :]).astype(np.float64)
    return shared


def predict_logs(
    known: Sequence[Point], asked: Sequence[Point], variances: Mapping[str, float], prior: Prior
) -> tuple[Floats, Floats]:
    """Mean and standard deviation of the log efficiency of a new run of each asked point."""

    def covariance(a: Sequence[Point], b: Sequence[Point]) -> Floats:
        shared = _shared(a, b)
        total = PRIOR_VARIANCE + sum(variances[effect] * shared[effect] for effect in EFFECTS)
        return np.asarray(total, dtype=np.float64)

    matrix = covariance(known, known) + variances["repeat"] * np.eye(len(known))
    cross = covariance(asked, known)
    values = np.array([point.log_efficiency for point in known])
    mean = prior.mean + cross @ np.linalg.solve(matrix, values - prior.mean)
    whole = PRIOR_VARIANCE + sum(variances.values())
    variance = whole - np.einsum("ij,ji->i", cross, np.linalg.solve(matrix, cross.T))
    return mean, np.sqrt(variance)


def fit_variances(
    points: Sequence[Point], prior: Prior = TRAINING, start: Mapping[str, float] | None = None
) -> dict[str, float]:
    """The variances that make the points likeliest, held near the prior. start: where to begin, if known."""
    shared = _shared(points, points)
    stack = np.stack([shared[effect] for effect in EFFECTS] + [np.eye(len(points))])
    values = np.array([point.log_efficiency for point in points]) - prior.mean
    centre = np.log([EFFECT_DEVIATION] * len(EFFECTS) + [prior.repeat])
    width = np.array([EFFECT_WIDTH] * len(EFFECTS) + [REPEAT_WIDTH])

    def loss(logs: Floats) -> tuple[float, Floats]:
        """Negative logarithm of likelihood and prior, over the logarithms of the standard deviations."""
        variances = np.exp(2 * logs)
        matrix = PRIOR_VARIANCE + np.tensordot(variances, stack, 1)
        inverse = np.linalg.inv(matrix)
        solved = inverse @ values
        value = 0.5 * values @ solved + 0.5 * np.linalg.slogdet(matrix)[1]
        value += 0.5 * np.sum(((logs - centre) / width) ** 2)
        by_variance = 0.5 * np.tensordot(stack, inverse - np.outer(solved, solved), 2)
        return float(value), 2 * variances * by_variance + (logs - centre) / width**2

    names = [*EFFECTS, "repeat"]
    first = centre if start is None else 0.5 * np.log([start[name] for name in names])
    found = minimize(loss, first, jac=True, method="L-BFGS-B", options={"ftol": 1e-7})
    return dict(zip(names, (float(v) for v in np.exp(2 * found.x)), strict=True))


def left_out(
    points: Sequence[Point], groups: Sequence[object], prior: Prior, variances: Mapping[str, float] | None = None
) -> list[tuple[float, float]]:
    """For each point, log of predicted over measured efficiency and its deviation, with its group left out.

    variances: None fits them anew without the group, so that nothing of it is known.
    """
    results: dict[int, tuple[float, float]] = {}
    start = fit_variances(points, prior) if variances is None else None
    for group in dict.fromkeys(groups):
        out = [i for i, one in enumerate(groups) if one == group]
        kept = [point for i, point in enumerate(points) if groups[i] != group]
        if not kept:
            raise PerformanceError(f"nothing is left to predict {group} from: rows of another are needed")
        used = fit_variances(kept, prior, start) if variances is None else variances
        mean, deviation = predict_logs(kept, [points[i] for i in out], used, prior)
        for place, i in enumerate(out):
            results[i] = (float(mean[place]) - points[i].log_efficiency, float(deviation[place]))
    return [results[i] for i in range(len(points))]


def _rows(number: int) -> str:
    return f"{number} row{'s' if number > 1 else ''}"
