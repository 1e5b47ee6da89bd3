"""Reading a record that is damaged, or still being written."""

import os
import signal
import subprocess
import sys

import pytest

from anypool.store import Store, StoreError
from anypool.train.report import account, read_run
from tests.train.report.conftest import steps


@pytest.fixture
def written(run):
    trainer, lease = run.trainer(base=None)
    steps(trainer, run.clock, 1, 3)
    trainer.evaluation(2, {"eval_loss": 4.0})
    run.stop(trainer, lease, "stopped")
    return run


def damage(store: Store, key: str, change) -> None:
    lines = store.get(key).splitlines()
    change(lines)
    store.put(key, b"\n".join(lines) + b"\n")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"kind": "step", "epo', "Input data was truncated"),
        (b'{"kind": "step", "epoch": 1, "at": 1.0}', "Object missing required field `step`"),
        (b'{"kind": "step", "epoch": 1, "step": "two", "at": 1.0}', "Expected `int`, got `str` - at `$.step`"),
        (b'{"kind": "stop", "epoch": 1, "step": 2, "at": 1.0}', "Invalid enum value 'stop' - at `$.kind`"),
        (b"[]", "Expected `object`, got `array`"),
        (b"\xff\xfe", "JSON is malformed"),
    ],
)
def test_a_corrupt_line_of_metrics_is_named_and_left_out(written, line, problem):
    damage(written.store, "metrics/e000001/part-00000.jsonl", lambda lines: lines.__setitem__(1, line))
    record = read_run(written.store)
    assert len(record.problems) == 1
    where, said = record.problems[0].split(" makes no sense and is left out: ")
    assert where == "metrics/e000001/part-00000.jsonl line 2"
    assert problem in said
    assert [step for step, _ in record.curve("loss")] == [1, 3]


def test_a_corrupt_line_of_the_ledger_is_time_of_which_nothing_is_known(written):
    def change(lines: list[bytes]) -> None:
        place = next(place for place, line in enumerate(lines) if b'"step":2' in line)
        lines[place] = b"{}"

    damage(written.store, "ledger/e000001/part-00000.jsonl", change)
    record = read_run(written.store)
    assert len(record.problems) == 1
    assert record.problems[0].startswith("ledger/e000001/part-00000.jsonl line ")
    told = account(record)
    assert (told.seconds("compute"), told.seconds("lost work")) == (4, 2)


def test_a_negative_span_is_corrupt(written):
    line = b'{"kind":"time","start_ns":1,"spans":[["compute",-5]]}'
    damage(written.store, "ledger/e000001/part-00000.jsonl", lambda lines: lines.append(line))
    assert "a span of negative length" in read_run(written.store).problems[0]


def test_what_later_versions_add_is_left_out_in_silence(written):
    def change(lines: list[bytes]) -> None:
        lines[0] = lines[0][:-1] + b',"note":"text","flag":true,"more":{"a":1}}'

    damage(written.store, "metrics/e000001/part-00000.jsonl", change)
    record = read_run(written.store)
    assert record.problems == ()
    assert len(record.curve("loss")) == 3
    assert record.curve("flag") == record.curve("note") == record.curve("more") == []


def test_a_missing_part_is_said(run):
    trainer, _ = run.trainer()
    steps(trainer, run.clock, 1, 1100, seconds=0.5)
    trainer.close("done")
    run.store.delete("metrics/e000001/part-00001.jsonl")
    record = read_run(run.store)
    assert record.problems == ("metrics/e000001/part-00001.jsonl is missing; its lines are left out",)
    assert len(record.curve("loss")) == 600


def test_an_epoch_of_nothing_but_corrupt_lines_is_no_epoch(written):
    written.store.put("ledger/e000002/part-00000.jsonl", b"nonsense\n")
    written.store.put("metrics/e000002/part-00000.jsonl", b"nonsense\n\n")
    record = read_run(written.store)
    assert [epoch.number for epoch in record.epochs] == [1]
    assert len(record.problems) == 2


def test_metrics_alone_are_read(written):
    """The ledger and the leases are gone; times are then those of the steps."""
    for prefix in ("ledger", "leases"):
        written.store.delete(*(entry.key for entry in written.store.list(prefix)))
    record = read_run(written.store)
    assert record.curve("eval_loss") == [(2, 4.0)]
    told = account(record)
    assert told.wall_ns == 0
    assert (told.tokens, told.goodput) == (0, None)


@pytest.mark.parametrize("part", ["", ".heartbeat", ".base", ".released"])
def test_a_corrupt_lease_is_named_and_left_out(written, part):
    key = f"leases/000001{part}.json"
    written.store.put(key, b"{}")
    record = read_run(written.store)
    assert [problem.split(" makes")[0] for problem in record.problems] == [key]
    assert len(record.curve("loss")) == 3


def test_objects_of_others_are_no_parts(written):
    written.store.put("metrics/notes.txt", b"mine")
    written.store.put("leases/readme.json", b"mine")
    assert read_run(written.store).problems == ()


def test_a_store_that_fails_is_an_error(written):
    class Gone(type(written.store)):
        def list(self, prefix: str = ""):
            raise StoreError("gone")

    gone = object.__new__(Gone)
    gone.__dict__.update(written.store.__dict__)
    with pytest.raises(StoreError, match="gone"):
        read_run(gone)


TRAINER = """
import sys, time
from anypool.store import Holder, Leases, Store
from anypool.train.report import PoolFacts, Recorder
store = Store.open(sys.argv[1])
lease = Leases(store).take(Holder("here", "host", 1, "id"))
recorder = Recorder(store, lease.number, PoolFacts("here", "cpu", 1, 1, 2.0), write_seconds=0.01)
with recorder.phase("compute"):
    for step in range(1, 10**9):
        recorder.step(step, {"loss": 1 / step}, tokens=10, seconds=0.001)
        if step == 50:
            recorder.flush()
            print("flushed", flush=True)
"""


def test_a_killed_process_leaves_what_it_had_written(tmp_path):
    with subprocess.Popen([sys.executable, "-c", TRAINER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "flushed\n"
        os.kill(process.pid, signal.SIGKILL)
    record = read_run(Store.open(str(tmp_path)))
    assert record.problems == ()
    (epoch,) = record.epochs
    assert epoch.stopped is None
    numbers = [step for step, _ in record.curve("loss")]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) >= 50
    told = account(record)
    assert told.seconds("start-up") > 0
    assert told.tokens == 10 * len(epoch.steps)
    assert epoch.started_ns < epoch.held_ns
