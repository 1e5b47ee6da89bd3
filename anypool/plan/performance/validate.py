"""How good the predictions are: every row predicted from the others, beside what a constant efficiency would say.

Left out are, in turn, one row, all rows of one model, of one chip, of one vendor; everything that is fitted is fitted
anew without them. The constant is the median MFU of the narrowest group that has a row: the same chip, precision, kind
and software; without the software; without the chip; all.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anypool.plan.performance.calibration import INTERVAL, QUANTILE, TRAINING, fit_variances, left_out, points_of
from anypool.plan.performance.rows import Row

SCHEMES = ("row", "model", "chip", "vendor")
CONSTANT_GROUPS: tuple[tuple[str, ...], ...] = (
    ("chip", "dtype", "kind", "stack"),
    ("chip", "dtype", "kind"),
    ("dtype", "kind"),
    ("kind",),
    (),
)


@dataclass(frozen=True)
class Left:
    """One row as predicted without it. Fractions: 0.1 is 10% too fast. None: the constant has no group for it."""

    model: str
    chip: str
    chips: int
    dtype: str
    stack: str
    measured: float
    predicted: float
    low: float
    high: float
    constant: float | None
    constant_in_cell: bool

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def inside(self) -> bool:
        return self.low <= self.measured <= self.high


@dataclass(frozen=True)
class Scheme:
    """One way of leaving out. Errors are absolute fractions; `covered` of all rows lie inside their interval.

    in_cell_*: over the rows whose narrowest group (chip, dtype, kind, software) still has a row.
    """

    left_out: str
    rows: tuple[Left, ...]

    def summary(self) -> dict[str, Any]:
        errors = [abs(row.error) for row in self.rows]
        constant = [abs(row.constant / row.measured - 1) for row in self.rows if row.constant is not None]
        cell = [row for row in self.rows if row.constant_in_cell and row.constant is not None]
        return {
            "left_out": self.left_out,
            "rows": len(self.rows),
            "mape": statistics.fmean(errors),
            "median": statistics.median(errors),
            "largest": max(errors),
            "covered": statistics.fmean(row.inside for row in self.rows),
            "constant_mape": statistics.fmean(constant),
            "constant_median": statistics.median(constant),
            "in_cell_rows": len(cell),
            "in_cell_mape": statistics.fmean([abs(row.error) for row in cell]) if cell else None,
            "in_cell_constant_mape": (
                statistics.fmean([abs((row.constant or 0) / row.measured - 1) for row in cell]) if cell else None
            ),
        }


@dataclass(frozen=True)
class Validation:
    """Every scheme, and the standard deviations that all rows together give."""

    schemes: tuple[Scheme, ...]
    deviations: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        return {
            "interval": INTERVAL,
            "deviations": self.deviations,
            "schemes": [
                scheme.summary()
                | {"predictions": [row.__dict__ | {"error": row.error, "inside": row.inside} for row in scheme.rows]}
                for scheme in self.schemes
            ],
        }


def validate(rows: Sequence[Row], schemes: Sequence[str] = SCHEMES) -> Validation:
    """Predicts each row that has a speed without its group. Raises PerformanceError if a group is everything."""
    measured = [row for row in rows if row.tokens_per_second_per_chip is not None]
    points = points_of(measured)
    result = []
    for scheme in schemes:
        groups: list[object] = [i if scheme == "row" else getattr(point, scheme) for i, point in enumerate(points)]
        lefts = []
        for i, (error, deviation) in enumerate(left_out(points, groups, TRAINING)):
            job, speed = measured[i].job, points[i].tokens_per_second_per_chip
            predicted = speed * math.exp(error)
            spread = math.exp(QUANTILE * deviation)
            kept = [row for j, row in enumerate(measured) if groups[j] != groups[i]]
            constant, narrow = _constant(measured[i], kept)
            lefts.append(
                Left(
                    model=job.shape.name,
                    chip=job.chip.name,
                    chips=job.chips,
                    dtype=job.dtype,
                    stack=job.stack,
                    measured=speed,
                    predicted=predicted,
                    low=predicted / spread,
                    high=predicted * spread,
                    constant=constant,
                    constant_in_cell=narrow,
                )
            )
        result.append(Scheme(scheme, tuple(lefts)))
    variances = fit_variances(points)
    return Validation(tuple(result), {name: math.sqrt(value) for name, value in variances.items()})


def _constant(row: Row, kept: Sequence[Row]) -> tuple[float | None, bool]:
    """Tokens a second and chip by the median MFU of the narrowest group with a row, and whether it is the first one."""
    for place, keys in enumerate(CONSTANT_GROUPS):
        group = [mfu(other) for other in kept if _key(other, keys) == _key(row, keys)]
        if group:
            return statistics.median(group) / mfu(row) * (row.tokens_per_second_per_chip or 0.0), place == 0
    return None, False


def _key(row: Row, keys: tuple[str, ...]) -> tuple[str, ...]:
    job = row.job
    all_keys = {"chip": job.chip.name, "dtype": job.dtype, "kind": job.shape.kind, "stack": job.stack}
    return tuple(all_keys[key] for key in keys)


def mfu(row: Row) -> float:
    """Model FLOPs of a row over the dense peak of its dtype."""
    job = row.job
    speed = row.tokens_per_second_per_chip
    assert speed is not None, "a row without a speed has no MFU"
    return speed * job.shape.train_flops_per_token(job.sequence_length) / job.peak_flops(job.dtype)
