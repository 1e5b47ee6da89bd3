"""Problem and plan as JSON, and back: what a file holds is checked like what code gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from anypool.plan.placement.errors import PlacementError, member
from anypool.plan.placement.plan import Assignment, Failover, Plan, Reserve
from anypool.plan.placement.problem import Job, Limits, NoRate, PoolOffer, Problem, Rate

FORMAT = "anypool-placement/1"
_PARTS: dict[type, dict[str, type]] = {
    Problem: {"jobs": Job, "pools": PoolOffer, "rates": Rate, "no_rates": NoRate, "limits": Limits},
    Plan: {"assignments": Assignment, "failovers": Failover, "reserves": Reserve},
}
T = TypeVar("T", Problem, Plan)


def as_json(what: Problem | Plan) -> str:
    """A JSON object of all its fields, indented, with the name of this format."""
    data = {"format": FORMAT, "what": type(what).__name__.lower(), **_plain(what)}
    return msgspec.json.format(msgspec.json.encode(data), indent=2).decode() + "\n"


def problem_from_json(text: str | bytes) -> Problem:
    """The problem that `as_json` wrote. Raises PlacementError naming the field."""
    return _read(text, Problem)


def plan_from_json(text: str | bytes) -> Plan:
    """The plan that `as_json` wrote. Raises PlacementError; `audit` says whether it is right for a problem."""
    return _read(text, Plan)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return value


def _read(text: str | bytes, kind: type[T]) -> T:
    name = kind.__name__.lower()
    try:
        data = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PlacementError(f"{name}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise PlacementError(f"{name}: {type(data).__name__}: must be a JSON object")
    for key, wanted in (("format", FORMAT), ("what", name)):
        if data.pop(key, None) != wanted:
            raise PlacementError(f'{name}: {key} must be "{wanted}"; write it with as_json')
    _check_keys(name, data, kind)
    for field, part in _PARTS[kind].items():
        value = data.get(field, [])
        entries = value if isinstance(value, list) else [value]
        for index, entry in enumerate(entries):
            _check_keys(f"{name}: {field}[{index}]", entry, part)
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        # Errors of our own arrive here too: msgspec adds where in the file they belong.
        raise PlacementError(f"{name}: {error}") from None


def _check_keys(where: str, data: Any, kind: type) -> None:
    if not isinstance(data, dict):
        raise PlacementError(f"{where}: {data!r}: must be an object")
    known = [field.name for field in dataclasses.fields(kind)]
    for key in data:
        member(where, "key", key, known)
