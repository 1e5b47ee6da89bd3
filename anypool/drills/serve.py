"""`anypool drill serve`: workers lost in the middle of their streams, and what their clients notice.

Streams run in groups, each group twice: first unbroken, then again while the worker that serves one of them is lost at
a random token of it. Both runs are compared byte for byte. Every stream has a cache salt of its own, so that the second
run computes everything the first one did, and the figures hold for prompts that no pool has seen.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import signal
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from anypool.drills.compare import Difference, compare
from anypool.drills.prompts import draw_group
from anypool.measure import Serving, Stream, read_stream, serving
from anypool.measure.report import circumstances, percentiles
from anypool.pools import load_fleet
from anypool.progress import bars

log = logging.getLogger(__name__)

ATTEMPTS_A_KILL = 10
"""So many kills in a row may come too late; then the drill itself is what does not work."""


class DrillError(ValueError):
    """The drill cannot be made with this fleet, or did not go as a drill must."""


@dataclass(frozen=True)
class Fault:
    """A worker was lost. `at`: `time.monotonic()` just before the signal was sent."""

    pool: str
    pid: int
    at: float


@dataclass
class Findings:
    """What a drill saw. Times in seconds; the first four lists have one entry for every stream that was interrupted."""

    streams: int = 0
    streams_interrupted: int = 0
    tokens: int = 0
    kills: int = 0
    kills_too_late: int = 0
    tokens_lost: int = 0
    tokens_repeated: int = 0
    streams_differing: int = 0
    gaps: list[float] = field(default_factory=list)
    detections: list[float] = field(default_factory=list)
    prefills: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.tokens_lost or self.tokens_repeated or self.streams_differing)

    def report(self) -> dict[str, Any]:
        """Counts and times, in milliseconds, by the words of the tables."""
        counts = ("streams", "streams_interrupted", "tokens", "kills", "kills_too_late")
        losses = ("tokens_lost", "tokens_repeated", "streams_differing")
        return {
            **{name: getattr(self, name) for name in (*counts, *losses)},
            "gap_ms": percentiles(self.gaps, largest=True),
            "detection_ms": percentiles(self.detections, largest=True),
            "prefill_ms": percentiles(self.prefills, largest=True),
            "first_token_ms": percentiles(self.first_tokens, largest=True),
        }


def run(fleet: str | None, *, kills: int, seed: int, stall: bool, format: str) -> int:
    """Makes the drill and prints what it saw; 1 if a client could have noticed more than a pause, else 0.

    fleet: a fleet file, None for the default one. stall: stop the workers (SIGSTOP) instead of killing them.
    Raises FleetError, ServingError, DrillError.
    """
    loaded = load_fleet(fleet)
    pools = loaded.serving_pools
    if len(pools) < 2 or any(pool.launcher != "local" for pool in pools):
        kinds = ", ".join(f"{pool.name} ({pool.launcher})" for pool in pools)
        raise DrillError(
            f"fleet {loaded.name!r} serves from {kinds}: a drill needs two pools or more, "
            'all with launcher = "local", because it kills their workers'
        )
    where, started = circumstances(), time.monotonic()
    with bars(Console(stderr=True)) as progress:
        findings = asyncio.run(_drill(fleet, kills, random.Random(seed), stall, progress))
    document = {
        "fleet": loaded.name,
        "model": loaded.model.name,
        "pools": len(pools),
        "signal": _signal(stall).name,
        "seed": seed,
        **findings.report(),
        "seconds": round(time.monotonic() - started, 1),
        **where,
    }
    print(json.dumps(document, indent=2)) if format == "json" else _print_tables(document)
    return 0 if findings.clean else 1


async def _drill(fleet: str | None, kills: int, rng: random.Random, stall: bool, progress: Progress) -> Findings:
    findings = Findings()
    starting = progress.add_task("starting the fleet", total=None)
    async with serving(fleet, on_log=lambda line: progress.update(starting, description=line[:60])) as running:
        progress.remove_task(starting)
        bar = progress.add_task("workers lost", total=kills)
        gone: list[int] = []
        group, late = 0, 0
        while findings.kills < kills:
            group += 1
            requests = draw_group(rng, running.model)
            victim = rng.randrange(len(requests))
            unbroken = await _unbroken(running, requests, f"drill-{group}-unbroken")
            token = rng.randrange(len(unbroken[victim].token_ids))
            # A fail-over must have a place to go, and the next fault a worker of its own.
            pids = await running.ready(without=gone)
            broken, fault = await _broken(
                running, requests, f"drill-{group}-broken", victim, token, pids, _signal(stall)
            )
            gone += [fault.pid] if fault else []
            hit = fault is not None and _failover(broken[victim], fault) is not None
            late = 0 if hit else late + 1
            if late == ATTEMPTS_A_KILL:
                raise DrillError(f"{late} streams in a row ended before their worker was lost: the last {broken[-1]}")
            findings.kills += hit
            findings.kills_too_late += fault is not None and not hit
            _add(findings, requests, unbroken, broken, fault)
            progress.update(bar, completed=findings.kills)
            log.info(
                "lost pool=%s at_token=%d of=%d group=%d kills=%d/%d differing=%d",
                fault.pool if fault else "-", token, len(unbroken[victim].token_ids), len(requests),
                findings.kills, kills, findings.streams_differing,
            )  # fmt: skip
    return findings


async def _unbroken(running: Serving, requests: list[dict[str, Any]], salt: str) -> list[Stream]:
    """The group undisturbed. Raises DrillError if it was disturbed all the same."""
    streams = await asyncio.gather(
        *(read_stream(running.session, running.url, request) for request in _salted(requests, salt))
    )
    for stream in streams:
        if stream.error is not None or stream.trace.get("failovers") or not stream.token_ids:
            raise DrillError(f"a stream was disturbed before any fault was made: {stream.error or stream.trace}")
    return streams


def _salted(requests: list[dict[str, Any]], salt: str) -> list[dict[str, Any]]:
    """The requests with a cache of its own for each, so that none depends on what another has left there."""
    return [request | {"cache_salt": f"{salt}-{index}"} for index, request in enumerate(requests)]


async def _broken(
    running: Serving,
    requests: list[dict[str, Any]],
    salt: str,
    victim: int,
    token: int,
    pids: dict[str, int],
    number: signal.Signals,
) -> tuple[list[Stream], Fault | None]:
    """The group again; the worker of stream `victim` gets the signal when that stream has `token` tokens."""
    fault: Fault | None = None

    def strike(stream: Stream) -> None:
        nonlocal fault
        if fault is None and len(stream.token_ids) >= token:
            pid = pids[stream.pool]
            fault = Fault(stream.pool, pid, time.monotonic())
            os.kill(pid, number)

    def ignore(_: Stream) -> None:
        pass

    streams = await asyncio.gather(
        *(
            read_stream(running.session, running.url, request, on_news=strike if index == victim else ignore)
            for index, request in enumerate(_salted(requests, salt))
        )
    )
    return streams, fault


def _add(
    findings: Findings,
    requests: list[dict[str, Any]],
    unbroken: list[Stream],
    broken: list[Stream],
    fault: Fault | None,
) -> None:
    """Adds a group's streams, compared and measured."""
    for request, reference, stream in zip(requests, unbroken, broken, strict=True):
        difference = compare(reference, stream)
        findings.streams += 1
        findings.tokens += len(stream.token_ids)
        findings.tokens_lost += difference.tokens_lost
        findings.tokens_repeated += difference.tokens_repeated
        if difference.what:
            findings.streams_differing += 1
            _describe(request, reference, stream, difference)
        failover = _failover(stream, fault)
        if fault is not None and failover is not None:
            findings.streams_interrupted += 1
            _measure(findings, stream, failover, fault)


def _failover(stream: Stream, fault: Fault | None) -> dict[str, Any] | None:
    """The stream's move away from the lost worker, by the gateway's account; None if it was not there."""
    for failover in stream.trace.get("failovers", []):
        if fault is not None and failover["from"] == fault.pool and failover["detected_at"] >= fault.at:
            found: dict[str, Any] = failover
            return found
    return None


def _measure(findings: Findings, stream: Stream, failover: dict[str, Any], fault: Fault) -> None:
    """What the move took. A stream that had no token yet waited from the fault on."""
    before, after = stream.around(failover["emitted_tokens"])
    findings.detections.append(failover["detected_at"] - fault.at)
    if after is None or failover["prefill_done_at"] is None:
        return  # all its tokens were out: only its ending was lost
    findings.gaps.append(after - (fault.at if before is None else before))
    findings.prefills.append(failover["prefill_done_at"] - failover["detected_at"])
    findings.first_tokens.append(after - failover["prefill_done_at"])


def _describe(request: dict[str, Any], unbroken: Stream, broken: Stream, difference: Difference) -> None:
    """A stream that differs, with what it takes to repeat it, on standard error."""
    lines = [
        "a stream differs from its unbroken run:",
        *difference.what,
        f"unbroken: pools {unbroken.trace.get('pools')}",
        f"broken: pools {broken.trace.get('pools')}, fail-overs {broken.trace.get('failovers')}",
        f"request: {json.dumps(request, ensure_ascii=False)}",
    ]
    sys.stderr.write("\n  ".join(lines) + "\n")


def _signal(stall: bool) -> signal.Signals:
    return signal.SIGSTOP if stall else signal.SIGKILL


def _print_tables(document: dict[str, Any]) -> None:
    """Two tables on standard output: what was counted, and what was timed."""
    console = Console()
    counted = Table("drill", "")
    timed = Table("", "p50", "p95", "max")
    for name, value in document.items():
        words = name.replace("_", " ")
        if name.endswith("_ms"):
            timed.add_row(words, *("-" if number is None else f"{number:.1f}" for number in value.values()))
        elif not isinstance(value, dict):
            counted.add_row(words, str(value))
    console.print(counted)
    console.print(timed)
