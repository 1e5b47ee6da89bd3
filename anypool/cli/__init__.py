"""The commands. Each one is thin and calls one function of a room; nothing heavy is imported before it is needed.

serve.py    up, worker, generate          train.py    train, runs, data
check.py    chips, check                  measure.py  drill, bench
plan.py     plan
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from anypool.cli import check, measure, plan, serve, train
from anypool.cli.options import app

__all__ = ["app", "check", "main", "measure", "plan", "serve", "train"]


def main() -> None:
    """The entry point: runs a command, and turns a user's mistake into one line and exit code 2."""
    try:
        app()
    except ValueError as error:
        # Our own kinds name the field, the value and the fix. Any other ValueError is a fault of ours: show all of it.
        if not type(error).__module__.startswith("anypool."):
            raise
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


def _version(wanted: bool) -> None:
    if wanted:
        from anypool import __version__

        typer.echo(f"anypool {__version__}")
        raise typer.Exit


@app.callback()
def anypool(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Serve one language model from every accelerator pool you hold, behind one OpenAI-compatible endpoint."""
    from anypool import logs

    logs.setup()
