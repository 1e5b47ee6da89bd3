"""The commands. Each one is thin and calls one function of a room; nothing heavy is imported before it is needed."""

from __future__ import annotations

import dataclasses
import sys
from enum import StrEnum
from typing import Annotated

import typer

app = typer.Typer(
    name="anypool",
    help="Serve one language model from every accelerator pool you hold, behind one OpenAI-compatible endpoint.",
    epilog="Start here: `anypool up` serves a small real model from two pools on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
drill = typer.Typer(no_args_is_help=True, help="Make a fault on purpose, and measure what it cost.")
bench = typer.Typer(no_args_is_help=True, help="Measure how fast it is on this machine.")
app.add_typer(drill, name="drill")
app.add_typer(bench, name="bench")


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


@app.command()
def up(
    fleet: FleetArgument = None,
    host: Annotated[
        str | None, typer.Option(help="Listen on this address instead of the file's; 0.0.0.0 is every one.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Listen on this port instead of the file's; 0 takes a free one."),
    ] = None,
    pool: Annotated[
        list[str] | None, typer.Option(help="Serve only from this pool of the file; give it several times.")
    ] = None,
    format: Annotated[
        Format, typer.Option(help="What is printed once the fleet serves: text to read, or one line of JSON.")
    ] = Format.table,
    supervised: Annotated[
        bool, typer.Option("--supervised", hidden=True, help="Started by another program: end when it ends.")
    ] = False,
) -> None:
    """Serve a fleet: start its pools and one endpoint in front of them.

    **Examples**

    - `anypool up` -- a small real model from two pools on this machine, at http://127.0.0.1:8000
    - `anypool up my-fleet.toml --port 9000`
    - `anypool up --port 0 --format json` -- for a program: it reads the address from standard output

    Ctrl-C lets running streams finish and then stops; a second one stops at once.
    """
    if supervised:
        from anypool.pools.guard import die_with_parent

        die_with_parent()
    from anypool.pools import load_fleet

    loaded = load_fleet(fleet).only(pool)
    gateway = loaded.gateway
    gateway = dataclasses.replace(gateway, host=host or gateway.host, port=gateway.port if port is None else port)
    from anypool.up import run

    raise typer.Exit(run(dataclasses.replace(loaded, gateway=gateway), format=format.value))


@app.command()
def worker(
    model: Annotated[
        str, typer.Option(help="A bundled name, a Hugging Face directory or id, or a GGUF file.")
    ] = "smollm2-135m-instruct",
    name: Annotated[str, typer.Option(help="The pool's name, for logs and metrics.")] = "worker",
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on; 0 takes a free one.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="In what weights are held and multiplied.")] = Dtype.float32,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="How many streams run at once.")] = 32,
    token_budget: Annotated[int, typer.Option(min=16, help="How many tokens one step computes at most.")] = 256,
    max_model_len: Annotated[
        int | None,
        typer.Option(min=16, help="Longest prompt and answer together, in tokens. Default: the model's, at most 8192."),
    ] = None,
    kv_cache_gib: Annotated[float, typer.Option(min=0.001, help="Memory for the key-value cache, in GiB.")] = 1.0,
    max_waiting: Annotated[int, typer.Option(min=0, help="How many requests may queue before one is refused.")] = 256,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: every core.")] = None,
    reference_kernels: Annotated[
        bool, typer.Option("--reference-kernels", help="Use the plain form of every operation: slow, for comparison.")
    ] = False,
    supervised: Annotated[
        bool, typer.Option("--supervised", hidden=True, help="Started by a launcher: end when it ends.")
    ] = False,
) -> None:
    """Serve one pool's part of a model: tokens in, tokens out. `anypool up` starts these by itself.

    Start one by hand to put a pool on another machine; its fleet file then joins it with `launcher = "external"`.

    **Examples**

    - `anypool worker --port 9001`
    - `anypool worker --model ./Llama-3.2-1B-Instruct --dtype bfloat16 --kv-cache-gib 8 --port 9001`
    """
    if supervised:
        from anypool.pools.guard import die_with_parent
        from anypool.pools.lifeline import hold

        die_with_parent()
        hold()
    from anypool.engine.server import WorkerOptions, run_worker

    options = WorkerOptions(
        model=model,
        name=name,
        host=host,
        port=port,
        dtype=dtype.value,
        max_num_seqs=max_num_seqs,
        token_budget=token_budget,
        max_model_len=max_model_len,
        kv_cache_gib=kv_cache_gib,
        max_waiting=max_waiting,
        threads=threads,
        faster_kernels=not reference_kernels,
        supervised=supervised,
    )
    raise typer.Exit(run_worker(options))


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A bundled name, a Hugging Face directory or id, or a GGUF file.")],
    prompt: Annotated[str, typer.Argument(help="What to say to the model.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="How many tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens of this mass.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    dtype: Annotated[Dtype, typer.Option(help="In what weights are held and multiplied.")] = Dtype.float32,
    format: Annotated[TextFormat, typer.Option(help="The text as it comes, or one JSON document.")] = TextFormat.text,
) -> None:
    """Generate one text in this process, with no server.

    **Examples**

    - `anypool generate smollm2-135m-instruct "What is a pool?"`
    - `anypool generate smollm2-135m-instruct "Once upon a time" --raw --temperature 0.8 --seed 7`
    """
    from anypool.generate import run

    run(
        model=model,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        chat=not raw,
        dtype=dtype.value,
        format=format.value,
    )


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
