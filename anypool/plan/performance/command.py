"""`anypool plan validate`, `calibrate` and `predict`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console

from anypool.plan.performance.calibration import QUANTILE, Calibration, calibrate
from anypool.plan.performance.energy import Site, site_of
from anypool.plan.performance.errors import PerformanceError
from anypool.plan.performance.prediction import predict_rows
from anypool.plan.performance.rows import ROWS_DATE, Row, read_rows, training_rows
from anypool.plan.performance.serving import serving_rows, validate_serving
from anypool.plan.performance.shape import load_shapes
from anypool.plan.performance.tables import print_answers, print_calibration, print_validation
from anypool.plan.performance.validate import validate


def validate_command(rows: str | None, *, models: str | None, format: str) -> int:
    """Prints how good predictions are on the room's rows, or on those of a file. Returns the exit code."""
    validation = validate(_rows(rows, models))
    serving = [
        (_serving_name(row.job), row.output_tokens_per_second_per_chip, predicted, deviation)
        for row, predicted, deviation in validate_serving(serving_rows())
    ]
    inside = [
        abs(math.log(predicted / measured)) <= QUANTILE * deviation for _, measured, predicted, deviation in serving
    ]
    if format == "json":
        listed = [
            {"row": name, "measured": measured, "predicted": predicted, "inside": ok}
            for (name, measured, predicted, _), ok in zip(serving, inside, strict=True)
        ]
        print(json.dumps({"training": validation.as_json(), "serving": listed}, indent=2))
        return 0
    shown = [(name, m, p, ok) for (name, m, p, _), ok in zip(serving, inside, strict=True)]
    print_validation(validation, shown, Console(highlight=False))
    return 0


def _serving_name(job: Any) -> str:
    return f"{job.shape.name} on {job.chips} {job.chip.name}, {job.dtype}, {job.input_tokens}/{job.output_tokens}"


def calibrate_command(rows: str | None, *, models: str | None, out: str | None, format: str) -> int:
    """Calibrates on the room's rows, or on those of a file, and writes the calibration to `out`."""
    found = calibrate(_rows(rows, models))
    if out:
        try:
            found.save(out)
        except OSError as error:
            raise PerformanceError(f"--out = {out!r}: cannot be written: {error}") from None
    if format == "json":
        print(json.dumps(found.as_json(), indent=2))
    else:
        print_calibration(found, out or "", Console(highlight=False))
    return 0


def predict_command(
    rows: str,
    *,
    models: str | None,
    calibration: str | None,
    region: str | None,
    pue: float | None,
    grams_co2e_per_kwh: float | None,
    it_factor: float | None,
    run_tokens: float | None,
    format: str,
) -> int:
    """Predicts every row of a file. The exit code is 1 if one of them does not fit its chips."""
    asked = read_rows(rows, load_shapes(Path(models) if models else None))
    known = Calibration.load(calibration) if calibration else calibrate(training_rows(), ROWS_DATE)
    answers = predict_rows(asked, known, _site(region, pue, grams_co2e_per_kwh, it_factor))
    if format == "json":
        listed = []
        for answer in answers:
            one = answer.as_json()
            if run_tokens is not None and answer.prediction is not None:
                one["run"] = answer.prediction.run(run_tokens).as_json()
            listed.append(one)
        print(json.dumps(listed, indent=2))
    else:
        console = Console(highlight=False)
        print_answers(answers, console)
        for answer in answers if run_tokens is not None else ():
            if answer.prediction is not None and run_tokens is not None:
                run = answer.prediction.run(run_tokens)
                job = answer.row.job
                cost = "price not known" if run.usd is None else f"{run.usd:,.0f} USD"
                console.print(
                    f"{run_tokens:.3g} tokens of {job.shape.name} on {job.chips} {job.chip.name}: "
                    f"{run.seconds / 86400:,.2f} days ({run.seconds_low / 86400:,.2f} to "
                    f"{run.seconds_high / 86400:,.2f}), {run.chip_hours:,.0f} chip-hours, {cost}"
                )
    return 1 if any(answer.prediction is None for answer in answers) else 0


def _rows(path: str | None, models: str | None) -> tuple[Row, ...]:
    if path is None:
        return training_rows()
    return read_rows(path, load_shapes(Path(models) if models else None))


def _site(region: str | None, pue: float | None, grams: float | None, it_factor: float | None) -> Site:
    """A region's figures, each replaced by what is given."""
    site = site_of(region, it_factor) if region else Site(it_factor=it_factor)
    return Site(
        pue=site.pue if pue is None else pue,
        grams_co2e_per_kwh=site.grams_co2e_per_kwh if grams is None else grams,
        it_factor=it_factor,
        source=site.source if pue is None and grams is None else f"given; {site.source}",
    )
