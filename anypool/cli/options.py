"""The application all commands register with, and the options that several of them share."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

app = typer.Typer(
    name="anypool",
    help="Train and serve one language model on every accelerator pool you hold.",
    epilog="Start here: `anypool up` serves a small real model from two pools on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Format(StrEnum):
    """How a report is printed."""

    table = "table"
    json = "json"


class CheckFormat(StrEnum):
    """How a check is printed."""

    table = "table"
    json = "json"
    html = "html"


class TextFormat(StrEnum):
    """How generated text is printed."""

    text = "text"
    json = "json"


class Dtype(StrEnum):
    """In what the weights are held and multiplied."""

    float32 = "float32"
    bfloat16 = "bfloat16"


FleetArgument = Annotated[
    str | None,
    typer.Argument(metavar="FLEET.toml", help="The fleet file; without one, two pools on this machine."),
]
FormatOption = Annotated[
    Format, typer.Option(help="A table to read, or one JSON document on standard output to process.")
]
