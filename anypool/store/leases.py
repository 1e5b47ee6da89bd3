"""Who holds a run: numbered records that are only ever created.

    leases/000003.json             the highest number holds the run; the number is the run's epoch
    leases/000003.heartbeat.json   overwritten by the holder: when, and what it wants known
    leases/000003.base.json        which checkpoint this epoch started from
    leases/000003.released.json    the holder ended on purpose, and why

Nothing here rests on clocks but *when* a silent holder may be replaced. Two machines whose clocks differ can replace a
holder too early or too late; they can never both hold the highest number, because a number is created once.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec

from anypool.store.claim import claim
from anypool.store.errors import ExistsError, NotFoundError, StoreError
from anypool.store.store import Store

FOLDER = "leases"
_LEASE = re.compile(rf"{FOLDER}/(\d{{6,}})\.json")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Holder:
    """Who takes a lease: the pool it runs on, host name, process id, and an id no other holder has (a UUID)."""

    pool: str
    host: str
    pid: int
    id: str


@dataclass(frozen=True)
class Lease:
    """One epoch of a run: its number from 1, its holder, and when it began in unix seconds of the holder's clock."""

    number: int
    holder: Holder
    since: float


@dataclass(frozen=True)
class Heartbeat:
    """A holder's last sign of life, unix seconds of its clock, and what it told (its step, its state, …)."""

    at: float
    known: dict[str, Any]


class LeaseHeldError(StoreError):
    """The run is held by a living holder. `lease` is its lease, `heartbeat_at` its last heartbeat or None."""

    def __init__(self, message: str, *, store: str, lease: Lease, heartbeat_at: float | None) -> None:
        super().__init__(message, store=store, key=_key(lease.number))
        self.lease, self.heartbeat_at = lease, heartbeat_at


class LeaseLostError(StoreError):
    """The lease is no longer the highest: another holds the run. `lease` is the lost one. Stop writing."""

    def __init__(self, message: str, *, store: str, lease: Lease) -> None:
        super().__init__(message, store=store, key=_key(lease.number))
        self.lease = lease


@dataclass(frozen=True)
class _LeaseRecord:
    number: int
    holder: Holder
    since: float
    nonce: str  # by it a taker knows its own record again, should the answer to its write be lost


@dataclass(frozen=True)
class _BaseRecord:
    base: str | None
    holder: Holder
    since: float


@dataclass(frozen=True)
class _ReleaseRecord:
    reason: str
    at: float
    holder: Holder
    since: float


class Leases:
    """The leases of one run.

    store: the store of the run (`store.at("runs/NAME")`).
    ttl_seconds: how long after its last heartbeat (or its start) a holder counts as alive.
    clock: gives unix seconds.
    """

    def __init__(self, store: Store, ttl_seconds: float = 30.0, clock: Callable[[], float] = time.time) -> None:
        if not 0 < ttl_seconds < float("inf"):
            raise ValueError(f"ttl_seconds = {ttl_seconds!r}: must be a number of seconds greater than 0, such as 30")
        self.store, self.ttl_seconds, self._clock = store, ttl_seconds, clock

    def current(self) -> Lease | None:
        """The highest lease, whether its holder lives or not; None for a run nobody took yet."""
        found = (_LEASE.fullmatch(entry.key) for entry in self.store.list(FOLDER))
        number = max((int(match.group(1)) for match in found if match), default=None)
        return None if number is None else self._lease(number)

    def take(self, holder: Holder, fence: bool = False) -> Lease:
        """Hold the run from now on, under the next number. Of several takers of a number exactly one succeeds.

        Raises LeaseHeldError if the holder before neither released the run nor has been silent for `ttl_seconds`,
        unless `fence`; and, also with `fence`, if another took the run in the same moment.
        """
        before = self.current()
        if before is not None and not fence:
            self._refuse_if_alive(before)
        lease = Lease((before.number if before else 0) + 1, holder, self._clock())
        record = _LeaseRecord(lease.number, holder, lease.since, secrets.token_hex(16))
        try:
            claim(self.store, _key(lease.number), _json(record))
        except ExistsError as error:
            raise self._held(self.current() or lease, "took the run in the same moment; look who holds it") from error
        return lease

    def beat(self, lease: Lease, known: dict[str, Any]) -> None:
        """Say that the holder lives, and what it wants known (JSON). Raises LeaseLostError if it lost the lease."""
        self.check(lease)
        self.store.put(_key(lease.number, "heartbeat"), _json(Heartbeat(self._clock(), known)))

    def check(self, lease: Lease) -> None:
        """Raises LeaseLostError unless this is the highest lease, and as it was taken.

        Two small reads. It says what was so when it looked: what must not happen after a loss has to be create-only, or
        be found by way of a lease.
        """
        # Numbers have no gaps, so the next one tells of all higher ones.
        if self.store.exists(_key(lease.number + 1)):
            newest = self.current()
            by = f"{_who(newest)} took it over as number {newest.number}" if newest else "another took it over"
            raise self._lost(lease, by)
        try:
            found = self._lease(lease.number)
        except NotFoundError as error:
            raise self._lost(lease, "its record was deleted") from error
        if found != lease:
            raise self._lost(lease, f"its record names {_who(found)}")

    def heartbeat(self, number: int) -> Heartbeat | None:
        """The last heartbeat of a lease, or None."""
        return self._load_or_none(_key(number, "heartbeat"), Heartbeat)

    def set_base(self, lease: Lease, base: str | None) -> None:
        """Record which checkpoint this epoch started from; None: from nothing.

        Raises ExistsError if another base was recorded, LeaseLostError if the lease was lost.
        """
        self.check(lease)
        claim(self.store, _key(lease.number, "base"), _json(_BaseRecord(base, lease.holder, lease.since)))

    def base(self, number: int) -> str | None:
        """Which checkpoint an epoch started from; None: from nothing.

        Raises NotFoundError for an epoch that ended before it said so: it committed nothing, and its chain goes on with
        the epoch before it.
        """
        return self._load(_key(number, "base"), _BaseRecord).base

    def release(self, lease: Lease, reason: str) -> None:
        """Give the run up on purpose: the next taker need not wait. A second release changes nothing.

        Raises LeaseLostError if the lease was lost.
        """
        self.check(lease)
        record = _ReleaseRecord(reason, self._clock(), lease.holder, lease.since)
        with suppress(ExistsError):
            claim(self.store, _key(lease.number, "released"), _json(record))

    def released(self, number: int) -> str | None:
        """Why the holder gave a lease up, or None if it did not."""
        record = self._load_or_none(_key(number, "released"), _ReleaseRecord)
        return None if record is None else record.reason

    def _refuse_if_alive(self, lease: Lease) -> None:
        if self.released(lease.number) is not None:
            return
        heartbeat = self.heartbeat(lease.number)
        last = heartbeat.at if heartbeat else lease.since
        if self._clock() - last < self.ttl_seconds:
            raise self._held(
                lease,
                f"holds it and counts as alive until {self.ttl_seconds:g} s after that; wait, stop it, or fence it",
            )

    def _held(self, lease: Lease, what: str) -> LeaseHeldError:
        heartbeat = self.heartbeat(lease.number)
        last = f"last heartbeat {_time(heartbeat.at)}" if heartbeat else "no heartbeat yet"
        return LeaseHeldError(
            f"{self.store.url}: {_who(lease)} (lease {lease.number}, since {_time(lease.since)}, {last}) {what}",
            store=self.store.url,
            lease=lease,
            heartbeat_at=heartbeat.at if heartbeat else None,
        )

    def _lost(self, lease: Lease, why: str) -> LeaseLostError:
        return LeaseLostError(
            f"{self.store.url}: lease {lease.number} of {_who(lease)} is lost: {why}; stop writing to this run",
            store=self.store.url,
            lease=lease,
        )

    def _lease(self, number: int) -> Lease:
        record = self._load(_key(number), _LeaseRecord)
        return Lease(record.number, record.holder, record.since)

    def _load_or_none(self, key: str, kind: type[_T]) -> _T | None:
        try:
            return self._load(key, kind)
        except NotFoundError:
            return None

    def _load(self, key: str, kind: type[_T]) -> _T:
        data = self.store.get(key)
        try:
            return msgspec.json.decode(data, type=kind)
        except msgspec.MsgspecError as error:
            raise StoreError(
                f"{self.store.url}: {key} is no record of a lease ({error}); something else wrote there: move it away",
                store=self.store.url,
                key=key,
            ) from error


def _key(number: int, part: str = "") -> str:
    return f"{FOLDER}/{number:06d}{'.' if part else ''}{part}.json"


def _json(record: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(record), indent=2)


def _who(lease: Lease) -> str:
    return f"pool {lease.holder.pool!r} (process {lease.holder.pid} on {lease.holder.host})"


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
