"""`anypool runs`: every state a run can be in, one in full, and what is said of runs that are not there."""

import io
import json
import uuid

import pytest
from rich.console import Console

from anypool.store import Manifest, ObjectRecord, Store, StoreUrlError, commit
from anypool.train.report import RunError, list_runs, print_runs, print_shown, show_run
from tests.train.report.conftest import HandClock, Made, steps


@pytest.fixture
def store() -> Store:
    return Store.open(f"memory://{uuid.uuid4()}")


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


def shown_as(format: str, show, *what) -> str:
    out = io.StringIO()
    show(*what, format, Console(file=out, width=80), what_now(what))
    return out.getvalue()


def what_now(what) -> float:
    return 1_790_010_000.0


def make(store: Store, clock: HandClock, name: str) -> Made:
    return Made(store.at(f"runs/{name}"), clock)


@pytest.fixture
def moved(store, clock) -> Made:
    """A run that was killed on one pool and finished on another."""
    run = make(store, clock, "smol-a")
    first, lease = run.trainer("h100", base=None, start_up=5)
    steps(first, clock, 1, 10)
    first.event("commit", step=10)
    manifest = Manifest({"model.safetensors": ObjectRecord(1_500_000_000, "0" * 64)})
    commit(run.store, "checkpoints/step-00000010-e1", manifest)
    steps(first, clock, 11, 12)
    first.evaluation(12, {"eval_loss": 9.0})
    first.flush()
    run.kill(first)
    commit(run.store, "checkpoints/step-00000012-e1", manifest)  # too late
    run.store.put("checkpoints/step-00000099-e1/model.safetensors", b"begun")
    clock.go(40)
    second, lease = run.trainer("v6e", base="step-00000010-e1", start_up=5)
    steps(second, clock, 11, 100)
    second.evaluation(100, {"eval_loss": 0.25})
    second.event("commit", step=100)
    run.leases.beat(lease, second.known())
    run.stop(second, lease, "finished")
    return run


def test_a_run_in_full(store, moved):
    shown = show_run(store, "smol-a")
    assert shown.summary.as_json() | {"updated": None, "since": None, "goodput": None, "usd": None} == {
        "name": "smol-a", "state": "finished", "pool": "v6e-east", "since": None, "step": 100, "total_steps": 100,
        "loss": 0.1, "eval_loss": 0.25, "goodput": None, "usd": None, "usd_complete": True, "updated": None,
        "reason": "finished", "problem": None,
    }  # fmt: skip
    first, second = shown.stays
    assert (first.first_step, first.last_step, first.kept_step, first.base) == (1, 12, 10, None)
    assert first.ended == "lost: taken over by v6e-east"
    assert (second.first_step, second.last_step, second.kept_step, second.base) == (11, 100, 100, "step-00000010-e1")
    assert [(entry.folder, entry.bytes, entry.counts) for entry in shown.checkpoints] == [
        ("step-00000010-e1", 1_500_000_000, True),
        ("step-00000012-e1", 1_500_000_000, False),
    ]
    assert [(epoch, event.name, event.facts) for epoch, event in shown.events] == [
        (1, "commit", {"step": 10}),
        (2, "commit", {"step": 100}),
    ]


def test_a_run_in_full_as_a_table_and_as_json(store, moved):
    shown = show_run(store, "smol-a")
    text = shown_as("table", print_shown, shown)
    lines = [line.split() for line in text.splitlines()]
    assert "2 steps made again or lost" in text
    assert ["compute", "3m", "20s", "78.7%", "$1.60", "20", "s", "3m", "00s"] in lines
    assert ["detect", "40", "s", "15.7%", "$0.32", "40", "s"] in lines
    assert "1-12 (to 10 counts)" in text
    assert "lost: taken over by v6e-east" in text
    assert ["step-00000010-e1", "10", "1.5", "GB", "1"] in lines
    assert "gone back behind" in text
    told = json.loads(shown_as("json", print_shown, shown))
    assert told["account"]["seconds"]["detect"] == 40
    assert told["account"]["goodput"] == pytest.approx(200 / 254)
    assert [stay["pool"] for stay in told["epochs"]] == ["h100-eu", "v6e-east"]
    assert {name: told["events"][0][name] for name in ("epoch", "kind", "facts")} == {
        "epoch": 1, "kind": "commit", "facts": {"step": 10},
    }  # fmt: skip


def test_the_list_has_every_state(store, moved, clock):
    running = make(store, clock, "runs-now")
    trainer, lease = running.trainer("h100", base=None)
    steps(trainer, clock, 1, 3)
    running.leases.beat(lease, trainer.known())
    stopped = make(store, clock, "stopped")
    other, other_lease = stopped.trainer("cpu", base=None)
    steps(other, clock, 1, 4)
    stopped.stop(other, other_lease, "asked to")
    store.put("runs/new/run.toml", b"")
    lost = make(store, clock, "lost")
    dead, _ = lost.trainer("h100", base=None)
    steps(dead, clock, 1, 2)
    dead.flush()
    lost.kill(dead)
    clock.go(100)
    running.leases.beat(lease, trainer.known())
    found = {summary.name: summary for summary in list_runs(store, now=clock.now_ns / 1e9)}
    assert {name: summary.state for name, summary in found.items()} == {
        "smol-a": "finished", "runs-now": "running", "stopped": "stopped", "new": "new", "lost": "lost",
    }  # fmt: skip
    assert next(iter(found)) == "runs-now"
    assert (found["runs-now"].step, found["runs-now"].loss) == (3, pytest.approx(10 / 3))
    assert (found["stopped"].step, found["stopped"].loss, found["stopped"].eval_loss) == (4, 2.5, None)
    assert (found["stopped"].usd, found["stopped"].usd_complete) == (None, False)
    assert (found["lost"].step, found["lost"].goodput) == (2, 1.0)
    text = shown_as("table", print_runs, list(found.values()))
    assert "running on h100-eu since" in text
    assert "stopped: asked to" in text
    assert "lost on h100-eu" in text
    assert "unknown price" in text
    told = json.loads(shown_as("json", print_runs, list(found.values())))
    assert {run["name"]: run["state"] for run in told["runs"]} == {name: one.state for name, one in found.items()}


def test_a_loss_that_is_not_finite_is_said_and_is_null_in_json(store, clock):
    run = make(store, clock, "spiked")
    trainer, lease = run.trainer(base=None)
    trainer.step(1, {"loss": float("inf")}, tokens=1, seconds=1.0)
    run.leases.beat(lease, trainer.known())  # in JSON its loss is null
    run.stop(trainer, lease, "stopped")
    found = list_runs(store)
    assert "not finite" in shown_as("table", print_runs, found)
    assert json.loads(shown_as("json", print_runs, found))["runs"][0]["loss"] is None


def test_a_run_that_cannot_be_read_is_listed_with_its_problem(store, moved, monkeypatch):
    from anypool.store import StoreGoneError
    from anypool.train.report import runs

    store.put("runs/broken/run.toml", b"")
    read = runs.read_run

    def failing(place, **options):
        if place.url.endswith("broken"):
            raise StoreGoneError("runs/broken: no permission")
        return read(place, **options)

    monkeypatch.setattr(runs, "read_run", failing)
    found = list_runs(store)
    assert [(one.name, one.state, one.problem) for one in found] == [
        ("smol-a", "finished", None),
        ("broken", "unreadable", "runs/broken: no permission"),
    ]
    assert "broken: runs/broken: no permission" in shown_as("table", print_runs, found)


def test_what_was_not_read_is_said(store, moved):
    key = "runs/smol-a/ledger/e000002/part-00000.jsonl"
    store.put(key, store.get(key) + b"half a li")
    text = shown_as("table", print_shown, show_run(store, "smol-a"))
    assert "not read: ledger/e000002/part-00000.jsonl line " in text


def test_a_corrupt_manifest_is_said(store, moved):
    store.put("runs/smol-a/checkpoints/step-00000010-e1/manifest.json", b"{")
    shown = show_run(store, "smol-a")
    assert [entry.folder for entry in shown.checkpoints] == ["step-00000012-e1"]
    assert shown.problems[0].startswith("checkpoints/step-00000010-e1: its manifest cannot be read")


def test_unknown_runs_and_stores(store, moved):
    with pytest.raises(RunError, match=r"run 'smol-b': there is none of this name in memory:.*; did you mean 'smol-a'"):
        show_run(store, "smol-b")
    with pytest.raises(RunError, match=r"run 'zzz': there is none .*; there are smol-a"):
        show_run(store, "zzz")
    empty = Store.open(f"memory://{uuid.uuid4()}")
    with pytest.raises(RunError, match="holds no run: name the store that a run was started with"):
        list_runs(empty)
    with pytest.raises(RunError, match=r"run 'a': memory://.* holds no run"):
        show_run(empty, "a")
    with pytest.raises(StoreUrlError):
        list_runs("nowhere://x")
