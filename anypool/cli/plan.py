"""Planning: how fast, how dear and how hungry a job is on a chip, and how good such predictions are."""

from __future__ import annotations

from typing import Annotated

import typer

from anypool.cli.options import Format, FormatOption, app

plan = typer.Typer(no_args_is_help=True, help="Predict speed, cost and energy of a job on a chip.")
app.add_typer(plan, name="plan")

ModelsOption = Annotated[
    str | None,
    typer.Option("--models", metavar="MODELS.toml", help="Shapes of further models, as in the room's models.toml."),
]
RowsOption = Annotated[
    str | None, typer.Option("--rows", metavar="ROWS.csv", help="Measured rows. Default: the published ones.")
]


@plan.command()
def validate(rows: RowsOption = None, models: ModelsOption = None, format: FormatOption = Format.table) -> None:
    """How good predictions are: each row predicted without it, its model, its chip and its vendor."""
    from anypool.plan.performance.command import validate_command

    raise typer.Exit(validate_command(rows, models=models, format=format.value))


@plan.command()
def calibrate(
    rows: RowsOption = None,
    models: ModelsOption = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="A .json file for `predict --calibration`.")] = None,
    format: FormatOption = Format.table,
) -> None:
    """Learn efficiencies from measured rows, your own included, and write them down with date and residuals."""
    from anypool.plan.performance.command import calibrate_command

    raise typer.Exit(calibrate_command(rows, models=models, out=out, format=format.value))


@plan.command()
def predict(
    rows: Annotated[
        str, typer.Argument(metavar="ROWS.csv", help="One job a line; results stay empty.", show_default=False)
    ],
    models: ModelsOption = None,
    calibration: Annotated[
        str | None, typer.Option(help="What `calibrate --out` wrote. Default: the published rows.")
    ] = None,
    region: Annotated[
        str | None, typer.Option(help="Whose PUE and grid are taken, such as google/us-central1.")
    ] = None,
    pue: Annotated[float | None, typer.Option(help="Of the site, in place of the region's.")] = None,
    grams_co2e_per_kwh: Annotated[
        float | None, typer.Option("--grams-co2e-per-kwh", help="Of the grid, in place of the region's.")
    ] = None,
    it_factor: Annotated[
        float | None,
        typer.Option("--it-factor", help="Watts of machines and network over the chips', where not known."),
    ] = None,
    run_tokens: Annotated[float | None, typer.Option("--run-tokens", help="Of a whole run: its time and cost.")] = None,
    format: FormatOption = Format.table,
) -> None:
    """Predict each job of a table: memory first, then tokens a second with an 80% interval, money and energy.

    The columns are model, chip, chips, dtype, seq, and if known global_batch, stack, usd_per_chip_hour. The exit code
    is 1 if a job does not fit its chips.

    **Examples**

    - `anypool plan predict jobs.csv`
    - `anypool plan predict jobs.csv --region google/us-central1 --run-tokens 15e12 --format json`
    """
    from anypool.plan.performance.command import predict_command

    code = predict_command(
        rows,
        models=models,
        calibration=calibration,
        region=region,
        pue=pue,
        grams_co2e_per_kwh=grams_co2e_per_kwh,
        it_factor=it_factor,
        run_tokens=run_tokens,
        format=format.value,
    )
    raise typer.Exit(code)
