"""Progress as it is seen: on a terminal, and in a log."""

import io

import pytest
from rich.console import Console

from anypool.train.report import Progress
from anypool.train.report.figures import duration, loss, short, size
from anypool.train.report.live import describe

KNOWN = {
    "step": 1200, "total_steps": 5000, "loss": 2.31234, "eval_loss": 2.4, "learning_rate": 3e-4,
    "gradient_norm": 0.5123, "tokens": 10**9, "tokens_per_second": 12345.0, "mfu": 0.412, "seconds_left": 3725.0,
    "usd": 3.2, "pool": "v6e-east", "epoch": 3, "phase": "compute", "last_commit_step": 1100, "skipped": 2,
}  # fmt: skip


def lines_of(terminal: bool = False, **options) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=160, color_system=None)
    return Progress(5000, console, **options), out


def test_one_line_says_everything_that_is_known():
    assert describe(KNOWN) == (
        "step 1,200/5,000  loss 2.3123  eval 2.4000  lr 3.00e-04  grad 0.512  12.3k tokens/s  MFU 41.2%  1h 02m left  "
        "cost $3.20  2 skipped  on v6e-east (epoch 3)  committed 1,100"
    )


def test_what_is_not_known_is_left_out_or_said():
    assert describe({"total_steps": 10, "phase": "compile", "pool": "here"}) == "step -/10  compile  cost n/a  on here"
    assert "MFU n/a" in describe({"step": 1, "tokens_per_second": 5.0})
    assert describe({}) == "step -  cost n/a"


def test_elsewhere_than_on_a_terminal_a_line_comes_every_so_often():
    now = [0.0]
    progress, out = lines_of(line_seconds=30, clock=lambda: now[0])
    with progress:
        progress.update({"phase": "restore", "pool": "a", "epoch": 1})
        for step in range(1, 100):
            now[0] += 1
            progress.update({"step": step, "phase": "compute"})
    steps = [line.split("  ")[0] for line in out.getvalue().splitlines()]
    # The start, the first step, each 30 seconds from it, and the end.
    assert steps == [f"step {step}/5,000" for step in ("-", 1, 31, 61, 91, 99)]


def test_a_new_epoch_and_the_last_step_get_a_line_at_once():
    progress, out = lines_of(line_seconds=1e9, clock=lambda: 0.0)
    progress.update(KNOWN)
    progress.update({"pool": "trn2-west", "epoch": 4, "phase": "restore"})
    progress.update({"step": 5000, "phase": "compute"})
    progress.close()
    progress.close()
    first, second, third = out.getvalue().splitlines()
    assert "on v6e-east (epoch 3)" in first
    # Speed and time left were those of the pool before; how far the run is stays.
    expected = (
        "step 1,200/5,000  restore  loss 2.3123  eval 2.4000  cost $3.20  on trn2-west (epoch 4)  committed 1,100"
    )
    assert second == expected
    assert third.startswith("step 5,000/5,000  loss 2.3123")


def test_a_field_that_is_missing_keeps_its_value_and_one_that_is_none_has_none():
    progress, out = lines_of(line_seconds=0)
    progress.update(KNOWN)
    progress.update({"step": 1201})
    progress.update({"step": 1202, "loss": None, "mfu": None, "total_steps": None})
    kept, gone = out.getvalue().splitlines()[1:]
    assert kept.startswith("step 1,201/5,000  loss 2.3123")
    assert gone.startswith("step 1,202/5,000  loss n/a  eval 2.4000")
    assert "MFU n/a" in gone
    progress.close()


def test_on_a_terminal_there_is_a_bar_and_the_last_figures_stay():
    progress, out = lines_of(terminal=True)
    with progress:
        progress.update({"pool": "v6e-east", "phase": "start-up"})
        progress.update(KNOWN)
        progress._live.refresh()
        shown = out.getvalue()
    assert "1,200/5,000" in shown
    assert "24.0%" in shown
    assert "1h 02m left" in shown
    assert "━" in shown
    assert "loss 2.3123" in shown
    last = out.getvalue().rstrip().splitlines()[-1]
    assert last.endswith("committed 1,100")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (8.24, "8.2 s"),
        (9.97, "10 s"),
        (59.7, "1m 00s"),
        (59.4, "59 s"),
        (61, "1m 01s"),
        (3725, "1h 02m"),
        (266_400, "3d 2h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (950, "950"), (999.4, "999"), (999.6, "1k"), (12345, "12.3k"), (4_560_000, "4.56M"), (1e18, "1e+18")],
)
def test_short_numbers(number, text):
    assert short(number) == text


def test_sizes_and_losses():
    assert [size(count) for count in (12, 15_300, 1.5e9)] == ["12 B", "15.3 kB", "1.5 GB"]
    assert [loss(value) for value in (None, float("nan"), 2.0)] == ["n/a", "not finite", "2.0000"]
