"""TensorBoard's files read back by their own format, and Weights & Biases through a module that is not it."""

import struct
import sys
import types

import pytest
from tensorboardX.proto.event_pb2 import Event

from anypool.train import TrainError
from anypool.train.report import TensorBoardSink, WandbSink


def events(directory) -> list[Event]:
    """Of all files, in order. A record is its length, a checksum, the data, a checksum (TFRecord)."""
    found = []
    for file in sorted(directory.iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return found


def test_tensorboard_files_hold_every_value_with_step_and_time(tmp_path):
    sink = TensorBoardSink(tmp_path / "run", first_step=7)
    sink.write("train", 7, 1_790_000_000.5, {"loss": 2.5, "mfu": 0.5})
    sink.write("evaluation", 7, 1_790_000_001.0, {"eval_loss": 3.0})
    sink.close()
    written = events(tmp_path / "run")
    values = [
        (event.step, event.wall_time, value.tag, value.simple_value)
        for event in written
        for value in event.summary.value
    ]
    assert values == [
        (7, 1_790_000_000.5, "train/loss", 2.5),
        (7, 1_790_000_000.5, "train/mfu", 0.5),
        (7, 1_790_000_001.0, "evaluation/eval_loss", 3.0),
    ]
    # From here on TensorBoard drops what an earlier trainer wrote.
    assert [event.step for event in written if event.session_log.status == event.session_log.START] == [7]


def test_a_tensorboard_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrainError, match=r"tensorboard directory '.*file/run': .*: name a directory that can be"):
        TensorBoardSink(tmp_path / "file" / "run")


class FakeRun:
    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def define_metric(self, *args: object, **kwargs: object) -> None:
        self.calls.append(("define_metric", *args, kwargs))

    def log(self, values: dict[str, object]) -> None:
        self.calls.append(("log", values))

    def finish(self) -> None:
        self.calls.append(("finish",))


@pytest.fixture
def wandb(monkeypatch):
    module = types.ModuleType("wandb")
    module.run = FakeRun()
    module.given = []
    module.init = lambda **options: module.given.append(options) or module.run
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_one_run_for_all_epochs_and_steps_as_a_metric(wandb, tmp_path):
    sink = WandbSink("project", "smol-a", tmp_path, {"seed": 1})
    sink.write("train", 9, 1.0, {"loss": 2.0})
    sink.write("train", 5, 2.0, {"loss": 3.0})  # made again after a take-over
    sink.write("evaluation", 5, 3.0, {"eval_loss": 4.0})
    sink.close()
    assert wandb.given == [
        {
            "project": "project", "id": "smol-a", "name": "smol-a", "resume": "allow", "dir": str(tmp_path),
            "config": {"seed": 1},
        }
    ]  # fmt: skip
    assert wandb.run.calls == [
        ("define_metric", "step", {}),
        ("define_metric", "*", {"step_metric": "step"}),
        ("log", {"train/loss": 2.0, "step": 9}),
        ("log", {"train/loss": 3.0, "step": 5}),
        ("log", {"evaluation/eval_loss": 4.0, "step": 5}),
        ("finish",),
    ]


def test_offline_is_left_to_wandb_itself(wandb, monkeypatch):
    """No mode is passed: wandb reads WANDB_MODE, and an argument would win over it."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    WandbSink("project", "smol-a")
    assert "mode" not in wandb.given[0]
    assert "settings" not in wandb.given[0]


def test_wandb_that_cannot_start_says_what_to_do(wandb):
    def init(**options: object) -> None:
        raise RuntimeError("api_key not configured")

    wandb.init = init
    with pytest.raises(TrainError, match=r"wandb = 'p': api_key not configured: log in .* or set WANDB_MODE=offline"):
        WandbSink("p", "r")


@pytest.mark.parametrize("found", [None, types.ModuleType("wandb")], ids=["not there", "only its folder of files"])
def test_without_wandb_the_extra_is_named(monkeypatch, found):
    monkeypatch.setitem(sys.modules, "wandb", found)
    message = r"wandb = 'p': .* not installed: .*anypool\[wandb\]` or `EXTRA=wandb make install`"
    with pytest.raises(TrainError, match=message):
        WandbSink("p", "r")
