"""What is known of chips, and whether a model runs on them."""

from __future__ import annotations

from typing import Annotated

import typer

from anypool.cli.options import CheckFormat, Dtype, Format, FormatOption, app


@app.command()
def chips(
    name: Annotated[
        str | None, typer.Argument(help="A chip, by any of its names; without one, all in a table.", show_default=False)
    ] = None,
    format: FormatOption = Format.table,
) -> None:
    """What is known of each chip: speed, memory, networks, power, compiler and prices, every number with its source.

    **Examples**

    - `anypool chips`
    - `anypool chips v5p`
    - `anypool chips trillium --format json`
    """
    from anypool.chips.show import show_chip, show_chips

    raise typer.Exit(show_chips(format=format.value) if name is None else show_chip(name, format=format.value))


@app.command()
def check(
    model: Annotated[
        str,
        typer.Argument(
            help="A config.json, a Hugging Face directory or id, a GGUF file, or a name such as llama-3.1-8b."
        ),
    ] = "",
    on: Annotated[
        str, typer.Option("--on", metavar="TARGET[,TARGET...]", help="Chips and topologies: v5e:4x4,h100:8,trn2:16.")
    ] = "",
    job: Annotated[str, typer.Option(help="train, prefill, decode, several with commas, or all.")] = "all",
    batch: Annotated[
        int | None, typer.Option(min=1, help="Rows of a training batch, or streams of a worker. Default: by job.")
    ] = None,
    seq: Annotated[int | None, typer.Option(min=1, help="Tokens of each. Default: 4096, or the model's limit.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of products. Default: bfloat16; float32 on the CPU.")] = None,
    mesh: Annotated[
        str | None, typer.Option(metavar="fsdp=8,tensor=4", help="Axes data, fsdp, sequence, tensor. Default: by job.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="adamw or muon.")] = "adamw",
    remat: Annotated[
        str, typer.Option(help="What training keeps: none, projections, attention, full (least).")
    ] = "full",
    micro_batches: Annotated[int, typer.Option(min=1, help="Into how many parts a training batch is divided.")] = 1,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds one compilation may take.")] = 1800,
    memory_gib: Annotated[
        float | None, typer.Option(min=0.5, help="Memory for all compilers. Default: 4/5 of what is free, at most 16.")
    ] = None,
    parallel: Annotated[
        int | None, typer.Option(min=1, help="Compilers at once. Default: by cores and memory.")
    ] = None,
    suggest: Annotated[bool, typer.Option(help="Try what would make fit what does not.")] = True,
    cache: Annotated[bool, typer.Option(help="Answer from the cache what was asked before.")] = True,
    install: Annotated[
        str | None, typer.Option(metavar="tpu|cuda|rocm", help="Install this compiler into the user's cache, and stop.")
    ] = None,
    format: Annotated[CheckFormat, typer.Option(help="A table, one JSON document, or a page.")] = CheckFormat.table,
) -> None:
    """Compile a model for chips that are not here: does it run, and does it fit?

    No weights are read. Exit code 0 only if every target fits.

    **Examples**

    - `anypool check --install tpu` -- once: the TPU compiler, into a folder of its own
    - `anypool check llama-3.1-8b --on v5e:4x4,h100:8,trn2:16 --job decode`
    - `anypool check ./my-model --on v5p:4x4x4 --job train --mesh fsdp=16,tensor=4 --format json`
    """
    from anypool.check import command
    from anypool.check.errors import CheckError

    if install is not None:
        raise typer.Exit(command.install(install))
    if not model or not on:
        raise CheckError("name a model and targets: anypool check llama-3.1-8b --on v5e:4x4,h100:8")
    from anypool.check.options import Options, parse_jobs
    from anypool.check.run import Running

    options = Options(
        jobs=parse_jobs(job),
        batch=batch,
        seq=seq,
        dtype=dtype.value if dtype else None,
        mesh=mesh,
        optimizer=optimizer,
        remat=remat,
        micro_batches=micro_batches,
    )
    running = Running.make(memory_gib, parallel, timeout, suggest, cache)
    raise typer.Exit(command.run(model, on, options, running, format.value))
