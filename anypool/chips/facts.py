"""A number about a chip, and where it comes from.

In a file a number stands as it was published, with the unit it was published in:

    [sources.docs]
    where = "docs.cloud.google.com/tpu/docs/v5e"
    date = "2026-11-23"
    grade = "P"

    [memory]
    bandwidth = { value = 819, unit = "GB/s", source = "docs" }

and here it becomes SI (bytes, bytes a second, operations a second, watts), so that GB and GiB cannot be mixed up.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from anypool.chips.errors import ChipFileError, nearest

# How sure a number is. A number that nobody could verify has no letter: it is left out.
GRADES = {
    "P": "primary: the vendor's own document, source code or paper",
    "V": "verified: obtained by running the vendor's software, named in the source",
    "S": "secondary: press, other people's tables, a third party that quotes a primary source",
    "D": "derived: arithmetic on graded numbers; the note shows it",
}
# Sites that state specifications and prices at odds with the vendors' documents, and name no source.
REJECTED_SOURCES = ("emergentmind.com", "awesomeagents.ai", "deploybase", "devidasmishra")


class Quantity(Enum):
    """What is counted; each has one SI unit."""

    operations_per_second = "FLOP/s"
    amount = "B"
    bytes_per_second = "B/s"
    watts = "W"
    count = "count"


UNITS: dict[str, tuple[Quantity, float]] = {
    "TFLOP/s": (Quantity.operations_per_second, 1e12),
    "PFLOP/s": (Quantity.operations_per_second, 1e15),
    "TOP/s": (Quantity.operations_per_second, 1e12),
    "B": (Quantity.amount, 1),
    "MiB": (Quantity.amount, 2**20),
    "GB": (Quantity.amount, 1e9),
    "GiB": (Quantity.amount, 2**30),
    "GB/s": (Quantity.bytes_per_second, 1e9),
    "GiB/s": (Quantity.bytes_per_second, 2**30),
    "TB/s": (Quantity.bytes_per_second, 1e12),
    "Gb/s": (Quantity.bytes_per_second, 1e9 / 8),
    "W": (Quantity.watts, 1),
    "chips": (Quantity.count, 1),
    "devices": (Quantity.count, 1),
}
# What catalogues write where they have no number.
SENTINELS = (-1, 0, 999, 9999, 99999)


@dataclass(frozen=True)
class Source:
    """Where numbers come from: an address or a file at a commit, the day it was read, and its grade."""

    where: str
    date: str
    grade: str


@dataclass(frozen=True)
class Fact:
    """One number. `value` is in SI `unit`; `published` is what the source says, in its own unit."""

    value: float
    unit: str
    published: str
    source: str
    date: str
    grade: str
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """All of it, for a report."""
        return {
            "value": self.value,
            "unit": self.unit,
            "published": self.published,
            "source": self.source,
            "date": self.date,
            "grade": self.grade,
            "note": self.note,
        }


def wrong(file: str, field: str, value: Any, fix: str) -> ChipFileError:
    """The error for one field of one file."""
    return ChipFileError(f"{file}: {field} = {value!r}: {fix}")


def check_keys(data: Mapping[str, Any], known: Sequence[str], file: str, table: str) -> None:
    """Raises ChipFileError for the first key of a table that is not known."""
    for key in data:
        if key not in known:
            field = f"{table}.{key}" if table else key
            raise wrong(file, field, data[key], f"unknown key{nearest(key, known) or ': remove it'}")


def read_sources(data: Any, file: str) -> dict[str, Source]:
    """The `[sources.*]` tables of a file. Raises ChipFileError."""
    if not isinstance(data, dict) or not data:
        raise ChipFileError(f"{file}: sources: add a table [sources.NAME] with where, date and grade")
    return {name: _read_source(table, file, f"sources.{name}") for name, table in data.items()}


def read_fact(data: Any, file: str, field: str, quantity: Quantity, sources: Mapping[str, Source]) -> Fact:
    """One number, checked: a unit of the right kind, a known source, no sentinel. Raises ChipFileError."""
    keys = ("value", "unit", "source", "grade", "note")
    if not isinstance(data, dict):
        fix = 'write { value = ..., unit = "...", source = "..." }: a bare number has no source'
        raise wrong(file, field, data, fix)
    check_keys(data, keys, file, field)
    value, unit = data.get("value"), data.get("unit")
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise wrong(file, f"{field}.value", value, "must be a number; leave the whole field out if it is not known")
    fits = [name for name, (kind, _) in UNITS.items() if kind == quantity]
    if unit not in fits:
        raise wrong(file, f"{field}.unit", unit, f"must be one of {', '.join(fits)}")
    if value <= 0 or (value in SENTINELS and quantity != Quantity.count):
        raise wrong(file, f"{field}.value", value, "stands for a missing number: leave the whole field out instead")
    if quantity == Quantity.count and value != int(value):
        raise wrong(file, f"{field}.value", value, "must be a whole number")
    source = sources.get(data.get("source", ""))
    if source is None:
        fix = f"must name one of this file's sources: {', '.join(sources)}"
        raise wrong(file, f"{field}.source", data.get("source"), fix)
    grade = data.get("grade", source.grade)
    note = data.get("note", "")
    _check_grade(grade, file, f"{field}.grade")
    if grade == "D" and not note:
        raise wrong(file, f"{field}.note", note, "a derived number shows its arithmetic: add a note")
    return Fact(
        value=value * UNITS[unit][1],
        unit=quantity.value,
        published=f"{value:g} {unit}" if abs(value) < 1e6 else f"{value:,} {unit}",
        source=source.where,
        date=source.date,
        grade=grade,
        note=note,
    )


def check_date(value: Any, error: Any) -> str:
    """An ISO date as text; else raises what `error(fix)` makes."""
    try:
        day = datetime.date.fromisoformat(value)
    except (TypeError, ValueError):
        raise error("must be the day the source was read, such as 2026-11-23") from None
    if day.year < 2015:
        raise error("is before any of these chips was sold: write the day the source was read")
    return day.isoformat()


def check_source(value: Any, error: Any) -> str:
    """The text that says where a number is from; else raises what `error(fix)` makes."""
    if not isinstance(value, str) or not value.strip():
        raise error("must say where the number is from, such as docs.cloud.google.com/tpu/docs/v5e")
    for rejected in REJECTED_SOURCES:
        if rejected in value.lower():
            raise error("contradicts the vendors' documents: use the vendor's document, or leave the number out")
    return value.strip()


def _read_source(data: Any, file: str, field: str) -> Source:
    if not isinstance(data, dict):
        raise wrong(file, field, data, "must be a table with where, date and grade")
    check_keys(data, ("where", "date", "grade"), file, field)

    def error(key: str) -> Any:
        return lambda fix: wrong(file, f"{field}.{key}", data.get(key), fix)

    where = check_source(data.get("where"), error("where"))
    date = check_date(data.get("date"), error("date"))
    _check_grade(data.get("grade"), file, f"{field}.grade")
    return Source(where=where, date=date, grade=data["grade"])


def _check_grade(grade: Any, file: str, field: str) -> None:
    if grade not in GRADES:
        raise wrong(file, field, grade, f"must be one of {', '.join(GRADES)}; a number of no grade is left out")
