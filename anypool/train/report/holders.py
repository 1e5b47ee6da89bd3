"""Who held a run when, as its leases say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import msgspec

from anypool.store import Lease, Leases, NotFoundError, Store, StoreError

_LEASE = re.compile(r"leases/(\d{6,})(\.[a-z]+)?\.json")
FROM_NOTHING = ""


@dataclass(frozen=True)
class Holding:
    """One lease and what lies beside it. Times in nanoseconds since 1970.

    base: the checkpoint's folder that the epoch started from, FROM_NOTHING, or None if the epoch did not get so far.
    released: why its holder gave it up on purpose. known: what its last heartbeat told.
    """

    number: int
    pool: str
    since_ns: int
    heartbeat_ns: int | None = None
    known: Mapping[str, Any] | None = None
    base: str | None = None
    released: str | None = None


def holdings(store: Store, problems: list[str]) -> dict[int, Holding]:
    """All leases of a run by number. What cannot be read is named in `problems` and left out. Raises StoreError."""
    found: dict[int, set[str]] = {}
    for entry in store.list("leases"):
        if match := _LEASE.fullmatch(entry.key):
            found.setdefault(int(match.group(1)), set()).add(match.group(2) or "")
    numbers = [number for number, parts in sorted(found.items()) if "" in parts]
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda number: _read(store, number, found[number]), numbers))
    problems += [problem for _, told in read for problem in told]
    return {number: holding for number, (holding, _) in zip(numbers, read, strict=True) if holding is not None}


def _read(store: Store, number: int, parts: set[str]) -> tuple[Holding | None, list[str]]:
    leases, key = Leases(store), f"leases/{number:06d}.json"
    problems: list[str] = []
    try:
        lease = msgspec.json.decode(store.get(key), type=Lease)
    except (msgspec.MsgspecError, NotFoundError) as error:
        return None, [f"{key} makes no sense and is left out: {error}"]
    heartbeat = base = released = None
    try:
        heartbeat = leases.heartbeat(number) if ".heartbeat" in parts else None
        base = (leases.base(number) or FROM_NOTHING) if ".base" in parts else None
        released = leases.released(number) if ".released" in parts else None
    except NotFoundError as error:
        problems.append(f"{error.key} vanished while it was read")
    except StoreError as error:
        if not isinstance(error.__cause__, msgspec.MsgspecError):
            raise
        problems.append(f"{error.key} makes no sense and is left out: {error.__cause__}")
    return Holding(
        number,
        lease.holder.pool,
        round(lease.since * 1e9),
        round(heartbeat.at * 1e9) if heartbeat else None,
        heartbeat.known if heartbeat else None,
        base,
        released,
    ), problems
