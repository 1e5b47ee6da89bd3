"""What `anypool chips` prints: all chips in a table, or one with every number and where it comes from."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from anypool.chips.chip import Chip, chips, load_chip
from anypool.chips.facts import GRADES, Fact
from anypool.chips.prices import Price, prices_of

NOT_KNOWN = "not known"
# The table's columns: the heading, the field of a chip's file, and the unit that the heading names.
COLUMNS = (
    ("bf16\nTF/s", "flops.bf16", 1e12),
    ("fp8\nTF/s", "flops.fp8", 1e12),
    ("HBM\nGiB", "memory.capacity", 2**30),
    ("HBM\nTB/s", "memory.bandwidth", 1e12),
    ("up\nGB/s", "scale_up.bandwidth", 1e9),
    ("up\nchips", "scale_up.chips", 1),
    ("out\nGb/s", "scale_out.bandwidth", 1e9 / 8),
    ("power\nW", "power.watts", 1),
)


def show_chips(*, format: str) -> int:
    """Prints every chip. Returns the exit code."""
    if format == "json":
        print(json.dumps([_as_json(chip) for chip in chips()], indent=2))
        return 0
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("\nchip", no_wrap=True)
    for heading, _, _ in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("\ncompiler", no_wrap=True)
    for chip in chips():
        numbers = chip.numbers
        cells = [
            "none" if field.removeprefix("flops.") in chip.lacks_dtypes else _cell(numbers[field], unit)
            for _, field, unit in COLUMNS
        ]
        table.add_row(chip.name, *cells, chip.compiler.compiler.name)
    console = Console(highlight=False)
    console.print(table)
    console.print(
        "Peak dense rates of one chip. up: to chips in the same fast network, one way; out: beyond it. "
        f"-: {NOT_KNOWN}. `anypool chips NAME` shows every number with its source, and prices."
    )
    return 0


def show_chip(name: str, *, format: str) -> int:
    """Prints one chip: every number with source, date and grade, and its prices. Raises UnknownChipError."""
    chip = load_chip(name)
    if format == "json":
        print(json.dumps(_as_json(chip) | {"prices": [_price_as_json(price) for price in prices_of(name)]}, indent=2))
        return 0
    console = Console(highlight=False)
    console.print(f"[bold]{chip.name}[/bold]  {chip.title}")
    if chip.aliases:
        console.print(f"also: {', '.join(chip.aliases)}")
    if chip.note:
        console.print(escape(chip.note))
    # Sources are long and few: numbers point at a list below.
    sources: dict[tuple[str, str], int] = {}
    console.print(_numbers(chip, sources))
    console.print(_words(chip))
    if prices_of(chip.name):
        console.print(_prices(chip, sources))
    else:
        console.print(f"\nprice  {NOT_KNOWN}\n")
    console.print(_legend(sources))
    return 0


def _numbers(chip: Chip, sources: dict[tuple[str, str], int]) -> Table:
    table = _table("number", "value", "grade", "source", "note")
    for field, fact in chip.numbers.items():
        if fact is None:
            lacks = field.removeprefix("flops.") in chip.lacks_dtypes
            table.add_row(field, "none" if lacks else f"[dim]{NOT_KNOWN}[/dim]")
            continue
        value = fact.published.removesuffix(" chips").removesuffix(" devices")
        if field == "power.watts":
            value += f" ({chip.power_basis})"
        table.add_row(field, value, fact.grade, _reference(sources, fact.source, fact.date), escape(fact.note))
    return table


def _words(chip: Chip) -> Table:
    """What is no number: network, topologies, compiler, names in launchers."""
    target = chip.compiler
    compiler = target.compiler
    proof = f"{compiler.title}; without the chip at hand: {compiler.proof}"
    ray = NOT_KNOWN
    if chip.ray:
        ray = f"{chip.ray.resource}, accelerator type {chip.ray.accelerator_type or NOT_KNOWN}"
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_row("network", chip.scale_up_kind or NOT_KNOWN)
    table.add_row("topologies", chip.topology.what_exists)
    table.add_row("compiler", proof)
    for words in (
        f"calls it {target.target}" if target.target else "",
        f"Pallas: {', '.join(compiler.pallas)}" if compiler.pallas else "",
        f"jax {compiler.jax}" if compiler.jax else "",
        f"refuses {'; '.join(compiler.refuses)}" if compiler.refuses else "",
    ):
        if words:
            table.add_row("", words)
    table.add_row("kubernetes", chip.kubernetes.resource if chip.kubernetes else NOT_KNOWN)
    table.add_row("ray", ray)
    return table


def _prices(chip: Chip, sources: dict[tuple[str, str], int]) -> Table:
    table = _table("USD/h", "kind", "provider", "region", "sku", "grade", "source", "note")
    table.columns[0].justify = "right"
    for price in prices_of(chip.name):
        kind = price.kind + (f" {price.term}" if price.term else "")
        reference = _reference(sources, price.source, price.date)
        cells = (kind, price.provider, price.region or f"[dim]{NOT_KNOWN}[/dim]", escape(price.sku), price.grade)
        table.add_row(f"{price.usd_per_chip_hour:.3f}", *cells, reference, escape(price.note))
    table.title = "Prices of one chip, cheapest first"
    return table


def _legend(sources: dict[tuple[str, str], int]) -> Table:
    table = _table("source", "where", "read")
    for (where, date), number in sources.items():
        table.add_row(str(number), escape(where), date)
    table.caption = "\n".join(f"{letter}  {words}" for letter, words in GRADES.items())
    table.caption_justify = "left"
    return table


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(heading, overflow="fold", no_wrap=index == 0)
    return table


def _reference(sources: dict[tuple[str, str], int], where: str, date: str) -> str:
    return str(sources.setdefault((where, date), len(sources) + 1))


def _cell(fact: Fact | None, unit: float) -> str:
    if fact is None:
        return "-"
    value = fact.value / unit
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _as_json(chip: Chip) -> dict[str, Any]:
    compiler = chip.compiler.compiler
    return {
        "name": chip.name,
        "title": chip.title,
        "vendor": chip.vendor,
        "aliases": list(chip.aliases),
        "note": chip.note,
        "numbers": {field: fact.as_json() if fact else None for field, fact in chip.numbers.items()},
        "lacks_dtypes": list(chip.lacks_dtypes),
        "power_basis": chip.power_basis,
        "scale_up_kind": chip.scale_up_kind or None,
        "topology": dataclasses.asdict(chip.topology),
        "compiler": {
            "name": compiler.name,
            "platform": compiler.platform or None,
            "package": compiler.package or None,
            "extra": compiler.extra or None,
            "without_the_chip": compiler.proof,
            "target": chip.compiler.target or None,
            "jax": compiler.jax or None,
            "pallas": list(compiler.pallas),
            "refuses": list(compiler.refuses),
        },
        "kubernetes": dataclasses.asdict(chip.kubernetes) if chip.kubernetes else None,
        "ray": dataclasses.asdict(chip.ray) if chip.ray else None,
    }


def _price_as_json(price: Price) -> dict[str, Any]:
    return dataclasses.asdict(price) | {"usd_per_chip_hour": round(price.usd_per_chip_hour, 6)}
