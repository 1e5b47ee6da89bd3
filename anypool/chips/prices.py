"""What chips cost: `data/prices.csv`, one row a price, and the checks that every table of prices must pass.

A price belongs to a provider, a region and a day, never to a chip alone: in one month of 2026 an H100 cost between 2.40
and 10.98 USD an hour. The checks reject what public tables were found to get wrong: sentinels for a missing price, the
price of another instance, memory of a whole instance, TensorCores taken for chips, rows without a date.
"""

from __future__ import annotations

import csv
import functools
import io
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import resources

from anypool.chips.chip import Chip, load_chip
from anypool.chips.errors import PriceError, UnknownChipError
from anypool.chips.facts import GRADES, check_date, check_source

COLUMNS = (
    *("provider", "region", "sku", "chip", "chips_per_sku", "usd_per_hour", "kind", "term"),
    *("source", "date", "grade", "note"),
)
# A catalogue made elsewhere may also say what an instance holds; then that is compared with the chip's file.
EXTRA_COLUMNS = ("memory_gib", "bf16_tflops")
KINDS = {
    "on_demand": "for anyone, by the hour",
    "spot": "may be taken away",
    "reserved": "capacity booked for a time",
    "committed": "a discount for paying over a term",
}
# What catalogues write where they have no price. SkyPilot's says 700.0 for zones that have none.
PRICE_SENTINELS = (0.0, 1.0, 700.0, 999.0, 9999.0, 99999.0)
USD_PER_CHIP_HOUR = (0.05, 50.0)
# How far a region's price may be from the median of its provider's other regions.
LARGEST_RATIO = {"on_demand": 2.0, "committed": 2.0, "reserved": 2.0, "spot": 5.0}
MEMORY_TOLERANCE = 0.05

# Makes the error for one field of a row: (field, fix) -> PriceError.
Wrong = Callable[[str, str], PriceError]


@dataclass(frozen=True)
class Price:
    """What one provider asked in one region for one product on one day. `region` is "" where the source has none."""

    provider: str
    region: str
    sku: str
    chip: str
    chips_per_sku: int
    usd_per_hour: float
    kind: str
    term: str
    source: str
    date: str
    grade: str
    note: str = ""

    @property
    def usd_per_chip_hour(self) -> float:
        """The price of one chip."""
        return self.usd_per_hour / self.chips_per_sku


@functools.cache
def load_prices() -> tuple[Price, ...]:
    """Every price of the room."""
    text = (resources.files("anypool.chips") / "data" / "prices.csv").read_text(encoding="utf-8")
    return parse_prices(text, "prices.csv")


def prices_of(chip: str) -> tuple[Price, ...]:
    """The prices of one chip, cheapest first."""
    name = load_chip(chip).name
    return tuple(sorted((p for p in load_prices() if p.chip == name), key=lambda p: p.usd_per_chip_hour))


def parse_prices(text: str, file: str) -> tuple[Price, ...]:
    """A table of prices, checked row by row and against itself. Raises PriceError: file, line, field, value and fix."""
    reader = csv.DictReader(io.StringIO(text))
    for column in reader.fieldnames or ():
        if column not in COLUMNS + EXTRA_COLUMNS:
            raise PriceError(f"{file}:1: unknown column {column!r}; known here: {', '.join(COLUMNS + EXTRA_COLUMNS)}")
    for column in COLUMNS[:-1]:
        if column not in (reader.fieldnames or ()):
            raise PriceError(f"{file}:1: there is no column {column!r}: add it")
    rows = [(reader.line_num, _read_row(row, file, reader.line_num)) for row in reader]
    _check_duplicates(rows, file)
    _check_regions(rows, file)
    return tuple(price for _, price in rows)


def _read_row(row: Mapping[str, str | None], file: str, line: int) -> Price:
    if None in row or None in row.values():
        raise PriceError(f"{file}:{line}: has another number of fields than the header: quote texts that hold a comma")
    cells = {key: (value or "").strip() for key, value in row.items()}

    def wrong(field: str, fix: str) -> PriceError:
        return PriceError(f"{file}:{line}: {field} = {cells.get(field, '')!r}: {fix}")

    for field in ("provider", "sku", "chip"):
        if not cells[field]:
            raise wrong(field, "must not be empty")
    try:
        chip = load_chip(cells["chip"])
    except UnknownChipError as error:
        raise wrong("chip", str(error)) from None
    if chip.name != cells["chip"]:
        raise wrong("chip", f"write the chip's own name, {chip.name!r}")
    if not re.fullmatch(r"[1-9][0-9]*", cells["chips_per_sku"]):
        raise wrong("chips_per_sku", "must be a whole number of chips, such as 8")
    chips = int(cells["chips_per_sku"])
    _check_name(cells["sku"], chip, chips, wrong)
    price = _number(cells["usd_per_hour"])
    if price is None:
        raise wrong("usd_per_hour", "must be a number of USD; leave the row out if the price is not known")
    if price in PRICE_SENTINELS or price < 0:
        raise wrong("usd_per_hour", "stands for a missing price: leave the row out")
    low, high = USD_PER_CHIP_HOUR
    if not low <= price / chips <= high:
        fix = f"is {price / chips:.4g} USD a chip and hour, not within {low:g} and {high:g}"
        raise wrong("usd_per_hour", f"{fix}: correct it or chips_per_sku")
    if cells["kind"] not in KINDS:
        raise wrong("kind", f"must be one of {', '.join(KINDS)}")
    if bool(cells["term"]) != (cells["kind"] in ("reserved", "committed")):
        raise wrong("term", "goes with reserved and committed prices, such as 1y, 3y or 14d, and with no other")
    if cells["grade"] not in GRADES:
        raise wrong("grade", f"must be one of {', '.join(GRADES)}; a price of no grade is left out")
    source = check_source(cells["source"], functools.partial(wrong, "source"))
    date = check_date(cells["date"], functools.partial(wrong, "date"))
    _check_extra(cells, chip, chips, wrong)
    return Price(
        provider=cells["provider"],
        region=cells["region"],
        sku=cells["sku"],
        chip=chip.name,
        chips_per_sku=chips,
        usd_per_hour=price,
        kind=cells["kind"],
        term=cells["term"],
        source=source,
        date=date,
        grade=cells["grade"],
        note=cells.get("note", ""),
    )


def _check_name(sku: str, chip: Chip, chips: int, wrong: Wrong) -> None:
    """Google's `v5p-8` counts TensorCores and `v6e-8` chips; both must agree with chips_per_sku."""
    match = re.fullmatch(r"(.+?)-([1-9][0-9]*)", sku.lower())
    if not match or match[1] not in (chip.name, *chip.aliases) or not chip.topology.name_counts:
        return
    named = int(match[2]) // 2 if chip.topology.name_counts == "cores" else int(match[2])
    if named != chips:
        what = "TensorCores, 2 a chip" if chip.topology.name_counts == "cores" else "chips"
        raise wrong("chips_per_sku", f"{sku} counts {what}: write {named}")


def _check_extra(cells: Mapping[str, str], chip: Chip, chips: int, wrong: Wrong) -> None:
    """What a catalogue says an instance holds, against the chip's file."""
    if cells.get("memory_gib"):
        memory = _number(cells["memory_gib"])
        if memory is None:
            raise wrong("memory_gib", "must be a number of GiB for the whole instance")
        known = chip.hbm_bytes.value * chips / 2**30 if chip.hbm_bytes else None
        if known is not None and not _close(memory, known):
            fix = f"{chips} {chip.name} have {known:.5g} GiB: correct it"
            if _close(memory * 1e9 / 2**30, known):
                fix = f"{chips} {chip.name} have {known:.5g} GiB: this is the number of GB"
            elif chips > 1 and _close(memory / chips, known):
                fix = f"{chips} {chip.name} have {known:.5g} GiB: this counts each chip {chips} times"
            elif chips > 1 and _close(memory, known / chips):
                fix = f"{chips} {chip.name} have {known:.5g} GiB: this is the memory of one chip"
            raise wrong("memory_gib", fix)
    if cells.get("bf16_tflops"):
        rate, bf16 = _number(cells["bf16_tflops"]), chip.peak_flops.get("bf16")
        if rate is None:
            raise wrong("bf16_tflops", "must be the number of dense TFLOP/s of one chip")
        if bf16 is not None and not _close(rate, bf16.value / 1e12):
            sparse = " (this is the sparse rate)" if _close(rate, 2 * bf16.value / 1e12) else ""
            raise wrong("bf16_tflops", f"a {chip.name} has {bf16.published}{sparse}: correct it")


def _check_duplicates(rows: Iterable[tuple[int, Price]], file: str) -> None:
    """One product has one price on one day."""
    seen: dict[tuple[str, ...], tuple[int, Price]] = {}
    for line, price in rows:
        key = (price.provider, price.region, price.sku, price.chip, price.kind, price.term, price.date)
        if key in seen:
            before, other = seen[key]
            raise PriceError(
                f"{file}:{line}: usd_per_hour = {price.usd_per_hour:g}: line {before} has {other.usd_per_hour:g} for "
                f"{price.sku} of {price.provider} on {price.date} too: keep the one that holds, or correct the date"
            )
        seen[key] = (line, price)


def _check_regions(rows: Iterable[tuple[int, Price]], file: str) -> None:
    """A region far from the provider's others has the price of another product, as a rule."""
    groups: dict[tuple[str, ...], list[tuple[int, Price]]] = {}
    for line, price in rows:
        groups.setdefault((price.provider, price.chip, price.kind, price.term, price.date), []).append((line, price))
    for group in groups.values():
        if len({price.region for _, price in group}) < 2:
            continue
        for line, price in group:
            others = [other.usd_per_chip_hour for _, other in group if other.region != price.region]
            median = statistics.median(others)
            ratio = price.usd_per_chip_hour / median
            limit = LARGEST_RATIO[price.kind]
            # Of two regions that disagree the cheaper one is as suspect as the dearer one: the message shows both.
            if not 1 / limit <= ratio <= limit:
                region = price.region or "an unnamed region"
                raise PriceError(
                    f"{file}:{line}: usd_per_hour = {price.usd_per_hour:g}: {price.usd_per_chip_hour:.4g} USD a chip "
                    f"in {region}, where {price.provider}'s other regions ask {median:.4g}: this is the price of "
                    "another product; correct it or leave the row out"
                )


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _close(value: float, known: float) -> bool:
    return abs(value - known) <= MEMORY_TOLERANCE * known
