"""Serving: a fleet, one pool of it, one text."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from anypool.cli.options import Dtype, FleetArgument, Format, TextFormat, app


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
