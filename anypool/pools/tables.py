"""Reading TOML tables so that every mistake is told with file, line, field, value and fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

_HEADER = re.compile(r"^\s*(\[\[?)\s*([A-Za-z0-9_.\-\"' ]+?)\s*\]\]?\s*(#.*)?$")
_KEY = re.compile(r"^\s*([A-Za-z0-9_\-]+|\"[^\"]+\"|'[^']+')\s*=")


class TableError(ValueError):
    """A mistake in a TOML file. The message names the place, the value and what to do."""


class FleetError(TableError):
    """A mistake in a fleet file."""


def suggestion(wrong: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the list of what is known when nothing is close."""
    known = list(known)
    close = difflib.get_close_matches(wrong.lower(), known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known here: {', '.join(known)}"


def line_numbers(text: str) -> dict[str, int]:
    """Where each table and key stands: `{"gateway.port": 4, "pool[1]": 9, "pool[1].engine.threads": 12}`.

    `tomllib` keeps no positions. This reads headers and `key =` lines only, which is all a message needs.
    """
    where: dict[str, int] = {}
    counts: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            name = re.sub(r"[\s\"']", "", header.group(2))
            if header.group(1) == "[[":
                counts[name] = counts.get(name, -1) + 1
                table = f"{name}[{counts[name]}]"
            else:
                first, dot, rest = name.partition(".")
                table = f"{first}[{counts[first]}]{dot}{rest}" if first in counts else name
            where.setdefault(table, number)
        elif key := _KEY.match(line):
            name = key.group(1).strip("\"'")
            where.setdefault(f"{table}.{name}" if table else name, number)
    return where


class Table:
    """One table of the file. Getters check type and range, and give the default when the key is absent."""

    def __init__(
        self,
        data: Any,
        *,
        file: str,
        path: str,
        title: str,
        lines: dict[str, int],
        keys: Sequence[str],
        not_yet: Sequence[str] = (),
        mistake: type[TableError] = FleetError,
    ) -> None:
        self.file, self.path, self.title, self.lines, self.mistake = file, path, title, lines, mistake
        if not isinstance(data, dict):
            raise self.error(None, f"is {data!r}, but must be a table: write {title} on a line of its own")
        self.data: dict[str, Any] = data
        for key in data:
            if key in not_yet:
                raise self.error(key, f"{key} is not supported yet: remove it")
            if key not in keys:
                raise self.error(key, f"unknown key {key!r}{suggestion(key, keys)}")

    def error(self, key: str | None, message: str) -> TableError:
        """The file's own kind of error, which starts with the place of `key`, or of the whole table."""
        place = self.path if key is None else f"{self.path}.{key}" if self.path else key
        line = self.lines.get(place, self.lines.get(self.path))
        return self.mistake(f"{self.file}{f':{line}' if line else ''}: {self.title} {message}".replace("  ", " "))

    def _wrong(self, key: str, expected: str) -> TableError:
        return self.error(key, f"{key} = {self.data[key]!r}: {expected}")

    def text(self, key: str, default: str | None = None, *, required: bool = False, example: str = "") -> str:
        """A non-empty string; `default` (or "") when the key is absent and not `required`."""
        if key not in self.data:
            if required:
                raise self.error(None, f'needs {key}, for example {key} = "{example}"')
            return default or ""
        value = self.data[key]
        if not isinstance(value, str) or not value.strip():
            raise self._wrong(key, f'must be a text in quotes, for example {key} = "{example or default}"')
        return value.strip()

    def choice(self, key: str, choices: Sequence[str], default: str) -> str:
        """One of `choices`."""
        value = self.text(key, default, example=default)
        if value not in choices:
            raise self._wrong(key, f"must be one of {', '.join(choices)}{_did_you_mean(value, choices)}")
        return value

    def choices(self, key: str, choices: Sequence[str], default: Sequence[str]) -> tuple[str, ...]:
        """A non-empty list of different members of `choices`."""
        value = self.data.get(key, list(default))
        example = f'for example {key} = ["{default[0]}"]'
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, f"must be a list of texts, {example}")
        for item in value:
            if item not in choices:
                raise self._wrong(key, f"{item!r} is not one of {', '.join(choices)}{_did_you_mean(item, choices)}")
        if len(set(value)) != len(value):
            raise self._wrong(key, "names one twice; name each once")
        return tuple(value)

    def integer(self, key: str, default: int | None, *, low: int, high: int | None = None, example: int) -> int | None:
        """A whole number in `low..high`."""
        if key not in self.data:
            return default
        value = self.data[key]
        wrong_range = isinstance(value, int) and (value < low or (high is not None and value > high))
        if type(value) is not int or wrong_range:
            span = f"from {low} to {high}" if high is not None else f"of at least {low}"
            raise self._wrong(key, f"must be a whole number {span}, for example {key} = {example}")
        return value

    def number(
        self, key: str, default: float | None, *, above: float, example: float, equal: bool = False
    ) -> float | None:
        """A finite number greater than `above`, or equal to it where `equal` says so."""
        if key not in self.data:
            return default
        value = self.data[key]
        fits = type(value) in (int, float) and above <= value < float("inf") and (equal or value != above)
        if not fits:
            least = f"of at least {above:g}" if equal else f"greater than {above:g}"
            raise self._wrong(key, f"must be a number {least}, for example {key} = {example:g}")
        return float(value)


def _did_you_mean(wrong: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(wrong.lower(), known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
