"""Leases: two holders never both hold the highest number, whatever order things happen in."""

import threading
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from anypool.store import (
    Entry,
    ExistsError,
    Heartbeat,
    Holder,
    Lease,
    LeaseHeldError,
    LeaseLostError,
    Leases,
    NotFoundError,
    Store,
    StoreError,
)

TTL = 30.0


def holder(number: int) -> Holder:
    return Holder(f"pool-{number}", f"host-{number}", 100 + number, f"id-{number}")


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.25

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def leases(store, clock):
    return Leases(store.at("runs/r"), TTL, clock)


def test_the_first_lease(leases, store, clock):
    assert leases.current() is None
    lease = leases.take(holder(1))
    assert lease == Lease(1, holder(1), clock.now)
    assert leases.current() == lease
    leases.check(lease)
    assert leases.heartbeat(1) is None and leases.released(1) is None
    assert [entry.key for entry in store.list()] == ["runs/r/leases/000001.json"]


def test_a_lease_made_again_from_its_parts_is_the_same(leases, clock):
    lease = leases.take(holder(1))
    leases.check(Lease(1, Holder("pool-1", "host-1", 101, "id-1"), lease.since))


def test_a_living_holder_keeps_the_run(leases, clock):
    first = leases.take(holder(1))
    clock.now += TTL - 0.001
    with pytest.raises(LeaseHeldError) as raised:
        leases.take(holder(2))
    assert raised.value.lease == first and raised.value.heartbeat_at is None
    assert (
        "pool 'pool-1' (process 101 on host-1) (lease 1, since 2027-01-15 08:00:00 UTC, no heartbeat yet) holds it and "
        "counts as alive until 30 s after that; wait, stop it, or fence it"
    ) in str(raised.value)

    leases.beat(first, {"step": 7})
    clock.now += TTL - 0.001
    with pytest.raises(LeaseHeldError, match=r"last heartbeat 2027-01-15 08:00:30 UTC") as raised:
        leases.take(holder(2))
    assert raised.value.heartbeat_at == leases.heartbeat(1).at
    clock.now += 0.001
    assert leases.take(holder(2)).number == 2


def test_a_holder_that_never_beat_counts_from_its_start(leases, clock):
    leases.take(holder(1))
    clock.now += TTL
    assert leases.take(holder(2)).number == 2


def test_fencing_a_living_holder(leases):
    first = leases.take(holder(1))
    second = leases.take(holder(2), fence=True)
    assert second.number == 2
    leases.check(second)
    message = (
        r"lease 1 of pool 'pool-1' \(process 101 on host-1\) is lost: pool 'pool-2' \(process 102 on host-2\) took it "
        "over as number 2; stop writing to this run"
    )
    calls = (
        lambda: leases.check(first),
        lambda: leases.beat(first, {}),
        lambda: leases.set_base(first, None),
        lambda: leases.release(first, "late"),
    )
    for call in calls:
        with pytest.raises(LeaseLostError, match=message) as raised:
            call()
        assert raised.value.lease == first
    assert leases.heartbeat(1) is None and leases.released(1) is None
    with pytest.raises(NotFoundError):
        leases.base(1)


def test_a_released_run_is_free_at_once(leases):
    first = leases.take(holder(1))
    leases.beat(first, {})
    leases.release(first, "moved to pool-2")
    leases.release(first, "again")
    assert leases.released(1) == "moved to pool-2"
    assert leases.take(holder(2)).number == 2


def test_heartbeats_say_what_is_known(leases, clock):
    lease = leases.take(holder(1))
    leases.beat(lease, {"step": 1, "state": "train"})
    clock.now += 5
    leases.beat(lease, {"step": 2, "rates": [1.5, None], "ö": {"x": True}})
    assert leases.heartbeat(1) == Heartbeat(clock.now, {"step": 2, "rates": [1.5, None], "ö": {"x": True}})


def test_bases_are_recorded_once(leases):
    first = leases.take(holder(1))
    with pytest.raises(NotFoundError, match=r"leases/000001.base.json: no such object"):
        leases.base(1)
    leases.set_base(first, None)
    leases.set_base(first, None)
    with pytest.raises(ExistsError, match=r"leases/000001.base.json: already exists"):
        leases.set_base(first, "checkpoints/step-00000010-e1")
    assert leases.base(1) is None
    second = leases.take(holder(2), fence=True)
    leases.set_base(second, "checkpoints/step-00000010-e1")
    assert leases.base(2) == "checkpoints/step-00000010-e1"


def test_a_run_that_was_removed_and_begun_again_is_not_the_old_one(leases, store, clock):
    old = leases.take(holder(1))
    store.delete(*[entry.key for entry in store.list()])
    with pytest.raises(LeaseLostError, match="its record was deleted"):
        leases.check(old)
    clock.now += 1
    new = leases.take(holder(2))
    assert new.number == old.number
    with pytest.raises(LeaseLostError, match=r"its record names pool 'pool-2'"):
        leases.beat(old, {})
    assert leases.heartbeat(1) is None
    leases.check(new)


def test_numbers_go_on_past_six_digits(leases, store):
    store.put("runs/r/leases/999999.json", store_record(999_999))
    assert leases.take(holder(1)).number == 1_000_000
    assert leases.take(holder(2), fence=True).number == 1_000_001
    assert leases.current().number == 1_000_001


def store_record(number: int) -> bytes:
    return (
        b'{"number": %d, "holder": {"pool": "p", "host": "h", "pid": 1, "id": "i"}, "since": 0, "nonce": "n"}' % number
    )


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"number": "1"}', b"\xff\xfe", store_record(1)[:-9] + b"}"])
def test_something_else_under_a_lease_is_told(leases, store, data):
    store.put("runs/r/leases/000001.json", data)
    for call in (leases.current, lambda: leases.take(holder(1))):
        with pytest.raises(StoreError, match=r"runs/r: leases/000001.json is no record of a lease .*: move it away"):
            call()


@pytest.mark.parametrize("ttl", [0, -1, float("inf"), float("nan")])
def test_a_ttl_that_makes_no_sense(ttl):
    with pytest.raises(ValueError, match=r"ttl_seconds = .*: must be a number of seconds greater than 0, such as 30"):
        Leases(Store.open("memory://ttl"), ttl)


@pytest.mark.parametrize("fence", [False, True])
def test_of_many_takers_one_wins_a_number(store, clock, fence):
    start = threading.Barrier(6)

    def takes(number: int) -> Lease | None:
        leases = Leases(store, TTL, clock)
        start.wait()
        try:
            return leases.take(holder(number), fence=fence)
        except LeaseHeldError:
            return None

    with ThreadPoolExecutor(6) as pool:
        taken = [lease for lease in pool.map(takes, range(6)) if lease]
    # A fencing taker that comes late takes the next number from the winner; nobody shares one.
    assert [lease.number for lease in sorted(taken, key=lambda lease: lease.number)] == list(range(1, len(taken) + 1))
    assert fence or len(taken) == 1
    reader = Leases(store, TTL, clock)
    assert reader.current() in taken
    assert sum(passes(reader, lease) for lease in taken) == 1


def passes(leases: Leases, lease: Lease) -> bool:
    try:
        leases.check(lease)
    except LeaseLostError:
        return False
    return True


class _StaleStore(Store):
    """A store whose next listing is one seen earlier: what a taker knows that was interrupted after it looked."""

    seen: Sequence[Entry] | None = None

    def list(self, prefix: str = "") -> Any:
        return self.seen if self.seen is not None else super().list(prefix)


class _AnyOrder(RuleBasedStateMachine):
    """Several holders, each with its own old view of the store and its own wrong clock, beside a model of the truth."""

    HOLDERS = st.integers(0, 3)

    @initialize(skews=st.lists(st.floats(-1000, 1000), min_size=4, max_size=4))
    def begin(self, skews: list[float]) -> None:
        self.now = 1_800_000_000.0
        name = f"memory://{uuid.uuid4().hex}"
        self.stores = [_StaleStore(Store.open(name)._place) for _ in range(4)]
        self.leases = [
            Leases(store, TTL, partial(self._clock, skew)) for store, skew in zip(self.stores, skews, strict=True)
        ]
        self.skews = skews
        self.held: dict[int, list[Lease]] = {number: [] for number in range(4)}
        self.highest = 0
        self.last_sign: dict[int, float] = {}
        self.released: set[int] = set()
        self.looked: dict[int, int] = {}

    def _clock(self, skew: float) -> float:
        return self.now + skew

    @rule(seconds=st.sampled_from([0.0, 0.5, TTL / 2, TTL, 10 * TTL]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(who=HOLDERS)
    def looks_and_is_interrupted(self, who: int) -> None:
        self.stores[who].seen = Store(self.stores[who]._place).list("leases")
        self.looked[who] = self.highest

    @rule(who=HOLDERS, fence=st.booleans())
    def takes(self, who: int, fence: bool) -> None:
        saw = self.looked.get(who, self.highest)
        alive = saw > 0 and saw not in self.released and self.now + self.skews[who] - self.last_sign[saw] < TTL
        try:
            lease = self.leases[who].take(holder(who), fence=fence)
        except LeaseHeldError:
            assert (alive and not fence) or saw < self.highest, "refused without a reason"
        else:
            assert fence or not alive, "took the run from a living holder"
            assert saw == self.highest and lease.number == self.highest + 1, "a number was given twice or left out"
            assert lease.holder == holder(who)
            self.highest = lease.number
            self.last_sign[lease.number] = lease.since
            self.held[who].append(lease)
        finally:
            self.stores[who].seen = None
            self.looked.pop(who, None)

    @rule(who=HOLDERS, data=st.data(), step=st.integers(0, 9))
    def beats(self, who: int, data: st.DataObject, step: int) -> None:
        lease = self._one_of(who, data)
        if lease is None:
            return
        if lease.number == self.highest:
            self.leases[who].beat(lease, {"step": step})
            at = self.now + self.skews[who]
            assert self.leases[0].heartbeat(lease.number) == Heartbeat(at, {"step": step})
            self.last_sign[lease.number] = at
        else:
            before = self.leases[who].heartbeat(lease.number)
            with pytest.raises(LeaseLostError):
                self.leases[who].beat(lease, {"step": step})
            assert self.leases[who].heartbeat(lease.number) == before

    @rule(who=HOLDERS, data=st.data())
    def releases(self, who: int, data: st.DataObject) -> None:
        lease = self._one_of(who, data)
        if lease is None:
            return
        if lease.number == self.highest:
            self.leases[who].release(lease, "done")
            self.released.add(lease.number)
        else:
            with pytest.raises(LeaseLostError):
                self.leases[who].release(lease, "done")

    @invariant()
    def only_the_highest_passes(self) -> None:
        if not hasattr(self, "held"):
            return
        reader = Leases(Store(self.stores[0]._place), TTL)
        every = [lease for leases in self.held.values() for lease in leases]
        assert [lease.number for lease in every if passes(reader, lease)] == ([self.highest] if self.highest else [])
        current = reader.current()
        assert (current.number if current else 0) == self.highest
        assert {lease.number for lease in every if reader.released(lease.number)} == self.released

    def _one_of(self, who: int, data: st.DataObject) -> Lease | None:
        return data.draw(st.sampled_from(self.held[who])) if self.held[who] else None


def test_any_order_of_events():
    run = _AnyOrder.TestCase
    run.settings = settings(max_examples=60, stateful_step_count=30)
    run("runTest").runTest()
