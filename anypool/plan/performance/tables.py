"""What the commands print for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from anypool.plan.performance.calibration import INTERVAL, Calibration
from anypool.plan.performance.prediction import Answer
from anypool.plan.performance.validate import Validation

NOT_KNOWN = "-"


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for place, column in enumerate(columns):
        # Names may wrap, numbers not.
        table.add_column(column, justify="left" if place == 0 else "right", no_wrap=place > 0)
    return table


def _percent(value: float | None) -> str:
    return NOT_KNOWN if value is None else f"{100 * value:.1f}%"


def print_validation(
    validation: Validation, serving: Sequence[tuple[str, float, float, bool]], console: Console
) -> None:
    """The schemes beside the constant efficiency, the worst rows, and serving."""
    table = _table(
        *("left\nout", "rows", "mean", "median", "largest", f"inside\n{INTERVAL:.0%}"),
        *("constant\nmean", "constant\nmedian", "rows\nalike", "mean\nof these", "constant\nof these"),
    )
    for scheme in validation.schemes:
        s = scheme.summary()
        table.add_row(
            s["left_out"],
            str(s["rows"]),
            *(_percent(s[key]) for key in ("mape", "median", "largest", "covered", "constant_mape", "constant_median")),
            str(s["in_cell_rows"]),
            _percent(s["in_cell_mape"]),
            _percent(s["in_cell_constant_mape"]),
        )
    console.print("Training, tokens a second and chip: error of each row when predicted without it.")
    console.print(table)
    console.print("constant: the median MFU of the narrowest group that has a row. alike: chip, dtype, kind, software.")
    worst = sorted(validation.schemes[0].rows, key=lambda row: -abs(row.error))[:6]
    table = _table("largest errors, one row left out", "measured", "predicted", "error", "interval")
    for row in worst:
        name = f"{row.model} on {row.chips} {row.chip}, {row.dtype}, {row.stack}"
        table.add_row(
            name,
            f"{row.measured:,.0f}",
            f"{row.predicted:,.0f}",
            f"{row.error:+.1%}",
            f"{row.low:,.0f} to {row.high:,.0f}",
        )
    console.print(table)
    table = _table("serving, one row left out", "measured", "predicted", "error", f"within {INTERVAL:.0%}")
    for name, measured, predicted, inside in serving:
        table.add_row(
            name, f"{measured:,.1f}", f"{predicted:,.1f}", f"{predicted / measured - 1:+.1%}", "yes" if inside else "no"
        )
    console.print(table)


def print_calibration(calibration: Calibration, where: str, console: Console) -> None:
    """The deviations that were found."""
    table = _table("what rows share", "standard deviation")
    for name, variance in calibration.variances.items():
        table.add_row(name if name != "repeat" else "nothing: like runs", f"{variance**0.5:.1%}")
    console.print(f"{len(calibration.points)} rows, {calibration.date}")
    console.print(table)
    console.print(f"A chip without any row: {calibration.uncalibrated_deviation:.1%}.")
    if where:
        console.print(f"written to {escape(where)}")


def print_answers(answers: Sequence[Answer], console: Console) -> None:
    """Each row with its speed, interval and cost, or the reason why there is none."""
    table = _table(
        "job", "tok/s\na chip", f"{INTERVAL:.0%} interval", "MFU", "USD a M\ntokens", "J a token\nchip", "site"
    )
    notes: list[str] = []

    def note(text: str) -> str:
        if text not in notes:
            notes.append(text)
        return f"[{notes.index(text) + 1}]"

    for answer in answers:
        job = answer.row.job
        name = f"{job.shape.name} on {job.chips} {job.chip.name}, {job.dtype}, {job.stack}"
        found = answer.prediction
        if found is None:
            table.add_row(escape(f"{name} {note(answer.reason)}"), "none", "does not fit")
            continue
        marks = note(found.efficiency.basis)
        if found.batch_assumed:
            marks += note("batch not given: one sequence of 8192 tokens on every device is assumed")
        if found.money:
            marks += note(f"{found.money.usd_per_chip_hour:.3g} USD a chip and hour: {found.money.source}")
        if found.energy.note:
            marks += note(f"energy, {found.energy.power_basis or 'no power'}: {found.energy.note}")
        joules, site = found.energy.chip_joules_per_token, found.energy.facility_joules_per_token
        table.add_row(
            escape(f"{name} {marks}"),
            f"{found.tokens_per_second_per_chip:,.0f}",
            f"{found.low:,.0f} to {found.high:,.0f}",
            _percent(found.mfu),
            NOT_KNOWN if found.usd_per_million_tokens is None else f"{found.usd_per_million_tokens:.3g}",
            NOT_KNOWN if joules is None else f"{joules:.3g}",
            NOT_KNOWN if site is None else f"{site:.3g}",
        )
    console.print(table)
    for number, text in enumerate(notes, 1):
        console.print(escape(f"[{number}] {text}"))
