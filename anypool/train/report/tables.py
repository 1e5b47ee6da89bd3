"""Runs and accounts as tables for a terminal, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from anypool.train.report.figures import UNKNOWN, ago, duration, loss, moment, share, short, size
from anypool.train.report.ledger import CATEGORIES, OVERLAP, Account, Cost
from anypool.train.report.runs import Shown, Summary

_PIPED_WIDTH = 160
_COLOURS = {"running": "green", "finished": "cyan", "lost": "red", "unreadable": "red", "new": "dim", "stopped": ""}


def print_runs(summaries: Sequence[Summary], format: str, console: Console, now: float) -> None:
    """`anypool runs`: a table, or one JSON document. now: seconds since 1970."""
    if format == "json":
        _print_json({"runs": [summary.as_json() for summary in summaries]}, console)
        return
    console = _roomy(console)
    table = _table("run", "state", ">step", ">loss", ">eval loss", ">goodput", ">cost", "updated")
    for summary in summaries:
        table.add_row(
            summary.name,
            Text(_state(summary, now), style=_COLOURS[summary.state]),
            _steps(summary),
            loss(summary.loss),
            loss(summary.eval_loss),
            share(summary.goodput),
            str(Cost(summary.usd or 0.0, summary.usd_complete)) if summary.state != "new" else UNKNOWN,
            UNKNOWN if summary.updated is None else ago(now - summary.updated),
        )
    console.print(table)
    for summary in summaries:
        if summary.problem:
            console.print(Text(f"{summary.name}: {summary.problem}", style="red"))


def print_shown(shown: Shown, format: str, console: Console, now: float) -> None:
    """`anypool runs NAME`: everything of one run, or one JSON document."""
    if format == "json":
        _print_json(shown.as_json(), console)
        return
    _roomy(console).print(Group(*_parts(shown, now)))


def ledger_table(account: Account) -> Table:
    """Seconds, shares and dollars by category; with several pools a column of seconds for each."""
    pools = account.pools if len(account.pools) > 1 else ()
    table = _table("time went into", ">time", ">share", ">cost", *(f">{entry.pool.name}" for entry in pools))
    for category in (*CATEGORIES, OVERLAP):
        if not account.nanoseconds(category):
            continue
        part = account.nanoseconds(category) / account.wall_ns if account.wall_ns else None
        table.add_row(
            category if category != OVERLAP else "overlap (beside the run)",
            duration(account.seconds(category)),
            share(part) if category != OVERLAP else "",
            str(account.cost(category)),
            *(duration(entry.seconds(category)) if entry.nanoseconds.get(category) else "" for entry in pools),
        )
    table.add_section()
    table.add_row("all", duration(account.wall_ns / 1e9), "", str(account.cost()), *(str(p.cost()) for p in pools))
    return table


def _parts(shown: Shown, now: float) -> Iterator[RenderableType]:
    summary, account = shown.summary, shown.account
    yield Text.assemble((summary.name, "bold"), "  ", (_state(summary, now), _COLOURS[summary.state]))
    yield Text(shown.url, style="dim")
    yield Text(
        f"step {_steps(summary)}  loss {loss(summary.loss)}  eval {loss(summary.eval_loss)}  "
        f"goodput {share(account.goodput)}  MFU {share(account.mfu)}  cost {account.cost()}"
    )
    rates = (account.tokens_per_compute_second, account.tokens_per_wall_second)
    compute, wall = (UNKNOWN if rate is None else short(rate) for rate in rates)
    lost = f", {account.steps_lost:,} steps made again or lost" if account.steps_lost else ""
    yield Text(f"{short(account.tokens)} tokens: {compute}/s while computing, {wall}/s over all time{lost}")
    if shown.stays:
        yield Text("")
        yield _stays(shown)
        yield Text("")
        yield ledger_table(account)
    if shown.checkpoints:
        yield Text("")
        table = _table("checkpoint", ">step", ">size", ">objects", "")
        for entry in shown.checkpoints:
            remark = "" if entry.counts else "of a trainer that had lost the run, or gone back behind"
            step = UNKNOWN if entry.step is None else f"{entry.step:,}"
            table.add_row(entry.folder, step, size(entry.bytes), str(entry.objects), remark)
        yield table
    if shown.events:
        yield Text("")
        table = _table("last events (UTC)", "epoch", "what", "")
        for epoch, event in shown.events:
            facts = "  ".join(f"{name} {value}" for name, value in event.facts.items())
            table.add_row(moment(event.at_ns / 1e9), str(epoch), event.name, facts)
        yield table
    for problem in shown.problems:
        yield Text(f"not read: {problem}", style="yellow")


def _stays(shown: Shown) -> Table:
    table = _table(">epoch", "pool", "chips", "started (UTC)", ">time", "steps", "from", "why it ended")
    for stay in shown.stays:
        steps = UNKNOWN if stay.first_step is None else f"{stay.first_step:,}-{stay.last_step:,}"
        if stay.first_step is not None and stay.kept_step is None:
            steps += " (none counts)"
        elif stay.kept_step is not None and stay.kept_step != stay.last_step:
            steps += f" (to {stay.kept_step:,} counts)"
        chips = UNKNOWN if stay.chip == "unknown" else f"{stay.chip}:{stay.chips}"
        table.add_row(
            str(stay.epoch), stay.pool, chips, moment(stay.started), duration(stay.seconds), steps,
            stay.base or "nothing", stay.ended,
        )  # fmt: skip
    return table


def _state(summary: Summary, now: float) -> str:
    if summary.state == "running":
        since = "" if summary.since is None else f" since {duration(max(0.0, now - summary.since))}"
        return f"running on {summary.pool}{since}"
    if summary.state == "stopped" and summary.reason:
        return f"stopped: {summary.reason}"
    if summary.state == "lost":
        return f"lost on {summary.pool}"
    return summary.state


def _steps(summary: Summary) -> str:
    if summary.step is None:
        return UNKNOWN if summary.total_steps is None else f"-/{summary.total_steps:,}"
    return f"{summary.step:,}" + (f"/{summary.total_steps:,}" if summary.total_steps is not None else "")


def _table(*columns: str) -> Table:
    """Columns whose names begin with > are set to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        if column.startswith(">"):
            table.add_column(column[1:], justify="right", no_wrap=True)
        else:
            table.add_column(column, overflow="fold")
    return table


def _roomy(console: Console) -> Console:
    """Where no terminal bounds a line, in a file or a pipe, none is broken for its sake."""
    return (
        console
        if console.is_terminal or console.width >= _PIPED_WIDTH
        else Console(file=console.file, width=_PIPED_WIDTH)
    )


def _print_json(data: dict[str, Any], console: Console) -> None:
    # Not through the console: it would break lines at its width.
    console.file.write(json.dumps(data, indent=2, allow_nan=False) + "\n")
