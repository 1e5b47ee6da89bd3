"""Plots: files of the kind asked for, with what belongs in them."""

import math
import re
import statistics
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anypool.store import Store
from anypool.train.report import RunError, plot_run
from anypool.train.report.plots import smoothed
from tests.train.report.conftest import HandClock, Made, steps


@pytest.fixture
def store() -> Store:
    return Store.open(f"memory://{uuid.uuid4()}")


def make(store: Store, name: str, commits: int = 1) -> None:
    run = Made(store.at(f"runs/{name}"), HandClock())
    base = None
    for pool, first, last in (("h100", 1, 60), ("v6e", 61, 100)):
        trainer, lease = run.trainer(pool, base=base)
        with trainer.phase("compute"):
            for step in range(first, last + 1):
                run.clock.go(2)
                metrics = {"loss": 10 / step if step != 30 else math.nan, "learning_rate": 1e-3}
                trainer.step(step, metrics, tokens=100, seconds=2)
                if step % (60 // commits) == 0:
                    trainer.event("commit", step=step)
        trainer.evaluation(last, {"eval_loss": 0.3})
        base = f"step-{last:08d}-e{lease.number}"
        run.stop(trainer, lease, "moved")


def texts(svg: str) -> list[str]:
    """What matplotlib draws as paths stands beside them in comments."""
    return re.findall(r"<!-- (.*?) -->", svg)


def test_an_svg_of_one_run_names_its_axes_pools_and_marks(store, tmp_path):
    make(store, "smol-a")
    drawn = texts(plot_run(store, "smol-a", tmp_path / "new" / "a.svg").read_text())
    for expected in (
        "step", "loss (nats a token)", "learning rate", "tokens/s", "h100-eu", "v6e-east", "loss, smoothed",
        "loss of each step", "evaluation", "commit", "taken over", "smol-a: step 100 of 100",
    ):  # fmt: skip
        assert expected in drawn, expected


def test_several_runs_are_told_apart_and_have_no_bands(store, tmp_path):
    make(store, "smol-a")
    make(store, "smol-b")
    drawn = texts(plot_run(store, ["smol-a", "smol-b", "smol-a"], tmp_path / "both.svg").read_text())
    assert {"smol-a, smol-b", "smol-a: loss, smoothed", "smol-b: evaluation"} <= set(drawn)
    assert not {"h100-eu", "commit"} & set(drawn)


def test_a_png_has_the_size_of_a_page(store, tmp_path):
    make(store, "smol-a", commits=60)
    data = plot_run(store, "smol-a", tmp_path / "a.PNG").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    assert width == 1500
    assert 1000 < height < 1500


def test_a_metric_that_no_step_has_gets_no_axis(store, tmp_path):
    run = Made(store.at("runs/plain"), HandClock())
    trainer, _ = run.trainer()
    steps(trainer, run.clock, 1, 1)
    trainer.close("done")
    drawn = texts(plot_run(store, "plain", tmp_path / "a.svg").read_text())
    assert "tokens/s" in drawn
    assert "learning rate" not in drawn


@pytest.mark.parametrize(
    ("runs", "out", "message"),
    [
        ("smol-a", "a.jpeg", r"out = '.*a.jpeg': must end in .png or .svg"),
        ("smol-a", "a", r"must end in .png or .svg"),
        ("smol-x", "a.png", r"run 'smol-x': there is none .* did you mean 'smol-a'"),
        ([], "a.png", r"0 runs: name 1 to 10 runs"),
        ([f"r{n}" for n in range(11)], "a.png", r"11 runs: name 1 to 10 runs"),
        (["smol-a", "new"], "a.png", r"run 'new' has made no step yet"),
        ("smol-a", "file/a.png", r"out = '.*file/a.png': .*: name a file that can be written"),
    ],
)
def test_bad_input(store, tmp_path, runs, out, message):
    make(store, "smol-a")
    store.put("runs/new/run.toml", b"")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=message):
        plot_run(store, runs, tmp_path / out)


@given(st.lists(st.floats(-1e3, 1e3) | st.just(math.nan), max_size=400))
def test_smoothed_is_the_mean_around_each_value(values):
    half = len(values) // 100
    for place, found in enumerate(smoothed(values)):
        reach = min(half, place, len(values) - 1 - place)
        around = [value for value in values[place - reach : place + reach + 1] if math.isfinite(value)]
        if around:
            assert found == pytest.approx(statistics.fmean(around), abs=1e-6)
        else:
            assert math.isnan(found)
