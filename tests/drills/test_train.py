"""Trainers that are really killed, stopped and woken up, and what becomes of their runs."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from anypool.drills import train
from anypool.drills.training import DrillError, DrillRun
from anypool.store import Leases
from anypool.train.checkpoint import Checkpoints
from anypool.train.errors import RunFailedError
from anypool.train.report import CATEGORIES, account, read_run
from anypool.train.run import directory
from anypool.train.run.file import load_run

PATIENCE_SECONDS = 240


@pytest.mark.timeout(600)
def test_the_drill(tmp_path, capsys):
    faults = ["move", "zombie", "full", "corrupt"]
    assert train.run(seed=1, faults=faults, steps=30, format="json", folder=tmp_path) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["samples_repeated"], report["samples_skipped"], report["fenced_commits"]) == (0, 0, 0)
    assert report["loss_difference"] <= train.LOSS_TOLERANCE
    move, zombie, full, corrupt = report["faults"]
    lost, moved = move["takeovers"]
    assert lost["detect_seconds"] is not None and lost["steps_redone"] < 10
    assert moved["detect_seconds"] is None and moved["steps_redone"] == 0
    assert zombie["note"] == "it ended with exit code 11, fenced"
    assert full["commits_failed"] >= 1 and full["bit_equal"] is True
    assert "was refused by its hash" in corrupt["note"]
    # The account of a run that was lost once and moved once: every second is somewhere.
    told = account(read_run(directory.store_of(load_run(tmp_path / "move.toml"))))
    assert told.nanoseconds("lost work") > 0 and told.nanoseconds("detect") > 0
    assert sum(told.nanoseconds(category) for category in CATEGORIES) == told.wall_ns


@pytest.mark.timeout(600)
def test_a_trainer_that_hangs_counts_as_lost(tmp_path):
    run = DrillRun(tmp_path, "hangs", steps=20, seed=0, pools="ab", throttle=0.05, lease_seconds=3)
    try:
        run.start()
        run.wait("step", lambda event: event["step"] >= 7)
        os.kill(run.controller.trainer.pid, signal.SIGSTOP)
        assert "no heartbeat for" in run.wait("lost")["reason"]
        assert run.wait("starting")["pool"] == "b"
        run.finish()
    finally:
        run.stop()
    assert sorted(run.samples()) == list(range(1, 21))


@pytest.mark.timeout(600)
def test_steps_that_do_not_end_count_as_lost_though_the_heart_beats(tmp_path):
    watch = "hang_seconds = 1.5\nattempts = 2"
    run = DrillRun(tmp_path, "stuck", steps=20, seed=0, pools="b", throttle=1000, watch=watch)
    try:
        run.start()
        assert "no step for 2 s (watch.hang_seconds 1.5)" in run.wait("lost")["reason"]
        with pytest.raises(RunFailedError, match=r"2 trainers in a row were lost without a commit .*no step for"):
            run.finish()
    finally:
        run.stop()


@pytest.mark.timeout(600)
def test_two_hosts_hold_a_run_together_and_one_is_lost(tmp_path):
    run = DrillRun(tmp_path, "hosts", steps=20, seed=0, pools="hb", throttle=0.05)
    try:
        run.start()
        committed = run.wait("committed")["step"]
        first, second = run.controller.trainer.pids
        os.kill(second, signal.SIGKILL)
        assert run.wait("starting")["pool"] == "b"
        assert run.wait("restored")["step"] >= committed
        assert run.wait("gate")["passed"]
        run.finish()
    finally:
        run.stop()
    assert first != second
    assert sorted(run.samples()) == list(range(1, 21))


def alive(pid: int) -> bool:
    """Whether a process is there and more than a name that its parent has not taken yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.timeout(600)
def test_a_controller_that_is_killed_leaves_no_trainer_and_the_same_command_goes_on(tmp_path):
    run = DrillRun(tmp_path, "orphan", steps=400, seed=0, pools="b", throttle=0, lease_seconds=4)
    path, leases = tmp_path / "orphan.toml", Leases(run.store, ttl_seconds=4)
    first = Command(str(path))
    try:
        until(lambda: Checkpoints(run.store, None).latest() is not None)
        children = Path(f"/proc/{first.process.pid}/task/{first.process.pid}/children").read_text().split()
        assert children
        first.process.kill()
        first.end()
        until(lambda: not any(alive(int(child)) for child in children))
    finally:
        first.process.kill()
    done = Checkpoints(run.store, None).latest().step
    assert leases.released(leases.current().number) is None
    path.write_text(path.read_text().replace("steps = 400", f"steps = {done + 6}"))
    code, out, errors = Command(str(path), "--format", "json").end()
    assert code == 0, errors
    assert json.loads(out)["steps"] == done + 6
    assert leases.current().number == 2


@pytest.mark.timeout(600)
def test_a_store_that_vanishes_and_comes_back(tmp_path):
    run = DrillRun(tmp_path, "vanishes", steps=200, seed=0, pools="b", throttle=0.05, lease_seconds=3)
    away = tmp_path / "away"
    try:
        run.start()
        committed = run.wait("committed", lambda event: event["step"] >= 10)["step"]
        (tmp_path / "store").rename(away)
        assert "the folder vanished" in run.wait("commit_failed")["reason"]
        with pytest.raises(
            RunFailedError, match=r"no heartbeat could be written for 3 s: .*what was committed is kept"
        ):
            run.finish()
    finally:
        run.stop()
    away.rename(tmp_path / "store")
    assert Checkpoints(run.store, None).latest().step >= committed
    path = tmp_path / "vanishes.toml"
    path.write_text(path.read_text().replace("steps = 200", f"steps = {committed + 20}"))
    code, out, errors = Command(str(path), "--format", "json").end()
    assert code == 0, errors
    assert json.loads(out)["steps"] == committed + 20


@pytest.mark.parametrize(
    ("faults", "steps", "message"),
    [(["mov"], 40, "fault 'mov' is unknown; there are move, "), (None, 5, "steps = 5: at least 20")],
)
def test_drills_that_cannot_be_made(faults, steps, message):
    with pytest.raises(DrillError, match=message):
        train.run(seed=0, faults=faults, steps=steps, format="json")


class Command:
    """`anypool train` as a person's shell runs it."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "anypool", "train", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self) -> tuple[int, str, str]:
        out, errors = self.process.communicate(timeout=PATIENCE_SECONDS)
        return self.process.returncode, out, errors


def until(condition) -> None:
    """Waits for something another process does."""
    end = time.monotonic() + PATIENCE_SECONDS
    looking = threading.Event()
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        looking.wait(0.1)


@pytest.mark.timeout(600)
def test_a_persons_session(tmp_path):
    """Begun, refused to a second one, moved by a third, stopped with Ctrl-C, gone on with to the end."""
    run = DrillRun(tmp_path, "person", steps=400, seed=0, pools="ab", throttle=0)
    path = str(tmp_path / "person.toml")
    leases = Leases(run.store, ttl_seconds=60)

    def steps_on(pool):
        lease = leases.current()
        beat = leases.heartbeat(lease.number) if lease and lease.holder.pool == pool else None
        return beat.known.get("step", 0) if beat else 0

    first = Command(path)
    try:
        until(lambda: steps_on("a") >= 5)
        code, _, errors = Command(path).end()
        assert code == 2
        assert f"is held by pool 'a' (process {first.process.pid} on" in errors and "since" in errors
        assert "--move-to POOL" in errors and "Traceback" not in errors
        code, out, errors = Command(path, "--move-to", "b").end()
        assert code == 0, errors
        assert "moved: b holds the run as epoch 2" in out
        until(lambda: steps_on("b") >= 6)
        first.process.send_signal(signal.SIGINT)
        code, out, errors = first.end()
        assert code == 0, errors
        assert "person: stopped," in out and "the same command" in out
    finally:
        first.process.kill()
    stopped_at = Checkpoints(run.store, None).latest().step
    assert leases.released(leases.current().number) == f"asked to, after step {stopped_at}"
    # 400 steps were only there to have time.
    (tmp_path / "person.toml").write_text(
        (tmp_path / "person.toml").read_text().replace("steps = 400", f"steps = {stopped_at + 3}")
    )
    code, out, errors = Command(path, "--format", "json").end()
    assert code == 0, errors
    assert json.loads(out)["how"] == "finished" and json.loads(out)["steps"] == stopped_at + 3


def test_pools_and_files_that_are_not_there(tmp_path):
    run = DrillRun(tmp_path, "nowhere", steps=20, seed=0, pools="ab", throttle=0)
    path = str(tmp_path / "nowhere.toml")
    code, _, errors = Command(path, "--move-to", "c").end()
    assert (code, errors) == (2, "error: run 'nowhere' has no pool 'c'; its pools are a, b\n")
    code, _, errors = Command(str(tmp_path / "nowher.toml")).end()
    assert code == 2 and "there is no such run file; there are nowhere.toml" in errors
    assert run.file.name == "nowhere"
