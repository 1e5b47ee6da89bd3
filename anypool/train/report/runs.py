"""The runs of a store: which there are, how each stands, and one in full."""

from __future__ import annotations

import difflib
import math
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from anypool.store import NotFoundError, Store, StoreError, load
from anypool.train.report.errors import RunError
from anypool.train.report.ledger import Account, account, runs
from anypool.train.report.lines import Event
from anypool.train.report.reading import Epoch, RunRecord, facts_of, last_kept, read_run

FINISHED = "finished"
"""The reason with which the last trainer of a run ends it, its last step made."""

_LAST_EVENTS = 12


@dataclass(frozen=True)
class Summary:
    """A line of `anypool runs`. Fields are None where nothing is known.

    state: "running", "stopped" (on purpose), "finished", "lost" (held, but without a sign of life for the lease's time
    to live) or "new" (nobody took it yet). since, updated: seconds since 1970; since: when the last trainer took it.
    reason: why the last trainer stopped. problem: why this run could not be read; then nothing else is known.
    """

    name: str
    state: str
    pool: str | None = None
    since: float | None = None
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    eval_loss: float | None = None
    goodput: float | None = None
    usd: float | None = None
    usd_complete: bool = True
    updated: float | None = None
    reason: str | None = None
    problem: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Numbers that are not finite become None: JSON has none."""
        return {name: _finite(getattr(self, name)) for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class Stay:
    """One epoch of a run. first_step, last_step: that it made; kept_step: the last that counts, None if none does."""

    epoch: int
    pool: str
    chip: str
    chips: int
    started: float
    seconds: float
    first_step: int | None
    last_step: int | None
    kept_step: int | None
    base: str | None
    ended: str


@dataclass(frozen=True)
class CheckpointEntry:
    """A committed checkpoint. counts: False if its epoch had lost the run, or a later epoch went back behind it."""

    folder: str
    step: int | None
    objects: int
    bytes: int
    counts: bool


@dataclass(frozen=True)
class Shown:
    """One run in full."""

    url: str
    summary: Summary
    stays: tuple[Stay, ...]
    account: Account
    checkpoints: tuple[CheckpointEntry, ...]
    events: tuple[tuple[int, Event], ...]
    problems: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "url": self.url,
            "run": self.summary.as_json(),
            "epochs": [dict(vars(stay)) for stay in self.stays],
            "account": self.account.as_json(),
            "checkpoints": [dict(vars(checkpoint)) for checkpoint in self.checkpoints],
            "events": [
                {"epoch": epoch, "at": event.at_ns / 1e9, "kind": event.name, "facts": event.facts}
                for epoch, event in self.events
            ],
            "problems": list(self.problems),
        }


def list_runs(store_url: str | Store, *, now: float | None = None) -> list[Summary]:
    """Every run of a store, the last changed first. A run that cannot be read is in the list, with its problem.

    now: seconds since 1970. Raises StoreError if the store itself fails, StoreUrlError, RunError if it holds no run.
    """
    store = _open(store_url)
    now = time.time() if now is None else now
    names = _names(store)
    if not names:
        raise RunError(f"{store.url}: holds no run: name the store that a run was started with, or start one there")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: _summary_or_problem(store, name, now), names))
    return sorted(found, key=lambda summary: (-(summary.updated or 0.0), summary.name))


def show_run(store_url: str | Store, run: str, *, now: float | None = None) -> Shown:
    """One run in full. Raises RunError with the nearest name for one that is not there."""
    store = _open(store_url)
    now = time.time() if now is None else now
    record = read_named(store, run)
    place = store.at(f"runs/{run}")
    told = account(record, now_ns=round(now * 1e9))
    limits = last_kept(record.epochs)
    events = [(epoch.number, event) for epoch in record.epochs for event in epoch.events]
    events.sort(key=lambda entry: entry[1].at_ns)
    problems = list(record.problems)
    checkpoints = _checkpoints(place, limits, problems)
    return Shown(
        record.url,
        summary(run, record, told, now),
        tuple(_stay(record, index, limits, now) for index in range(len(record.epochs))),
        told,
        tuple(checkpoints),
        tuple(events[-_LAST_EVENTS:]),
        tuple(problems),
    )


def read_named(store_url: str | Store, run: str) -> RunRecord:
    """The record of a run by its name. Raises RunError with the nearest name for one that is not there."""
    store = _open(store_url)
    names = _names(store)
    if run not in names:
        if not names:
            raise RunError(f"run {run!r}: {store.url} holds no run: name the store that it was started with")
        close = difflib.get_close_matches(run, names, n=1, cutoff=0.5)
        fix = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names[:8])}"
        raise RunError(f"run {run!r}: there is none of this name in {store.url}; {fix}")
    return read_run(store.at(f"runs/{run}"))


def summary(name: str, record: RunRecord, told: Account, now: float) -> Summary:
    """How a run stands. What the trainer's heartbeat tells wins over lines that were written before it."""
    if not record.epochs:
        return Summary(name, "new")
    last = record.epochs[-1]
    known = facts_of(last)
    limits = last_kept(record.epochs)
    steps = [step for epoch in record.epochs for step in epoch.steps if step <= limits[epoch.number]]
    step = _newest(known, "step") or max(steps, default=None)
    total = _newest(known, "total_steps") or record.total_steps
    cost = told.cost()
    return Summary(
        name,
        _state(last, step, total, now),
        last.pool.name,
        last.held_ns / 1e9,
        step,
        total,
        _value(record, "loss"),
        _value(record, "eval_loss"),
        told.goodput,
        cost.usd if cost.complete or cost.usd else None,
        cost.complete,
        last.last_sign_ns / 1e9,
        last.stopped,
    )


def _state(last: Epoch, step: int | None, total: int | None, now: float) -> str:
    if last.stopped is not None:
        done = step is not None and total is not None and step >= total
        return FINISHED if done or last.stopped == FINISHED else "stopped"
    return "running" if runs(last, round(now * 1e9)) else "lost"


def _value(record: RunRecord, metric: str) -> float | None:
    """The newest value: of the last epoch's heartbeat, else of the last line that counts, else of older heartbeats."""
    told = _newest(facts_of(record.epochs[-1]), metric)
    if told is not None:
        return float(told)
    if curve := record.curve(metric):
        return curve[-1][1]
    older = (_newest(facts_of(epoch), metric) for epoch in reversed(record.epochs))
    return next((float(value) for value in older if value is not None), None)


def _newest(known: Mapping[str, Any], name: str) -> Any:
    value = known.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _stay(record: RunRecord, index: int, limits: Mapping[int, float], now: float) -> Stay:
    epoch = record.epochs[index]
    kept = [step for step in epoch.steps if step <= limits[epoch.number]]
    if epoch.stopped is not None:
        ended = epoch.stopped
    elif index + 1 < len(record.epochs):
        ended = f"lost: taken over by {record.epochs[index + 1].pool.name}"
    else:
        ended = "runs" if runs(epoch, round(now * 1e9)) else "lost: no sign of life"
    base = epoch.holding.base if epoch.holding else None
    return Stay(
        epoch.number,
        epoch.pool.name,
        epoch.pool.chip,
        epoch.pool.chips,
        epoch.started_ns / 1e9,
        (epoch.last_sign_ns - epoch.started_ns) / 1e9,
        min(epoch.steps, default=None),
        max(epoch.steps, default=None),
        max(kept, default=None),
        base or None,
        ended,
    )


def _checkpoints(place: Store, limits: Mapping[int, float], problems: list[str]) -> list[CheckpointEntry]:
    """Committed checkpoints by step."""
    found = []
    for folder in place.folders("checkpoints"):
        name = folder.rpartition("/")[2]
        try:
            manifest = load(place, folder)
        except NotFoundError:
            continue  # Begun and not committed: it does not exist.
        except (StoreError, ValueError) as error:
            problems.append(f"{folder}: its manifest cannot be read: {error}")
            continue
        step, epoch = _numbers(name)
        counts = step is None or epoch is None or step <= limits.get(epoch, -1)
        size = sum(record.size for record in manifest.objects.values())
        found.append(CheckpointEntry(name, step, len(manifest.objects), size, counts))
    return sorted(found, key=lambda entry: (entry.step or 0, entry.folder))


def _numbers(folder: str) -> tuple[int | None, int | None]:
    step, dash, epoch = folder.removeprefix("step-").partition("-e")
    return (int(step), int(epoch)) if dash and step.isdigit() and epoch.isdigit() else (None, None)


def _summary_or_problem(store: Store, name: str, now: float) -> Summary:
    try:
        place = store.at(f"runs/{name}")
        record = read_run(place, metrics=False)
        if record.epochs and _newest(facts_of(record.epochs[-1]), "loss") is None:
            record = read_run(place)
        told = account(record, now_ns=round(now * 1e9))
        return summary(name, record, told, now)
    except StoreError as error:
        return Summary(name, "unreadable", problem=str(error))


def _open(store_url: str | Store) -> Store:
    return store_url if isinstance(store_url, Store) else Store.open(store_url)


def _names(store: Store) -> list[str]:
    return [folder.rpartition("/")[2] for folder in store.folders("runs")]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
