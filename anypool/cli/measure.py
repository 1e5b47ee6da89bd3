"""Faults made on purpose, and speed."""

from __future__ import annotations

from typing import Annotated

import typer

from anypool.cli.options import FleetArgument, Format, FormatOption, app

drill = typer.Typer(no_args_is_help=True, help="Make a fault on purpose, and measure what it cost.")
bench = typer.Typer(no_args_is_help=True, help="Measure how fast it is on this machine.")
app.add_typer(drill, name="drill")
app.add_typer(bench, name="bench")


@drill.command("serve")
def drill_serve(
    fleet: FleetArgument = None,
    kills: Annotated[int, typer.Option(min=1, help="How many workers to kill, each in the middle of a stream.")] = 10,
    seed: Annotated[int, typer.Option(help="Chooses the prompts, the streams and the tokens at which to kill.")] = 0,
    stall: Annotated[
        bool, typer.Option("--stall", help="Stop workers with SIGSTOP instead: alive, and silent.")
    ] = False,
    format: FormatOption = Format.table,
) -> None:
    """Kill the serving worker in mid-stream, again and again, and compare every byte with an unbroken run.

    Exit code 1 if a token was lost or repeated, or a stream differs.

    **Examples**

    - `anypool drill serve`
    - `anypool drill serve --kills 50 --format json`
    """
    from anypool.drills.serve import run

    raise typer.Exit(run(fleet, kills=kills, seed=seed, stall=stall, format=format.value))


@bench.command("serve")
def bench_serve(
    fleet: FleetArgument = None,
    streams: Annotated[
        list[int], typer.Option("--streams", "-n", min=1, help="How many streams at once; give it several times.")
    ] = [1, 8, 32],  # noqa: B006 - typer wants the list itself
    max_tokens: Annotated[int, typer.Option(min=2, help="How many tokens each stream generates.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is measured; rates are medians.")] = 3,
    peer_python: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="A Python with PyTorch and transformers, to compare with. Default: this one."
        ),
    ] = None,
    format: FormatOption = Format.table,
) -> None:
    """Measure output tokens per second, time to first token and time between tokens.

    On one pool and on all, with the prefix cache cold and warm, and beside transformers where PyTorch is installed.

    **Examples**

    - `anypool bench serve`
    - `anypool bench serve -n 1 -n 16 --format json`
    - `anypool bench serve --peer-python ~/torch/bin/python`
    """
    from anypool.bench.serve import run

    code = run(
        fleet,
        streams=streams,
        max_tokens=max_tokens,
        rounds=rounds,
        peer_python=peer_python,
        format=format.value,
    )
    raise typer.Exit(code)


@drill.command("train")
def drill_train(
    seed: Annotated[int, typer.Option(help="Chooses the steps at which to kill.")] = 0,
    fault: Annotated[
        list[str] | None,
        typer.Option(help="move, checkpoint, same-mesh, zombie, torn, full, corrupt; several times for several."),
    ] = None,
    steps: Annotated[int, typer.Option(min=20, help="How many steps each run takes.")] = 40,
    format: FormatOption = Format.table,
) -> None:
    """Lose trainers in every way, go on at other pools, and compare with a run that nothing happened to.

    Pools are this machine's CPU as 4 and as 2 devices. Exit code 1 if a sample was repeated or skipped, a fenced
    trainer committed, or the loss differs.

    **Examples**

    - `anypool drill train`
    - `anypool drill train --fault zombie --seed 3 --format json`
    """
    from anypool.drills.train import run

    raise typer.Exit(run(seed=seed, faults=fault, steps=steps, format=format.value))
