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


@runs.command("export")
def runs_export(
    run: Annotated[str, typer.Argument(help="The run's name.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="A folder to make.", show_default=False)],
    step: Annotated[int | None, typer.Option(min=1, help="Which checkpoint. Default: the last.")] = None,
    store: StoreOption = ".",
) -> None:
    """Write a checkpoint as a model directory for other tools: without the optimizer, adapters merged.

    **Examples**

    - `anypool runs export lora-smollm2 ./my-model`
    - `anypool generate ./my-model "What does os.path.join do?"`
    """
    from anypool.train.run.export import export

    typer.echo(str(export(store, run, out, step)))


@data.command("prepare")
def data_prepare(
    path: Annotated[str, typer.Argument(help="A file, a folder, or a pattern such as 'corpus/*.txt'.")] = "",
    model: Annotated[
        str, typer.Option(help="Whose tokenizer: a bundled name, a directory, a hub id.")
    ] = "smollm2-135m-instruct",
    sequence_length: Annotated[int, typer.Option("--sequence-length", min=8, help="Tokens of a row.")] = 1024,
    kind: Annotated[
        str, typer.Option(help="text, jsonl, parquet, chat, python-docs, python-chat. Default: by the files' names.")
    ] = "",
    field: Annotated[str, typer.Option(help="Of a JSON line or a Parquet table. Default: text, or messages.")] = "",
    split: Annotated[str, typer.Option(help="A text file is one document, or one a part between blank-line.")] = (
        "document"
    ),
    learn: Annotated[str, typer.Option(help="all or answers. Default: answers for chats.")] = "",
    eval_fraction: Annotated[float, typer.Option(min=0.0, max=0.99, help="The part of all documents held out.")] = 0.0,
    home: Annotated[Path | None, typer.Option(help="Where prepared data is kept. Default: the user's cache.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. Default: every core.")] = None,
    format: FormatOption = Format.table,
) -> None:
    """Tokenise and pack texts, once: a run that names the same source finds them.

    **Examples**

    - `anypool data prepare corpus/ --kind text --eval-fraction 0.02`
    - `anypool data prepare answers.jsonl --kind chat --sequence-length 512`
    - `anypool data prepare --kind python-docs` -- text that is on every machine
    """
    from anypool.train.data.command import prepare_command

    code = prepare_command(
        path,
        model=model,
        sequence_length=sequence_length,
        kind=kind,
        field=field,
        split=split,
        learn=learn,
        eval_fraction=eval_fraction,
        home=home,
        workers=workers,
        format=format.value,
    )
    raise typer.Exit(code)


@data.command("inspect")
def data_inspect(
    folder: Annotated[Path, typer.Argument(help="What `anypool data prepare` made.", show_default=False)],
    rows: Annotated[int, typer.Option(min=0, help="How many rows to show as text.")] = 2,
    held_out: Annotated[bool, typer.Option("--held-out", help="Show rows that are held out.")] = False,
    format: FormatOption = Format.table,
) -> None:
    """What is known of prepared texts, and the first rows with what is learned from them marked."""
    from anypool.train.data.command import inspect_command

    raise typer.Exit(inspect_command(folder, rows=rows, side="eval" if held_out else "train", format=format.value))


@data.command("example-chat")
def data_example_chat(
    out: Annotated[Path, typer.Argument(help="A .jsonl file to write.", show_default=False)],
) -> None:
    """Write questions and answers about Python's standard library, made from its documentation on this machine."""
    from anypool.train.data.command import example_chat_command

    raise typer.Exit(example_chat_command(out))
