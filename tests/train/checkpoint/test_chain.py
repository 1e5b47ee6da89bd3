"""Which checkpoints count, whatever fenced trainers still commit; and which are deleted."""

import re
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anypool.store import LeaseLostError, Leases, Manifest, NotFoundError, Store, commit
from anypool.store.leases import Holder
from anypool.train.checkpoint import CheckpointError, Policy
from anypool.train.checkpoint.chain import Folders, chain
from anypool.train.checkpoint.keep import superfluous
from anypool.train.checkpoint.names import Place, parse_entry
from tests.train.checkpoint.states import checkpoints

STORES = count()


class Run:
    """A run whose trainers only commit: real leases and manifests, no tensors. What should count is kept beside it.

    history: of every epoch, the checkpoints that its state comes from, oldest first, as they were when it began.
    """

    def __init__(self):
        self.store = Store.open(f"memory://chain-{next(STORES)}")
        self.leases = Leases(self.store)
        self.held = {}
        self.history = {0: []}

    @property
    def epoch(self):
        return len(self.held)

    def take(self):
        """Another trainer takes the run over; the one before does not notice."""
        lease = self.leases.take(Holder("pool", "host", 1, str(self.epoch)), fence=True)
        self.held[lease.number] = lease

    def begin(self, epoch):
        """A trainer decides what it starts from, if it did not yet and still holds the run."""
        if epoch in self.history or epoch not in self.held:
            return
        latest = checkpoints(self.store).latest(epoch)
        try:
            self.leases.set_base(self.held[epoch], latest and latest.folder)
        except LeaseLostError:
            assert epoch != self.epoch
            return
        self.history[epoch] = list(self.expected(epoch))

    def commit(self, epoch, steps):
        """A trainer that has begun commits a later step, whether or not the run is still its own."""
        if epoch not in self.history or epoch == 0:
            return
        before = self.history[epoch][-1].step if self.history[epoch] else 0
        place = Place(epoch, before + steps)
        commit(self.store, place.folder, Manifest({}, {"format": 1, "known": {"at": place.step}}))
        self.history[epoch].append(place)

    def expected(self, epoch):
        """Of an epoch that has not begun: those of the newest one before it that has, as of now."""
        return self.history[max(number for number in self.history if number <= epoch)]


# Epochs are counted back from the current one: 0 is the holder, the others were fenced.
BACK = st.integers(0, 2)
EVENTS = st.one_of(
    st.tuples(st.just("take"), st.booleans()),
    st.tuples(st.just("begin"), BACK),
    st.tuples(st.just("commit"), BACK, st.integers(1, 3)),
    st.tuples(st.just("commit"), BACK, st.integers(1, 3)),
    st.tuples(st.just("leave"), BACK, st.integers(1, 9)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(EVENTS, min_size=4, max_size=25))
def test_late_commits_of_fenced_trainers_never_count(events):
    run = Run()
    run.take(), run.begin(1)
    for name, argument, *more in events:
        epoch = max(1, run.epoch - argument)
        if name == "take":
            run.take()
            if argument:  # else it may say later what it starts from, or never
                run.begin(run.epoch)
        elif name == "leave":  # a folder without a manifest
            run.store.put(f"{Place(epoch, *more).folder}/run.json", b"{}")
        else:
            getattr(run, name)(epoch, *more)
        found = checkpoints(run.store).committed()
        assert [Place(info.epoch, info.step) for info in found] == run.expected(run.epoch)[::-1]
        latest = checkpoints(run.store).latest()
        assert latest == (found[0] if found else None)
        assert latest is None or latest.known == {"at": latest.step}


def test_a_zombie_that_commits_after_the_takeover():
    run = Run()
    run.take(), run.begin(1), run.commit(1, 100), run.commit(1, 100)
    run.take(), run.begin(2)
    run.commit(1, 100)  # step 300 of epoch 1, too late
    assert checkpoints(run.store).latest().folder == "checkpoints/step-00000200-e1"
    run.commit(2, 50)
    assert [info.step for info in checkpoints(run.store).committed()] == [250, 200, 100]
    run.take()  # and dies before it says what it starts from
    run.commit(2, 50)
    run.take(), run.begin(4)
    assert checkpoints(run.store).latest().folder == "checkpoints/step-00000300-e2"


def test_a_lost_record_of_what_an_epoch_started_from():
    def base(epoch):
        raise NotFoundError(f"no record of {epoch}")

    places = [Place(epoch, step) for epoch in (1, 2) for step in (5, 9)]
    assert chain(places, 3, base) == [Place(2, 9), Place(2, 5)]  # what came before epoch 2 is unknown


def test_a_run_that_nobody_took():
    store = Store.open("memory://no-leases")
    assert checkpoints(store).latest() is None and checkpoints(store).committed() == []
    commit(store, Place(1, 5).folder, Manifest({}, {}))
    assert checkpoints(store).latest().step == 5


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (
            "checkpoints/somewhere",
            "epoch 1 is recorded to have started from 'checkpoints/somewhere', which is no folder",
        ),
        ("checkpoints/step-00000007-e3", "started from checkpoints/step-00000007-e3, which is not of an earlier epoch"),
    ],
)
def test_records_that_make_no_sense(base, message):
    run = Run()
    run.take()
    run.leases.set_base(run.held[1], base)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        checkpoints(run.store).latest()


@given(st.integers(0, 10**12), st.integers(1, 10**6))
def test_folders_have_names_that_can_be_read(step, epoch):
    place = Place(epoch, step)
    assert Place.parse(place.folder) == Place.parse(place.folder.rpartition("/")[2]) == place


@pytest.mark.parametrize("name", ["step-1-e1", "step-00000001", "step-0000000x-e1", "step-00000001-e1.tmp", "outer"])
def test_other_folders_are_none(name):
    assert Place.parse(f"checkpoints/{name}") is None
    store = Store.open(f"memory://folder-{name}")
    store.put(f"checkpoints/{name}/manifest.json", b"{}")
    assert Folders.of(store) == Folders(frozenset(), frozenset())


@pytest.mark.parametrize("entry", ["", "#0:1", "a#", "a#0", "a#0:1,", "a#0:1#2:3", "a#-1:2"])
def test_names_of_entries_that_make_no_sense(entry):
    with pytest.raises(CheckpointError, match="is no name of a tensor or of a slice"):
        parse_entry(entry)


PLACES = st.builds(Place, st.integers(1, 3), st.integers(1, 12))


@given(
    st.sets(PLACES, min_size=1),
    st.sets(PLACES),
    st.builds(Policy, keep_last=st.none() | st.integers(1, 4), keep_every=st.none() | st.integers(1, 5)),
    st.dictionaries(st.integers(2, 3), st.none() | PLACES),
)
def test_what_is_deleted(committed, begun, policy, bases):
    def base(epoch):
        place = bases.get(epoch)
        return place if place is not None and place.epoch < epoch else None

    own = max(committed)
    now = chain(committed, own.epoch, base)
    gone = superfluous(policy, Folders(frozenset(committed), frozenset(begun - committed)), now, own, ())
    assert now[0] == own and own not in gone
    newest = set(now if policy.keep_last is None else now[: policy.keep_last])
    every = {place for place in now if policy.keep_every and place.step % policy.keep_every == 0}
    assert not set(gone) & (newest | every)
    # Whatever stays is of the chain, or may still be written to.
    left = (committed | begun) - set(gone)
    assert all(place in newest | every or place.epoch > own.epoch or place.step > own.step for place in left)
