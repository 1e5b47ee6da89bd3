"""What can be wrong with a placement problem, and how it is told."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


class PlacementError(ValueError):
    """A mistake in the problem. The message names the thing, the field, the value, what is plausible and the fix."""


class NoPlanError(ValueError):
    """No plan meets all constraints. `explain` says which conflict and what would help."""


class NowhereError(PlacementError, NoPlanError):
    """A problem in which a job has no pool where it may be: a misspelt region, or the last pool there is gone."""


class NoPlanFoundError(RuntimeError):
    """The time ended before the solver had any plan; whether there is one is not known."""


class AuditError(AssertionError):
    """The solver's plan breaks a constraint of the problem: a defect of ours, never the user's."""


def number(owner: str, field: str, value: object, low: float, high: float, unit: str, fix: str) -> float:
    """`value` if it is a finite number in low..high. Raises PlacementError."""
    wrong_type = isinstance(value, bool) or not isinstance(value, (int, float))
    if wrong_type or not math.isfinite(value) or not low <= value <= high:  # type: ignore[arg-type,operator]
        span = f"{low:,.12g} to {high:,.12g} {unit}".rstrip()
        raise PlacementError(f"{owner}: {field} = {value!r}: plausible is {span}; {fix}")
    return float(value)  # type: ignore[arg-type]


def whole(owner: str, field: str, value: object, low: int, high: int, unit: str, fix: str) -> int:
    """`value` if it is a whole number in low..high. Raises PlacementError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise PlacementError(f"{owner}: {field} = {value!r}: must be a whole number of {unit}; {fix}")
    number(owner, field, value, low, high, unit, fix)
    return value


def text(owner: str, field: str, value: object, example: str) -> str:
    """`value` if it is a text with something in it. Raises PlacementError."""
    if not isinstance(value, str) or not value.strip() or value != value.strip():
        raise PlacementError(f"{owner}: {field} = {value!r}: must be a text with no spaces around it, like {example!r}")
    return value


def member(owner: str, field: str, value: object, known: Iterable[str]) -> str:
    """`value` if it is one of `known`. Raises PlacementError with a suggestion."""
    known = list(known)
    if not isinstance(value, str) or value not in known:
        close = difflib.get_close_matches(str(value).lower(), known, n=1, cutoff=0.6)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known here: {', '.join(known) or 'none'}"
        raise PlacementError(f"{owner}: {field} = {value!r} is unknown{hint}")
    return value


def members(owner: str, field: str, values: object, known: Iterable[str]) -> None:
    """Checks a tuple of different members of `known`. Raises PlacementError."""
    if not isinstance(values, tuple):
        raise PlacementError(f'{owner}: {field} = {values!r}: must be a tuple of texts, such as ("a",)')
    known = list(known)
    for value in values:
        member(owner, field, value, known)
    if len(set(values)) != len(values):
        raise PlacementError(f"{owner}: {field} = {values!r}: names one twice; name each once")


def truth(owner: str, field: str, value: object) -> None:
    """Checks that `value` is True or False. Raises PlacementError."""
    if not isinstance(value, bool):
        raise PlacementError(f"{owner}: {field} = {value!r}: must be True or False")
