"""A run's record read back: what all its trainers wrote, and which of their steps still count."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeVar

from anypool.store import NotFoundError, Store
from anypool.train.report.holders import FROM_NOTHING, Holding, holdings
from anypool.train.report.lines import (
    Ended,
    Event,
    LedgerLine,
    MetricsLine,
    Opened,
    PoolFacts,
    RunFacts,
    Time,
    decode_ledger,
    decode_metrics,
)

_FETCHES = 8
"""Parts fetched at once: a distant store answers each of them late."""

_PART = re.compile(r"e(\d{6,})/part-(\d{5,})\.jsonl$")
_CHECKPOINT = re.compile(r"step-(\d+)-e(\d+)")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Epoch:
    """What one holder of the run left. Lists are in the order they were written. Times in nanoseconds since 1970.

    opened: None if it ended before its first line was in the store. ended: None if it did not stop on purpose, or could
    not write it. holding: what its lease says, None if there is none.
    """

    number: int
    opened: Opened | None = None
    ended: Ended | None = None
    times: tuple[Time, ...] = ()
    events: tuple[Event, ...] = ()
    lines: tuple[MetricsLine, ...] = ()
    holding: Holding | None = None

    @property
    def pool(self) -> PoolFacts:
        """Without lines only its name is known, if that."""
        if self.opened is not None:
            return self.opened.pool
        return PoolFacts(self.holding.pool if self.holding else "unknown", "unknown", 1, 1)

    @property
    def run(self) -> RunFacts:
        return self.opened.run if self.opened else RunFacts()

    @property
    def held_ns(self) -> int:
        """From when on it held the run: its lease's time, or when it began to record."""
        if self.holding is not None:
            return self.holding.since_ns
        return self.opened.at_ns if self.opened else self.started_ns

    @property
    def started_ns(self) -> int:
        """When its process began; the first time that is known of it if it did not say."""
        if self.opened is not None:
            return self.opened.started_ns
        firsts = [time.start_ns for time in self.times[:1]] + [event.at_ns for event in self.events[:1]]
        firsts += [round((line.at - line.seconds) * 1e9) for line in self.lines[:1]]
        firsts += [self.ended.at_ns] if self.ended else []
        firsts += [self.holding.since_ns] if self.holding else []
        return min(firsts)

    @cached_property
    def last_line_ns(self) -> int:
        """Up to when its lines say what it did."""
        ends = [self.started_ns, *(time.end_ns for time in self.times), *(event.at_ns for event in self.events)]
        ends += [self.opened.at_ns] if self.opened else []
        ends += [self.ended.at_ns] if self.ended else []
        return max(ends)

    @property
    def last_sign_ns(self) -> int:
        """Its last line or its last heartbeat, whichever came later."""
        signs = [self.last_line_ns]
        if self.holding is not None:
            signs += [self.holding.since_ns, self.holding.heartbeat_ns or 0]
        return max(signs)

    @property
    def stopped(self) -> str | None:
        """Why it stopped on purpose; None if it did not, or has not yet."""
        if self.holding is not None and self.holding.released is not None:
            return self.holding.released
        return self.ended.reason if self.ended else None

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """As its ledger has them, in order."""
        return tuple(time.step for time in self.times if time.step is not None)

    @cached_property
    def redone(self) -> frozenset[int]:
        """Places in `times` of steps that this same trainer made again later."""
        if all(later > earlier for earlier, later in pairwise(self.steps)):
            return frozenset()
        made = [(place, time.step) for place, time in enumerate(self.times) if time.step is not None]
        left = {place for place, _ in _not_redone(made, lambda entry: entry[1], lambda _: True)}
        return frozenset(place for place, _ in made if place not in left)


@dataclass(frozen=True)
class RunRecord:
    """All epochs of a run, oldest first. problems: what could not be read, each with the place, in words.

    url: of the run's place in its store.
    """

    url: str
    epochs: tuple[Epoch, ...]
    problems: tuple[str, ...] = ()

    @property
    def total_steps(self) -> int | None:
        """As the newest trainer that said so was told."""
        told = [epoch.run.total_steps for epoch in self.epochs if epoch.run.total_steps is not None]
        return told[-1] if told else None

    def kept(self) -> list[MetricsLine]:
        """Lines of metrics without those of steps that were lost, in the order of the run."""
        limits = last_kept(self.epochs)
        found: list[MetricsLine] = []
        for epoch in self.epochs:
            found += [line for line in epoch.lines if line.step <= limits[epoch.number]]
        return sorted(_not_redone(found, lambda line: line.step, lambda line: line.kind == "step"), key=_order)

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of a metric of steps or evaluations, by step; lost steps are left out, later lines win."""
        return sorted({line.step: line.metrics[metric] for line in self.kept() if metric in line.metrics}.items())


def read_run(store: Store, *, metrics: bool = True) -> RunRecord:
    """Reads all there is below a run's place. A line that makes no sense is named in `problems` and left out.

    metrics: False leaves out the lines of metrics; accounts do not need them. Raises StoreError.
    """
    problems: list[str] = []
    held = holdings(store, problems)
    ledger: dict[int, list[LedgerLine]] = {}
    for number, lines in _read_parts(store, "ledger/", decode_ledger, problems):
        ledger.setdefault(number, []).extend(lines)
    written: dict[int, list[MetricsLine]] = {}
    for number, measured in _read_parts(store, "metrics/", decode_metrics, problems) if metrics else ():
        written.setdefault(number, []).extend(measured)
    # A part of which no line could be read tells of no time, and its epoch of nothing.
    told = [number for parts in (ledger, written) for number, lines in parts.items() if lines]
    numbers = sorted({*held, *told})
    epochs = (_epoch(number, ledger.get(number, []), written.get(number, []), held.get(number)) for number in numbers)
    return RunRecord(store.url, tuple(epochs), tuple(problems))


def _epoch(number: int, ledger: Iterable[LedgerLine], written: Iterable[MetricsLine], held: Holding | None) -> Epoch:
    opened = ended = None
    times: list[Time] = []
    events: list[Event] = []
    for line in ledger:
        if isinstance(line, Time):
            times.append(line)
        elif isinstance(line, Event):
            events.append(line)
        elif isinstance(line, Opened):
            opened = opened or line
        else:
            ended = line
    return Epoch(number, opened, ended, tuple(times), tuple(events), tuple(written), held)


def _read_parts(
    store: Store, prefix: str, decode: Callable[[bytes], _T], problems: list[str]
) -> Iterable[tuple[int, list[_T]]]:
    """(epoch, its lines) of each part, in order."""
    parts = sorted(
        (int(found.group(1)), int(found.group(2)), entry.key)
        for entry in store.list(prefix)
        if (found := _PART.search(entry.key))
    )
    expected = {epoch: 0 for epoch, _, _ in parts}
    with ThreadPoolExecutor(_FETCHES) as pool:
        for (epoch, number, key), data in zip(parts, pool.map(lambda part: _get(store, part[2]), parts), strict=True):
            problems += [
                f"{prefix}e{epoch:06d}/part-{missing:05d}.jsonl is missing; its lines are left out"
                for missing in range(expected[epoch], number)
            ]
            expected[epoch] = number + 1
            if data is None:
                problems.append(f"{key} vanished while it was read; its lines are left out")
            else:
                yield epoch, list(_decoded(data, key, decode, problems))


def _get(store: Store, key: str) -> bytes | None:
    try:
        return store.get(key)
    except NotFoundError:
        return None


def _decoded(data: bytes, key: str, decode: Callable[[bytes], _T], problems: list[str]) -> Iterable[_T]:
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield decode(line)
        except ValueError as error:
            problems.append(f"{key} line {number} makes no sense and is left out: {error}")


def last_kept(epochs: Iterable[Epoch]) -> Mapping[int, float]:
    """For each epoch the last of its steps that counts; -1 if none does, infinity if none is lost.

    An epoch that started from the checkpoint of step S of epoch E, as its base says, keeps of E the steps up to S, and
    nothing of the epochs between. Where there is no base, its first step says the same of the epoch before it. An epoch
    that has neither changes nothing. Steps count from 1.
    """
    limits: dict[int, float] = {}
    limit, chain = float("inf"), None
    for epoch in reversed(list(epochs)):
        if chain is not None and epoch.number > chain:
            limits[epoch.number] = -1
            continue
        limits[epoch.number] = limit
        told = epoch.holding.base if epoch.holding else None
        base = _CHECKPOINT.search(told or "")
        if told == FROM_NOTHING:
            limit, chain = 0, None
        elif base is not None and int(base.group(2)) < epoch.number:
            limit, chain = min(limit, int(base.group(1))), int(base.group(2))
        elif steps := epoch.steps or tuple(line.step for line in epoch.lines if line.kind == "step"):
            limit, chain = min(limit, min(steps) - 1), None
    return limits


def _not_redone(lines: list[_T], step: Callable[[_T], int | None], moves: Callable[[_T], bool]) -> list[_T]:
    """Without lines whose step was made again later: a trainer went back to a checkpoint without being replaced.

    moves: whether a line is of a step that was made; an evaluation of an old step takes nothing back.
    """
    found: list[_T] = []
    limit = float("inf")
    for line in reversed(lines):
        number = step(line)
        if number is not None and number >= limit:
            continue
        found.append(line)
        if number is not None and moves(line):
            limit = min(limit, number)
    return found[::-1]


def _order(line: MetricsLine) -> tuple[int, float]:
    return line.step, line.at


def facts_of(epoch: Epoch) -> Mapping[str, Any]:
    """What its last heartbeat told."""
    return (epoch.holding.known if epoch.holding else None) or {}
