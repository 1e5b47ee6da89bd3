"""The account: every nanosecond in one category, whatever was killed, and the dollars and rates that follow."""

import uuid
from collections import defaultdict
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anypool.chips import load_chip
from anypool.models import counts
from anypool.store import Store
from anypool.train.report import CATEGORIES, OVERLAP, PHASES, PoolFacts, RunFacts, RunRecord, account, read_run
from anypool.train.report.holders import Holding
from anypool.train.report.lines import Ended, Event, Opened, Time
from anypool.train.report.reading import Epoch
from tests.train.conftest import MODEL
from tests.train.report.conftest import POOLS, HandClock, Made, steps


def seconds(run: Made) -> dict[str, float]:
    """Of every category that has any, overlap included."""
    told = account(read_run(run.store), now_ns=run.clock.now_ns)
    assert sum(told.nanoseconds(name) for name in CATEGORIES) == told.wall_ns
    names = (*CATEGORIES, OVERLAP)
    return {name: told.seconds(name) for name in names if told.nanoseconds(name)}


def commit(run: Made, recorder, lease, step: int) -> str:
    recorder.event("commit", step=step)
    recorder.flush()
    return f"step-{step:08d}-e{lease.number}"


def test_a_killed_trainer_and_the_next_one(run):
    first, lease = run.trainer("h100", base=None, start_up=5)
    with first.phase("compile"):
        run.clock.go(30)
    steps(first, run.clock, 1, 10)
    base = commit(run, first, lease, 10)
    steps(first, run.clock, 11, 13)
    first.flush()
    run.kill(first)
    steps(first, run.clock, 14, 15)
    run.leases.beat(lease, first.known())
    run.clock.go(40)
    second, lease = run.trainer("v6e", base=base, start_up=7)
    with second.phase("restore"):
        run.clock.go(11)
    with second.phase("gate"):
        run.clock.go(3)
    steps(second, run.clock, 11, 20)
    run.stop(second, lease, "finished")
    run.clock.go(1000)
    assert seconds(run) == {
        "start-up": 5 + 7, "compile": 30, "compute": 20 + 20, "lost work": 6 + 4, "detect": 40, "restore": 11,
        "gate": 3,
    }  # fmt: skip
    told = account(read_run(run.store))
    assert (told.steps, told.steps_lost, told.tokens, told.tokens_lost) == (20, 3, 20_000, 3_000)
    assert told.goodput == pytest.approx(40 / (12 + 30 + 40 + 10 + 40 + 11 + 3))
    assert told.tokens_per_compute_second == 20_000 / 40
    assert told.tokens_per_wall_second == pytest.approx(20_000 / (told.wall_ns / 1e9))
    h100, v6e = told.pools
    assert h100.cost().usd == pytest.approx((5 + 30 + 20 + 10 + 40) * 8 * 3.6 / 3600)
    assert h100.cost("detect").usd == pytest.approx(40 * 8 * 3.6 / 3600)
    assert v6e.cost().usd == pytest.approx((7 + 11 + 3 + 20) * 16 * 1.8 / 3600)
    assert told.cost().complete


def test_time_between_trainers_that_stopped_on_purpose_is_idle_and_free(run):
    first, lease = run.trainer("h100", base=None)
    steps(first, run.clock, 1, 5)
    base = commit(run, first, lease, 5)
    run.stop(first, lease, "moved")
    run.clock.go(600)
    second, lease = run.trainer("h100", base=base, start_up=1)
    steps(second, run.clock, 6, 10)
    run.stop(second, lease, "finished")
    assert seconds(run) == {"compute": 20, "idle": 600, "start-up": 1}
    assert account(read_run(run.store)).cost().usd == pytest.approx(21 * 8 * 3.6 / 3600)


def test_idle_inside_a_trainer_is_paid(run):
    trainer, lease = run.trainer("h100", base=None)
    with trainer.phase("idle"):
        run.clock.go(100)
    run.stop(trainer, lease, "stopped")
    assert account(read_run(run.store)).cost("idle").usd == pytest.approx(100 * 8 * 3.6 / 3600)


def test_two_trainers_at_once_are_one_time_and_two_bills(run):
    """The second starts while the first computes; the first, fenced, goes on for a while and does not know."""
    first, lease = run.trainer("h100", base=None)
    steps(first, run.clock, 1, 10)
    base = commit(run, first, lease, 10)
    steps(first, run.clock, 11, 15)
    first.flush()
    second, lease = run.trainer("v6e", base=base, start_up=6)
    with first.phase("compute"), second.phase("restore"):
        run.clock.go(8)
    first.flush()
    steps(second, run.clock, 11, 20)
    run.stop(second, lease, "finished")
    run.kill(first)
    # The first one's 6 seconds of start-up time of the second are its own: it still held the run.
    assert seconds(run) == {
        "compute": 20 + 20, "lost work": 10, "idle": 6, "restore": 8, OVERLAP: 6 + 8,
    }  # fmt: skip
    told = account(read_run(run.store))
    assert told.pools[1].nanoseconds[OVERLAP] == 6 * 10**9
    assert told.cost(OVERLAP).usd == pytest.approx((8 * 8 * 3.6 + 6 * 16 * 1.8) / 3600)


def test_a_trainer_that_died_before_its_first_line(run):
    first, lease = run.trainer("h100", base=None)
    steps(first, run.clock, 1, 10)
    base = commit(run, first, lease, 10)
    run.stop(first, lease, "moved")
    second, lease = run.trainer("v6e", write_seconds=1e6)
    second.close("gone", tries=1)
    run.store.delete(*(entry.key for entry in run.store.list("ledger/e000002")))
    run.clock.go(4)
    run.leases.beat(lease, {})
    run.clock.go(50)
    third, lease = run.trainer("h100", base=base)
    steps(third, run.clock, 11, 12)
    run.stop(third, lease, "finished")
    assert seconds(run) == {"compute": 24, "start-up": 4, "detect": 50}
    told = account(read_run(run.store))
    assert [pool.pool.name for pool in told.pools] == ["h100-eu", "v6e-east"]
    assert str(told.pools[1].cost()) == "unknown price"
    assert str(told.cost()) == f"at least ${24 * 8 * 3.6 / 3600:.2f}"


def test_a_trainer_that_runs_is_counted_up_to_its_last_line_and_a_dead_one_to_its_last_sign(run):
    trainer, lease = run.trainer("h100", base=None, run=RunFacts(lease_seconds=25))
    steps(trainer, run.clock, 1, 5)
    with trainer.phase("compute"):
        run.clock.go(3)
        trainer.flush()
        run.clock.go(7)
    run.kill(trainer)
    run.leases.beat(lease, {})
    run.clock.go(20)
    assert seconds(run) == {"compute": 13}
    run.clock.go(6)
    assert seconds(run) == {"compute": 10, "lost work": 3 + 7}


def test_steps_made_again_by_the_same_trainer_count_once(run):
    trainer, lease = run.trainer("h100", base=None)
    steps(trainer, run.clock, 1, 10)
    trainer.event("spike", step=10)
    steps(trainer, run.clock, 6, 12)
    run.stop(trainer, lease, "finished")
    assert seconds(run) == {"compute": 24, "lost work": 10}
    assert [step for step, _ in read_run(run.store).curve("loss")] == list(range(1, 13))


def test_a_base_behind_an_epoch_takes_that_epoch_out(run):
    first, lease = run.trainer("h100", base=None)
    steps(first, run.clock, 1, 10)
    base = commit(run, first, lease, 10)
    steps(first, run.clock, 11, 12)
    run.stop(first, lease, "moved")
    second, lease = run.trainer("v6e", base=base)
    steps(second, run.clock, 11, 20)
    run.stop(second, lease, "moved")
    third, lease = run.trainer("h100", base=base)  # what the second had was not to be read
    run.stop(third, lease, "stopped")
    assert seconds(run) == {"compute": 20, "lost work": 4 + 20}
    fourth, lease = run.trainer("h100", base=None)
    steps(fourth, run.clock, 1, 3)
    run.stop(fourth, lease, "finished")
    assert seconds(run) == {"compute": 6, "lost work": 20 + 4 + 20}
    assert read_run(run.store).curve("loss") == [(1, 10), (2, 5), (3, pytest.approx(10 / 3))]


def test_without_leases_the_first_step_says_where_an_epoch_started(run):
    first, lease = run.trainer("h100", base=None)
    steps(first, run.clock, 1, 10)
    run.stop(first, lease, "moved")
    second, lease = run.trainer("v6e", base=None)
    steps(second, run.clock, 8, 12)
    run.stop(second, lease, "finished")
    run.store.delete(*(entry.key for entry in run.store.list("leases")))
    assert seconds(run) == {"compute": 24, "lost work": 6}


def test_utilisation_is_the_models_flops_over_the_chips_peak(run):
    flops = counts.train_flops_per_token(MODEL, 128)
    first, lease = run.trainer("h100", base=None, run=RunFacts(flops_per_token=flops))
    steps(first, run.clock, 1, 10)
    base = commit(run, first, lease, 10)
    run.stop(first, lease, "moved")
    told = account(read_run(run.store))
    peak = 8 * load_chip("h100").peak_flops["bf16"].value
    assert told.mfu == pytest.approx(flops * 10_000 / 20 / peak)
    second, lease = run.trainer("v6e", base=base, run=RunFacts(flops_per_token=flops))
    steps(second, run.clock, 11, 15, seconds=1)
    run.stop(second, lease, "moved")
    other = 16 * load_chip("v6e").peak_flops["bf16"].value
    told = account(read_run(run.store))
    assert told.mfu == pytest.approx(flops * 15_000 / (20 * peak + 5 * other))
    third, lease = run.trainer("cpu", run=RunFacts(flops_per_token=flops))
    steps(third, run.clock, 16, 17)
    run.stop(third, lease, "finished")
    told = account(read_run(run.store))
    assert told.mfu is None
    assert [pool.mfu is None for pool in told.pools] == [False, False, True]


def test_a_run_that_nobody_took_has_no_account():
    told = account(RunRecord("memory://x", ()))
    assert (told.wall_ns, told.goodput, told.mfu, told.cost().usd, told.pools) == (0, None, None, 0, ())


times = st.integers(0, 10**6)
facts = st.sampled_from([*POOLS.values(), PoolFacts("h100-eu", "h100", 8, 8, None)])
told = st.builds(RunFacts, lease_seconds=st.floats(1e-6, 1e-3))
stretches = st.builds(
    Time,
    start_ns=times,
    spans=st.lists(st.tuples(st.sampled_from(PHASES), st.integers(0, 10**5)), max_size=4),
    step=st.none() | st.integers(0, 30),
    tokens=st.integers(0, 100),
)


@st.composite
def epochs(draw) -> tuple[Epoch, ...]:
    """Anything that could be read: clocks that disagree, lines missing, leases missing, bases that were never there."""
    found = []
    for number in sorted(draw(st.sets(st.integers(1, 9), min_size=1, max_size=5))):
        opened = draw(st.none() | st.builds(Opened, st.just(number), facts, told, times, times))
        base = st.builds("checkpoints/step-{:08d}-e{}".format, st.integers(0, 30), st.integers(1, 9))
        holding = st.builds(
            Holding, st.just(number), st.just("h100-eu"), times, st.none() | times, st.none(),
            st.none() | st.just("") | base, st.none() | st.just("stopped"),
        )  # fmt: skip
        found.append(
            Epoch(
                number,
                opened,
                draw(st.none() | st.builds(Ended, times, st.just("stopped"))),
                tuple(draw(st.lists(stretches, max_size=6))),
                tuple(draw(st.lists(st.builds(Event, st.just("commit"), times, st.just({})), max_size=2))),
                (),
                draw(holding if opened is None else st.none() | holding),
            )
        )
    return tuple(found)


@given(epochs(), times)
@settings(deadline=None)
def test_every_nanosecond_is_in_one_category_whatever_was_read(found, now):
    told = account(RunRecord("memory://x", found), now_ns=now)
    assert sum(told.nanoseconds(name) for name in CATEGORIES) == told.wall_ns
    assert told.wall_ns >= 0
    assert all(length >= 0 for pool in told.pools for length in pool.nanoseconds.values())
    assert {name for pool in told.pools for name in pool.nanoseconds} <= {*CATEGORIES, OVERLAP}
    written = sum(line.tokens for epoch in found for line in epoch.times if line.step is not None)
    assert told.tokens + told.tokens_lost == written
    by_category = sum(told.cost(name).usd for name in (*CATEGORIES, OVERLAP))
    assert told.cost().usd == pytest.approx(by_category)
    assert told.cost().usd >= 0


@dataclass
class Life:
    """One trainer's life. commits: after which of its steps. end: "stop", or "kill" with what it did unseen."""

    start_up: int
    steps: int
    commits: set[int]
    stops: bool
    unseen_steps: int
    heartbeat: bool
    gap: int


lives = st.builds(
    Life, st.integers(1, 5), st.integers(0, 8), st.sets(st.integers(1, 8)), st.booleans(), st.integers(0, 3),
    st.booleans(), st.integers(0, 9),
)  # fmt: skip


@dataclass
class Book:
    """What an observer who saw everything writes down."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    uncommitted: float = 0.0


@given(st.lists(lives, min_size=1, max_size=5))
@settings(deadline=None, max_examples=60)
def test_the_account_is_what_an_observer_saw(script):
    run, book = Made(Store.open(f"memory://{uuid.uuid4()}"), HandClock()), Book()
    committed, base = 0, None
    for place, life in enumerate(script):
        trainer, lease = run.trainer("h100", base=base, start_up=life.start_up)
        book.seconds["start-up"] += life.start_up
        # What the trainer before had not committed is lost now.
        book.seconds["lost work"] += book.uncommitted
        book.uncommitted = 0.0
        step = committed
        for made in range(1, life.steps + 1):
            step += 1
            steps(trainer, run.clock, step, step)
            book.uncommitted += 2
            if made in life.commits:
                base, committed = commit(run, trainer, lease, step), step
                book.seconds["compute"] += book.uncommitted
                book.uncommitted = 0.0
        last = place == len(script) - 1
        if life.stops:
            run.stop(trainer, lease, "stopped")
        else:
            trainer.flush()
            run.kill(trainer)
            steps(trainer, run.clock, step + 1, step + life.unseen_steps)
            unseen = 2 * life.unseen_steps
            if life.heartbeat:
                run.leases.beat(lease, {})
                book.seconds["lost work"] += unseen
            elif not last:
                book.seconds["detect"] += unseen
        if not last:
            run.clock.go(life.gap)
            book.seconds["idle" if life.stops else "detect"] += life.gap
    book.seconds["compute"] += book.uncommitted
    run.clock.go(10_000)
    told = account(read_run(run.store), now_ns=run.clock.now_ns)
    for recorder, _ in run.open:
        recorder.close("end of the test", tries=1)
    assert {name: told.seconds(name) for name in CATEGORIES if told.seconds(name)} == {
        name: value for name, value in book.seconds.items() if value
    }
