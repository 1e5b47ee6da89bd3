"""`anypool bench serve`: the speed of a fleet as its clients see it, beside transformers where that is installed.

Every stream has a prompt of 128 token ids that no pool has seen (cache cold), or the same prompts once more (warm), and
generates greedily the same number of tokens. The fleet with its first pool only and the whole fleet are measured one
after the other; in each, the fleet and transformers take turns, round by round, so that both meet the same machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from anypool.bench.figures import Round, Row
from anypool.bench.peer import Peer, default_python, peer
from anypool.measure import Serving, read_stream, serving
from anypool.measure.report import circumstances
from anypool.models import Tokenizer
from anypool.pools import Fleet, load_fleet
from anypool.progress import bars, resolve_shown

log = logging.getLogger(__name__)

PROMPT_TOKENS = 128
OURS, THEIRS = "anypool", "transformers"


class BenchError(ValueError):
    """The fleet refused or lost a stream, so there is nothing to measure."""


@dataclass
class Load:
    """What is asked of every engine."""

    streams: tuple[int, ...]
    max_tokens: int
    rounds: int
    vocab_size: int
    rng: random.Random

    def prompts(self, count: int) -> list[list[int]]:
        """Prompts that were never used before."""
        return [[self.rng.randrange(self.vocab_size) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def run(
    fleet: str | None, *, streams: Sequence[int], max_tokens: int, rounds: int, peer_python: str | None, format: str
) -> int:
    """Measures and prints; the exit code.

    fleet: a fleet file, None for the default one. peer_python: the interpreter that has transformers; None is this one,
    and no comparison if it has not. Raises FleetError, ModelError, ServingError, PeerError, BenchError.
    """
    loaded, where = load_fleet(fleet), circumstances()
    python = peer_python or default_python()
    if python is None:
        log.info("no comparison: this Python has no PyTorch and transformers; name one that has with --peer-python")
    with bars(Console(stderr=True)) as progress:
        directory = resolve_shown(loaded.model.id, progress)
        # No seed: what the ids are changes no figure, and an external pool may remember those of an earlier run.
        load = Load(tuple(streams), max_tokens, rounds, Tokenizer.load(directory).vocab_size, random.Random())
        rows, versions = asyncio.run(_bench(fleet, loaded, load, python, directory, progress))
    document: dict[str, Any] = {
        "fleet": loaded.name,
        "model": loaded.model.name,
        "dtype": loaded.model.dtype,
        "prompt_tokens": PROMPT_TOKENS,
        "max_tokens": max_tokens,
        "rounds": rounds,
        "rows": [row.report() for row in rows],
        **where,
    }
    document["versions"] |= versions
    print(json.dumps(document, indent=2)) if format == "json" else _print_table(document)
    return 0


async def _bench(
    fleet: str | None, loaded: Fleet, load: Load, python: str | None, directory: Path, progress: Progress
) -> tuple[list[Row], dict[str, str]]:
    """Every row of the table, and the versions of the other engine."""
    names = [pool.name for pool in loaded.serving_pools]
    selections = [names[:1], names] if len(names) > 1 else [names]
    bar = progress.add_task("measuring", total=len(selections) * load.rounds * len(load.streams))
    rows: list[Row] = []
    async with contextlib.AsyncExitStack() as stack:
        other = await stack.enter_async_context(peer(python, directory, loaded.model.dtype)) if python else None
        for pools in selections:
            progress.update(bar, description=f"starting {', '.join(pools)}")
            async with serving(fleet, pools) as running:
                progress.update(bar, description=f"measuring {', '.join(pools)}")
                rows += await _measure(running, other, load, lambda: progress.advance(bar))
        return rows, other.versions if other else {}


async def _measure(running: Serving, other: Peer | None, load: Load, advance: Callable[[], None]) -> list[Row]:
    """One fleet under each number of streams, in turns with the other engine."""
    pools = len(running.pools)
    rows: list[Row] = []
    for count in load.streams:
        theirs = Row(THEIRS, pools, count, "none") if other else None
        rows += [Row(OURS, pools, count, "cold", peer=theirs), Row(OURS, pools, count, "warm")]
        rows += [theirs] if theirs else []
        # Not counted: the first time, memory is touched and code paths are set up.
        await _ours(running, load.prompts(count), load.max_tokens)
        if other:
            await _theirs(other, load.prompts(count), load.max_tokens)
    for number in range(load.rounds):
        for count in load.streams:
            prompts = load.prompts(count)
            for row in rows:
                if row.streams != count:
                    continue
                if row.engine == THEIRS and other is not None:
                    row.rounds.append(await _theirs(other, prompts, load.max_tokens))
                else:
                    row.rounds.append(await _ours(running, prompts, load.max_tokens))
            advance()
            log.info("measured pools=%d streams=%d round=%d/%d", pools, count, number + 1, load.rounds)
    return rows


async def _ours(running: Serving, prompts: list[list[int]], max_tokens: int) -> Round:
    """All prompts at once, a stream each. Raises BenchError if one is not served to its last token."""
    body = {"model": running.model, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    started = time.monotonic()
    streams = await asyncio.gather(
        *(read_stream(running.session, running.url, body | {"prompt": prompt}) for prompt in prompts)
    )
    for stream in streams:
        if stream.error is not None or len(stream.token_ids) != max_tokens:
            raise BenchError(f"a stream got {len(stream.token_ids)} of {max_tokens} tokens: {stream.error}")
    arrivals = [[(at - started, count) for at, count in stream.arrivals] for stream in streams]
    return Round(arrivals, [stream.first_token_at - stream.sent_at for stream in streams])


async def _theirs(other: Peer, prompts: list[list[int]], max_tokens: int) -> Round:
    """All prompts as one batch: its streams get every token at the same time."""
    times = await other.generate(prompts, max_tokens)
    return Round([[(at, 1) for at in times] for _ in prompts], [times[0] for _ in prompts])


def _print_table(document: dict[str, Any]) -> None:
    """One table on standard output; pairs are p50 / p95, or whole run / decoding."""
    rows = document["rows"]
    table = Table(
        title=f"{document['model']} {document['dtype']}, {document['machine']['cores']} x {document['machine']['cpu']}",
        caption="milliseconds: p50 / p95; ratio: whole run / while decoding",
    )
    for name in rows[0]:
        table.add_column(name.replace("_", " "), min_width=max(map(len, name.split("_"))))
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    # A file or a pipe has no width of its own; eighty columns would break every cell.
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _cell(value: Any) -> str:
    match value:
        case None:
            return "-"
        case dict():
            return "\N{NO-BREAK SPACE}/\N{NO-BREAK SPACE}".join(_cell(number) for number in value.values())
        case float():
            return f"{value:.3g}" if value < 10 else f"{value:.1f}"
        case _:
            return str(value)
