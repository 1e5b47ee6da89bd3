"""Training: a run, all runs, and the texts they learn from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anypool.cli.options import Format, FormatOption, app

runs = typer.Typer(no_args_is_help=True, help="List, show and plot training runs.")
data = typer.Typer(no_args_is_help=True, help="Prepare the texts that runs learn from, and look at them.")
app.add_typer(runs, name="runs")
app.add_typer(data, name="data")

StoreOption = Annotated[
    str, typer.Option("--store", help="Where `runs/` is: a folder, or an address such as s3://bucket/prefix.")
]


@app.command()
def train(
    run: Annotated[str, typer.Argument(metavar="RUN.toml", help="The run file.", show_default=False)],
    pool: Annotated[
        str | None, typer.Option(help="Begin on this pool. Default: the first of the file that can take the run.")
    ] = None,
    move_to: Annotated[
        str | None,
        typer.Option("--move-to", help="Commit, and go on at this pool. Works on a run that another command controls."),
    ] = None,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Take the run from a trainer that is still alive; it then stops.")
    ] = False,
    format: FormatOption = Format.table,
) -> None:
    """Train a run: begin it, or go on from its last commit, on the first pool that can take it.

    When the pool is lost, the run goes on at the next one, at most one checkpoint behind. Ctrl-C commits and stops;
    twice stops now. The same command goes on.

    **Examples**

    - `anypool train examples/runs/pretrain-small.toml` -- a small model from nothing, on text that is on every machine
    - `anypool train examples/runs/chat-smollm2.toml`
    - `anypool train my-run.toml --move-to aws-backup` -- on purpose: nothing is done twice
    """
    from anypool.train.run.command import train

    raise typer.Exit(train(run, pool=pool, move_to=move_to, take_over=take_over, format=format.value))


@runs.command("list")
def runs_list(store: StoreOption = ".", format: FormatOption = Format.table) -> None:
    """Every run of a store: where it is, how far, what it cost."""
    import time

    from rich.console import Console

    from anypool.train.report import list_runs, print_runs

    print_runs(list_runs(store), format.value, Console(), time.time())


@runs.command("show")
def runs_show(
    run: Annotated[str, typer.Argument(help="The run's name.", show_default=False)],
    store: StoreOption = ".",
    format: FormatOption = Format.table,
) -> None:
    """One run in full: its pools, every second and dollar, its checkpoints and what happened."""
    import time

    from rich.console import Console

    from anypool.train.report import print_shown, show_run

    print_shown(show_run(store, run), format.value, Console(), time.time())


@runs.command("plot")
def runs_plot(
    run: Annotated[list[str], typer.Argument(help="The run's name; several are drawn over each other.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A .png or .svg file.")] = Path("run.png"),
    store: StoreOption = ".",
) -> None:
    """Draw loss, learning rate and speed over steps, with the pools a run was on and where it was taken over."""
    from anypool.train.report import plot_run

    typer.echo(str(plot_run(store, run, out)))
