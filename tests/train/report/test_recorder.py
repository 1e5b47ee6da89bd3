"""The recorder: phases without gaps, lines that no store failure loses, what a heartbeat tells."""

import json
import math
import subprocess
import sys
import threading
import time
from typing import cast

import numpy as np
import pytest

from anypool.chips import load_chip
from anypool.store import Store
from anypool.train import TrainError
from anypool.train.report import PoolFacts, Recorder, RunFacts, read_run
from anypool.train.report.journal import Journal
from tests.train.report.conftest import POOLS, START_NS, FailingStore, HandClock, Made, steps

WAIT_SECONDS = 60


def seconds_by_phase(run: Made) -> dict[str, float]:
    found: dict[str, int] = {}
    cursor = None
    for line in read_run(run.store).epochs[-1].times:
        assert cursor is None or line.start_ns == cursor, "a gap or an overlap between lines"
        for phase, length in line.spans:
            found[phase] = found.get(phase, 0) + length
        cursor = line.end_ns
    return {phase: length / 1e9 for phase, length in found.items()}


def test_time_belongs_to_the_innermost_phase_and_none_is_missing(run):
    recorder, _ = run.trainer(start_up=7)
    with recorder.phase("restore"):
        run.clock.go(3)
    run.clock.go(1)
    with recorder.phase("compute"):
        run.clock.go(10)
        with recorder.phase("checkpoint"):
            run.clock.go(2)
            with recorder.phase("gate"):
                run.clock.go(0.5)
            run.clock.go(2)
        with recorder.phase("data"):
            run.clock.go(4)
        run.clock.go(20)
    run.clock.go(6)
    recorder.close("done")
    assert seconds_by_phase(run) == {
        "start-up": 8, "restore": 3, "compute": 30, "checkpoint": 4, "gate": 0.5, "data": 4, "idle": 6,
    }  # fmt: skip
    epoch = read_run(run.store).epochs[0]
    assert epoch.started_ns == START_NS
    assert epoch.last_line_ns == run.clock.now_ns
    assert epoch.stopped == "done"


def test_a_phase_ends_when_its_block_raises(run):
    recorder, _ = run.trainer()
    with pytest.raises(RuntimeError), recorder.phase("compute"), recorder.phase("data"):
        run.clock.go(1)
        raise RuntimeError
    run.clock.go(2)
    recorder.close("error")
    assert seconds_by_phase(run) == {"data": 1, "idle": 2}


def test_time_up_to_a_step_is_the_steps_own(run):
    recorder, _ = run.trainer()
    steps(recorder, run.clock, 1, 3)
    recorder.close("done")
    times = [line for line in read_run(run.store).epochs[0].times if line.step is not None]
    assert [(line.step, line.tokens) for line in times] == [(1, 1000), (2, 1000), (3, 1000)]
    assert all(line.spans[-1][0] == "compute" for line in times)


def test_parts_hold_at_most_500_lines_and_all_lines_once_in_order(run):
    recorder, _ = run.trainer()
    for first in range(1, 1201, 100):
        steps(recorder, run.clock, first, first + 99, seconds=0.1)
        recorder.flush()
    recorder.close("done")
    parts = [entry.key for entry in run.store.list("metrics")]
    assert parts == [f"metrics/e000001/part-{number:05d}.jsonl" for number in range(3)]
    assert [run.store.get(part).count(b"\n") for part in parts] == [500, 500, 200]
    assert [line.step for line in read_run(run.store).epochs[0].lines] == list(range(1, 1201))


def test_lines_of_metrics_are_flat_json_with_null_for_what_is_not_finite(run):
    recorder, _ = run.trainer()
    recorder.step(1, {"loss": float("nan"), "scale": np.float32(0.5)}, tokens=np.int64(10), seconds=2)
    recorder.evaluation(1, {"eval_loss": np.asarray(3)})
    recorder.close("done")
    lines = [json.loads(line) for line in run.store.get("metrics/e000001/part-00000.jsonl").splitlines()]
    assert lines == [
        {
            "kind": "step", "epoch": 1, "step": 1, "at": START_NS / 1e9, "tokens": 10, "seconds": 2.0,
            "loss": None, "scale": 0.5, "tokens_per_second": 5.0,
        },
        {"kind": "evaluation", "epoch": 1, "step": 1, "at": START_NS / 1e9, "eval_loss": 3.0},
    ]  # fmt: skip
    ((step, loss),) = read_run(run.store).curve("loss")
    assert step == 1
    assert math.isnan(loss)


def test_a_store_that_fails_stops_nothing_and_loses_nothing(run):
    recorder, _ = run.trainer()
    store = run.open[0][1]
    steps(recorder, run.clock, 1, 3)
    assert recorder.flush()
    store.failing = True
    steps(recorder, run.clock, 4, 700)
    assert not recorder.flush()
    store.failing = False
    steps(recorder, run.clock, 701, 702)
    assert recorder.flush()
    closed = recorder.close("done")
    assert (closed.lines_unwritten, closed.error) == (0, None)
    assert [line.step for line in read_run(run.store).epochs[0].lines] == list(range(1, 703))
    assert seconds_by_phase(run)["compute"] == 702 * 2


def test_close_says_how_many_lines_no_store_has(run):
    recorder, _ = run.trainer()
    recorder.flush()
    run.open[0][1].failing = True
    steps(recorder, run.clock, 1, 3)
    closed = recorder.close("done", tries=2, seconds_between=0)
    assert closed.lines_unwritten == 3 + 3 + 1  # steps in both, and the line that it ended
    assert closed.error is not None
    assert "made to fail" in closed.error
    assert recorder.close("again") == closed


def test_close_tries_again(run):
    recorder, _ = run.trainer()
    recorder.flush()
    store = run.open[0][1]
    failures = iter([True, True])

    def put(key: str, data: bytes) -> None:
        if next(failures, False):
            raise ConnectionError("not now")
        store.inner.put(key, data)

    store.put = put
    assert recorder.close("done", tries=5, seconds_between=0).lines_unwritten == 0
    assert read_run(run.store).epochs[0].stopped == "done"


def test_the_thread_writes_without_being_asked():
    store = FailingStore(Store.open("memory://thread"))
    recorder = Recorder(cast(Store, store), 1, POOLS["cpu"], write_seconds=0.01)
    recorder.step(1, {"loss": 2.0}, tokens=1, seconds=1.0)
    deadline = time.monotonic() + WAIT_SECONDS
    while not (found := read_run(store.inner).curve("loss")) and time.monotonic() < deadline:
        store.written.wait(WAIT_SECONDS)
        store.written.clear()
    assert found == [(1, 2.0)]
    recorder.close("done")


def test_a_commit_is_written_soon(run):
    recorder, _ = run.trainer()
    recorder.flush()
    store = run.open[0][1]
    store.written.clear()
    steps(recorder, run.clock, 1, 2)
    recorder.event("commit", step=2)
    assert store.written.wait(WAIT_SECONDS)
    recorder.flush()  # waits for the thread's write
    assert [event.facts for event in read_run(run.store).epochs[0].events] == [{"step": 2}]


def test_only_the_first_process_writes():
    store, clock = Store.open("memory://second-process"), HandClock()
    sink = Collects()
    recorder = Recorder(store, 1, POOLS["h100"], [sink], clock, started_ns=START_NS, writes=False)
    steps(recorder, clock, 1, 2)
    recorder.event("commit", step=2)
    recorder.evaluation(2, {"eval_loss": 1.0})
    assert recorder.flush()
    assert recorder.close("done").lines_unwritten == 0
    assert store.list() == []
    assert sink.calls == []
    assert recorder.known()["step"] == 2


class Collects:
    def __init__(self, fails: bool = False) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.fails = fails

    def write(self, group: str, step: int, at: float, metrics: dict[str, float]) -> None:
        self.calls.append((group, step, metrics["loss" if group == "train" else "eval_loss"]))
        if self.fails:
            raise RuntimeError("no display")

    def close(self) -> None:
        self.calls.append(("closed",))


def test_sinks_get_every_line_and_one_that_fails_is_asked_no_more(run):
    good, bad = Collects(), Collects(fails=True)
    recorder, _ = run.trainer(sinks=[bad, good])
    steps(recorder, run.clock, 1, 2)
    recorder.evaluation(2, {"eval_loss": 4.0})
    recorder.close("done")
    assert good.calls == [("train", 1, 10.0), ("train", 2, 5.0), ("evaluation", 2, 4.0), ("closed",)]
    assert bad.calls == [("train", 1, 10.0)]


def test_the_heartbeat_knows_how_the_run_stands(run):
    recorder, lease = run.trainer(start_up=10, run=RunFacts(100, flops_per_token=1e12, usd_before=2.5))
    assert recorder.known() == {
        "total_steps": 100, "pool": "h100-eu", "epoch": lease.number, "skipped": 0, "phase": "start-up",
        "usd": 2.5 + 10 * 8 * 3.6 / 3600,
    }  # fmt: skip
    with recorder.phase("compute"):
        for step in range(41, 51):
            with recorder.phase("data"):
                run.clock.go(1)
            run.clock.go(4)
            metrics = {"loss": 3.0, "learning_rate": 1e-3, "gradient_norm": 0.5}
            recorder.step(step, metrics, tokens=8000, seconds=4)
        recorder.event("skipped", step=47)
        recorder.event("commit", step=48)
        recorder.evaluation(50, {"eval_loss": 3.5})
        known = recorder.known()
    peak = load_chip("h100").peak_flops["bf16"].value
    assert known.pop("mfu") == pytest.approx(2000 * 1e12 / (8 * peak))
    assert known == {
        "step": 50, "total_steps": 100, "loss": 3.0, "eval_loss": 3.5, "learning_rate": 1e-3, "gradient_norm": 0.5,
        "tokens": 80000, "tokens_per_second": 2000, "seconds_left": 50 * 5, "usd": 2.5 + 60 * 8 * 3.6 / 3600,
        "pool": "h100-eu", "epoch": lease.number, "phase": "compute", "last_commit_step": 48, "skipped": 1,
    }  # fmt: skip


def test_what_is_not_known_is_left_out_of_the_heartbeat(run):
    recorder, _ = run.trainer("cpu", run=RunFacts(flops_per_token=1e9))
    steps(recorder, run.clock, 1, 2)
    assert not {"mfu", "usd", "seconds_left", "total_steps"} & set(recorder.known())
    recorder.close("done")
    assert read_run(run.store).curve("mfu") == []


def test_many_threads_may_write_at_once(run):
    recorder, _ = run.trainer()

    def tell(name: str) -> None:
        for number in range(200):
            recorder.event(name, number=number)
            if number % 50 == 0:
                recorder.flush()

    threads = [threading.Thread(target=tell, args=(f"t{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    steps(recorder, run.clock, 1, 300)
    for thread in threads:
        thread.join()
    recorder.close("done")
    epoch = read_run(run.store).epochs[0]
    for name in ("t0", "t1", "t2", "t3"):
        assert [event.facts["number"] for event in epoch.events if event.name == name] == list(range(200))
    assert epoch.steps == tuple(range(1, 301))
    assert seconds_by_phase(run)["compute"] == 600


def test_a_full_part_that_is_written_leaves_memory():
    store = FailingStore(Store.open("memory://journal"))
    journal = Journal(cast(Store, store), "x", lines_a_part=2)
    for number in range(5):
        journal.append(b"%d\n" % number)
        journal.write()
    assert store.puts == [f"x/part-{part:05d}.jsonl" for part in (0, 0, 1, 1, 2)]
    assert len(journal._parts) == 1
    assert journal.unwritten == 0


def test_the_start_of_the_process_is_its_own():
    code = (
        "import time; first = time.time_ns(); from anypool.train.report.clock import process_started_ns as started;"
        "print(first, started(time.time_ns()))"
    )
    before = time.time_ns()
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, started = map(int, child.stdout.split())
    tick = 20_000_000  # both files count in hundredths of a second
    assert before - tick <= started <= first + tick


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda r: r.phase("computing").__enter__(), "phase 'computing': must be one of start-up, restore, gate"),
        (lambda r: r.step(1, {"step": 1}, 1, 1), "metric 'step': is a key of every line already"),
        (lambda r: r.step(1, {"loss": "low"}, 1, 1), "metric 'loss' = 'low': must be one number"),
        (lambda r: r.step(1, {"loss": [1, 2]}, 1, 1), r"metric 'loss' = \[1, 2\]: must be one number"),
        (lambda r: r.step(7, {}, -1, 1), "step 7: tokens = -1, seconds = 1.0: neither can be below 0"),
        (lambda r: r.step(7, {}, 1, float("nan")), "step 7: tokens = 1, seconds = nan"),
        (lambda r: Recorder(Store.open("memory://e"), -1, POOLS["cpu"]), "epoch = -1: must be 0 or more"),
        (lambda r: Recorder(Store.open("memory://e"), 1, POOLS["cpu"], write_seconds=0), "write_seconds = 0: must be"),
        (lambda r: PoolFacts("a", "cpu", 0, 1), "pool 'a': devices = 0: must be at least 1"),
        (lambda r: PoolFacts("a", "cpu", 1, 1, -2.0), "pool 'a': usd_per_chip_hour = -2.0: must be 0 or more"),
        (lambda r: PoolFacts("a", "cpu", 1, 1, math.inf), "pool 'a': usd_per_chip_hour = inf"),
    ],
)
def test_bad_input(run, wrong, message):
    recorder, _ = run.trainer()
    with pytest.raises(TrainError, match=message):
        wrong(recorder)
    steps(recorder, run.clock, 1, 1)
    recorder.close("done")
    assert [line.step for line in read_run(run.store).epochs[0].lines] == [1]
