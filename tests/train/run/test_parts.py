"""The small parts of a run: which pool is next, how large a norm may be, what gates let through and probes wait for."""

import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anypool.store import Store
from anypool.train.run import gate, requests
from anypool.train.run.choice import LONGEST_PAUSE_SECONDS, PoolChoice
from anypool.train.run.gate import Recorded
from anypool.train.run.probe import Probe
from anypool.train.run.spikes import LAG, LEAST, Spikes


def test_the_first_pool_is_preferred_and_a_failed_one_rests():
    choice = PoolChoice(["a", "b"])
    assert choice.next(0.0) == ("a", 0.0)
    choice.failed("a", 0.0)
    assert choice.next(0.0) == ("b", 0.0)
    choice.failed("b", 1.0)
    assert choice.next(1.0) == ("a", 4.0)
    assert choice.next(5.0) == ("a", 0.0)
    choice.failed("a", 5.0)  # the second time in a row: twice as long
    assert choice.next(6.0) == ("b", 0.0)
    choice.committed("a")
    choice.failed("a", 7.0)
    assert choice.rests_until["a"] == 12.0


def test_rests_have_an_end_and_refused_pools_none():
    choice = PoolChoice(["a", "b"])
    for _ in range(40):
        choice.failed("a", 0.0)
    assert choice.rests_until["a"] == LONGEST_PAUSE_SECONDS
    choice.refuse("b")
    assert choice.next(0.0) == ("a", LONGEST_PAUSE_SECONDS)
    choice.refuse("a")
    assert choice.next(0.0) is None


def test_no_limit_before_there_is_a_history():
    spikes = Spikes(10.0)
    for step in range(LEAST - 1):
        spikes.saw(step, 1.0, skipped=False)
    assert spikes.limit(1000) == math.inf
    spikes.saw(LEAST, 3.0, skipped=False)
    assert spikes.limit(1000) == 10.0
    assert Spikes(None, spikes.history).limit(1000) == math.inf


def test_skipped_and_infinite_norms_are_no_history():
    spikes = Spikes(2.0, [(step, 1.0) for step in range(LEAST)])
    for step in range(LEAST, 80):
        spikes.saw(step, 1e9 if step % 2 else math.nan, skipped=True)
        spikes.saw(step, math.inf, skipped=False)
    assert spikes.limit(1000) == 2.0


@given(st.lists(st.floats(0.1, 10), min_size=40, max_size=200), st.integers(20, 200), st.data())
def test_limits_are_the_same_after_a_move(norms, moved_at, data):
    """However late norms are read (two steps at the most), and wherever the run was taken over."""
    moved_at = min(moved_at, len(norms))
    unbroken, limits = Spikes(3.0), []
    for step, norm in enumerate(norms):
        limits.append(unbroken.limit(step))
        unbroken.saw(step, norm, skipped=False)
    late = Spikes(3.0)
    for step in range(len(norms)):
        if step == moved_at:
            for seen in range(max(0, step - LAG + 1), step):  # a commit waits for the norms before it
                late.saw(seen, norms[seen], skipped=False)
            late = Spikes(3.0, late.history)
        assert late.limit(step) == limits[step]
        read = step - LAG + 1
        if read >= 0 and not moved_at <= step < moved_at + LAG - 1:
            late.saw(read, norms[read], skipped=False)


def recorded(**changes):
    facts = {
        "step": 3,
        "loss": 2.0,
        "gradient_norm": 1.0,
        "chip": "cpu",
        "mesh": "fsdp=2",
        "dtype": "float32",
    } | changes
    return Recorded(**facts)


def test_the_gate_knows_the_pair_of_chips():
    same = gate.compare(recorded(), recorded(loss=2.0 * (1 + 5e-5)))
    assert not same.passed and same.loss_allowed == 1e-5
    assert gate.compare(recorded(), recorded(loss=2.0 * (1 + 5e-5), chip="v5e")).passed
    assert gate.compare(recorded(dtype="bfloat16"), recorded(loss=2.001, dtype="bfloat16")).passed
    assert not gate.compare(recorded(), recorded(gradient_norm=1.1)).passed
    assert gate.compare(recorded(), recorded(gradient_norm=1.1), gradient_norm=0.2).passed


def test_the_gate_and_numbers_that_are_none():
    assert not gate.compare(recorded(), recorded(loss=math.nan)).passed
    assert not gate.compare(recorded(loss=math.inf), recorded()).passed
    assert gate.compare(recorded(loss=math.nan), recorded(loss=math.inf)).passed
    assert "loss nan, recorded 2 on cpu" in str(gate.compare(recorded(), recorded(loss=math.nan)))


def test_a_record_survives_json():
    assert Recorded.from_json(recorded().as_json()) == recorded()


def test_a_probe_waits_for_the_step_after_the_checkpoint():
    probe, found = Probe(), []
    probe.expect(3)
    waiting = threading.Thread(target=lambda: found.append(probe.wait(3)))
    waiting.start()
    probe.answer(3, recorded(step=3))  # the step before: not what is asked
    probe.answer(4, recorded(step=4))
    waiting.join(10)
    assert found == [recorded(step=4).as_json()]


def test_a_probe_that_is_closed_lets_go():
    probe = Probe()
    probe.expect(3)
    probe.close()
    assert probe.wait(3) is None


def test_requests_are_taken_once_and_the_newest_counts():
    store = Store.open("memory://requests-are-taken")
    assert requests.take(store, ["a", "b"]) is None
    key = requests.ask_to_move(store, "b")
    assert requests.is_waiting(store, key)
    assert requests.take(store, ["a", "b"]) == "b"
    assert not requests.is_waiting(store, key)
    assert requests.take(store, ["a", "b"]) is None


@pytest.mark.parametrize("content", [b"", b"[]", b"no json", b'{"move_to": "elsewhere"}'])
def test_requests_that_mean_nothing_are_removed(content):
    store = Store.open("memory://requests-mean-nothing")
    store.put("requests/x.json", content)
    assert requests.take(store, ["a"]) is None
    assert not store.list("requests/")
