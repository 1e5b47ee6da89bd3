"""How fast, how dear and how hungry a job is on a chip: memory first, then speed with an interval.

Other rooms use:
- `find_shape(name, catalogue())`, `load_shapes(path)`, `shape_of_config(config, name)`: a `ModelShape`;
- `TrainJob(shape, chip, chips, dtype, sequence_length, stack, global_batch)`, `read_chips`: a training job;
- `predict_job(job, calibration, money, site)`: a `Prediction`, or DoesNotFitError, which says how many chips would do;
- `fewest_chips(job)`: that hold it; a `ServeJob` on too few raises DoesNotFitError, whose `fewest` says it;
- `ServeJob`, `predict_serving(job, calibration, money, site)`: a replica that serves;
- `default_calibration()`, `default_serving_calibration()`: on the rows of this room;
- `calibrate(rows)`, `validate(rows)`: on others;
- `read_rows(path)`, `predict_rows(rows, calibration, site)`: tables;
- `Site`, `site_of(region)`, `Money`: where it stands and what a chip costs;
- `PerformanceError` and its kinds.
"""

import functools

from anypool.plan.performance.calibration import Calibration, Efficiency, calibrate
from anypool.plan.performance.energy import Energy, Region, Site, energy_per_token, regions, site_of
from anypool.plan.performance.errors import DoesNotFitError, PerformanceError, RowsError, ShapeError
from anypool.plan.performance.job import TrainJob, read_chips
from anypool.plan.performance.memory import fewest_chips
from anypool.plan.performance.prediction import Answer, Money, Prediction, Run, listed_price, predict_job, predict_rows
from anypool.plan.performance.rows import ROWS_DATE, Row, parse_rows, read_rows, training_rows
from anypool.plan.performance.serving import (
    ServeJob,
    ServePrediction,
    calibrate_serving,
    predict_serving,
    serving_rows,
)
from anypool.plan.performance.shape import ModelShape, catalogue, find_shape, load_shapes, shape_of_config
from anypool.plan.performance.validate import Validation, validate


@functools.cache
def default_calibration() -> Calibration:
    """Of training, on this room's rows."""
    return calibrate(training_rows(), ROWS_DATE)


@functools.cache
def default_serving_calibration() -> Calibration:
    """Of serving, on this room's rows."""
    return calibrate_serving(serving_rows(), ROWS_DATE)


__all__ = [
    "Answer",
    "Calibration",
    "DoesNotFitError",
    "Efficiency",
    "Energy",
    "ModelShape",
    "Money",
    "PerformanceError",
    "Prediction",
    "Region",
    "Row",
    "RowsError",
    "Run",
    "ServeJob",
    "ServePrediction",
    "ShapeError",
    "Site",
    "TrainJob",
    "Validation",
    "calibrate",
    "calibrate_serving",
    "catalogue",
    "default_calibration",
    "default_serving_calibration",
    "energy_per_token",
    "fewest_chips",
    "find_shape",
    "listed_price",
    "load_shapes",
    "parse_rows",
    "predict_job",
    "predict_rows",
    "predict_serving",
    "read_chips",
    "read_rows",
    "regions",
    "serving_rows",
    "shape_of_config",
    "site_of",
    "training_rows",
    "validate",
]
