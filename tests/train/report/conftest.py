"""Trainers that need no time: a clock that is moved by hand, a store that can fail, and runs made with them."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from anypool.store import Holder, Lease, Leases, Store, StoreGoneError
from anypool.train.report import PoolFacts, Recorder, RunFacts

START_NS = 1_790_000_000 * 10**9
NEVER = 1e6
"""Seconds between writes of a recorder whose thread writes only when it is woken."""


class HandClock:
    """Nanoseconds since 1970, moved by `go`."""

    def __init__(self) -> None:
        self.now_ns = START_NS

    def __call__(self) -> int:
        return self.now_ns

    def go(self, seconds: float) -> None:
        self.now_ns += round(seconds * 1e9)


class FailingStore:
    """A store whose writes can be made to fail, and waited for."""

    def __init__(self, inner: Store) -> None:
        self.inner, self.failing = inner, False
        self.puts: list[str] = []
        self.written = threading.Event()

    def put(self, key: str, data: bytes) -> None:
        if self.failing:
            raise StoreGoneError(f"{key}: made to fail", store=self.inner.url, key=key)
        self.inner.put(key, data)
        self.puts.append(key)
        self.written.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


POOLS = {
    "h100": PoolFacts("h100-eu", "h100", 8, 8, 3.6),
    "v6e": PoolFacts("v6e-east", "v6e", 16, 16, 1.8),
    "cpu": PoolFacts("here", "cpu", 1, 1, None),
}


@dataclass
class Made:
    """A run made by hand. `trainer` starts one; whatever is still open is closed at the end of the test."""

    store: Store
    clock: HandClock
    open: list[tuple[Recorder, FailingStore]] = field(default_factory=list)

    @property
    def leases(self) -> Leases:
        return Leases(self.store, clock=lambda: self.clock.now_ns / 1e9)

    def trainer(
        self, pool: str = "h100", *, base: str | None = "unsaid", start_up: float = 0.0, **options: Any
    ) -> tuple[Recorder, Lease]:
        """A trainer that took the run `start_up` seconds after its process began."""
        started = self.clock.now_ns
        self.clock.go(start_up)
        facts = POOLS[pool]
        lease = self.leases.take(Holder(facts.name, "host", 1, f"id-{len(self.open)}"), fence=True)
        if base != "unsaid":
            self.leases.set_base(lease, base)
        failing = FailingStore(self.store)
        settings: dict[str, Any] = {"run": RunFacts(100), "started_ns": started, "write_seconds": NEVER} | options
        recorder = Recorder(cast(Store, failing), lease.number, facts, clock=self.clock, **settings)
        self.open.append((recorder, failing))
        return recorder, lease

    def kill(self, recorder: Recorder) -> None:
        """Nothing that is not written yet will ever be."""
        next(store for one, store in self.open if one is recorder).failing = True

    def stop(self, recorder: Recorder, lease: Lease, reason: str) -> None:
        recorder.close(reason, tries=1)
        self.leases.release(lease, reason)


@pytest.fixture
def run() -> Iterator[Made]:
    made = Made(Store.open(f"memory://{uuid.uuid4()}").at("runs/a"), HandClock())
    yield made
    for recorder, _ in made.open:
        recorder.close("end of the test", tries=1)


def steps(recorder: Recorder, clock: HandClock, first: int, last: int, seconds: float = 2.0) -> None:
    """Steps that take `seconds` each."""
    with recorder.phase("compute"):
        for step in range(first, last + 1):
            clock.go(seconds)
            recorder.step(step, {"loss": 10.0 / step}, tokens=1000, seconds=seconds)
