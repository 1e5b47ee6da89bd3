"""A plan as tables for a person."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from anypool.plan.placement.plan import Plan
from anypool.plan.placement.problem import Problem

NOT_KNOWN = "not known"


def print_plan(problem: Problem, plan: Plan, console: Console | None = None) -> None:
    """Prints who runs where, what survivors do after each loss, and the sums with how good they are proven to be."""
    console = console or Console(highlight=False)
    console.print(_assignments(problem, plan))
    if plan.failovers:
        console.print(_failovers(plan))
    for reserve in plan.reserves:
        console.print(f"held in reserve: {reserve.chips} chips of {escape(reserve.pool)}, {_money(reserve.usd)} USD")
    if plan.dropped:
        console.print(f"not placed: {escape(', '.join(plan.dropped))}")
    if plan.moves:
        console.print("moves: " + escape(", ".join(f"{job} to {pool}" for job, pool in plan.moves)))
    if plan.at_risk:
        names = escape(", ".join(plan.at_risk))
        console.print(f"too slow if every rate is at the lower end of its interval: {names}")
    megawatts = NOT_KNOWN if plan.megawatts is None else f"{plan.megawatts:.3f}"
    console.print(
        f"{problem.hours:g} h: {_money(plan.usd)} USD beyond commitments, {_money(plan.kwh)} kWh, "
        f"{_money(plan.kg_co2)} kg CO2e, {megawatts} MW, {plan.chips:,} chips"
    )
    console.print(f"{plan.objective}: {plan.value:,.2f} {plan.unit}: {plan.how_good()}")


def _assignments(problem: Problem, plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("job", "pool"):
        table.add_column(heading, no_wrap=True)
    for heading in ("chips", "of them\npaid", "hours", "tokens/s", "USD", "USD/M\ntokens", "kWh"):
        table.add_column(heading, justify="right", no_wrap=True)
    order = {job.name: index for index, job in enumerate(problem.jobs)}
    for each in sorted(plan.assignments, key=lambda each: (order[each.job], -each.chips)):
        tokens = each.tokens_per_second * each.hours * 3600
        table.add_row(
            escape(each.job),
            escape(each.pool),
            f"{each.chips:,}",
            f"{each.committed_chips:,}",
            _short(each.hours),
            _short(each.tokens_per_second),
            _short(each.usd),
            _short(None if each.usd is None else each.usd / tokens * 1e6),
            _short(each.kwh),
        )
    return table


def _failovers(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("after the loss of", "job", "takes on pool"):
        table.add_column(heading, no_wrap=True)
    table.add_column("chips", justify="right")
    for each in plan.failovers:
        table.add_row(escape(each.loss), escape(each.job), escape(each.pool), f"{each.chips:,}")
    return table


def _money(amount: float | None) -> str:
    return NOT_KNOWN if amount is None else f"{amount:,.0f}"


def _short(amount: float | None) -> str:
    """Four digits at most: the table has nine columns, and 80 characters are usual."""
    if amount is None:
        return "-"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if amount >= 9.995 * size or (letter != "k" and amount >= size):
            return f"{amount / size:.4g}{letter}"
    return f"{amount:.4g}"
