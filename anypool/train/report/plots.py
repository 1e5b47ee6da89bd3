"""Runs drawn: loss, learning rate and speed by step, with the pools they were on."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from anypool.store import Store
from anypool.train.report.errors import RunError
from anypool.train.report.reading import Epoch, RunRecord, last_kept
from anypool.train.report.runs import read_named

FORMATS = (".png", ".svg")
_MOST_RUNS = 10
_MOST_COMMIT_LINES = 40
# Told apart with the common kinds of colour blindness; source: Okabe and Ito 2008, without yellow, which is too light.
_RUN_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_POOL_COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#999999", "#d55e00")
_GREY = "#555555"


@dataclass(frozen=True)
class _Panel:
    metric: str
    label: str
    height: float


_PANELS = (
    _Panel("loss", "loss (nats a token)", 3.0),
    _Panel("learning_rate", "learning rate", 1.0),
    _Panel("tokens_per_second", "tokens/s", 1.3),
)


def plot_run(store_url: str | Store, runs: str | Sequence[str], out: Path) -> Path:
    """Draws one run, or several over each other, into a PNG or SVG file. Returns its path.

    Steps that were lost are left out. One run shows its pools as bands, where it was taken over and its commits.
    Raises RunError for a run that is not there or has no step yet, and for a file of another kind.
    """
    names = [runs] if isinstance(runs, str) else list(dict.fromkeys(runs))
    if not names or len(names) > _MOST_RUNS:
        raise RunError(f"{len(names)} runs: name 1 to {_MOST_RUNS} runs to draw")
    if out.suffix.lower() not in FORMATS:
        raise RunError(f"out = {str(out)!r}: must end in {' or '.join(FORMATS)}")
    records = {name: read_named(store_url, name) for name in names}
    for name, record in records.items():
        if not any(line.kind == "step" for line in record.kept()):
            raise RunError(f"run {name!r} has made no step yet: wait for one, or leave this run out")
    figure = _draw(records)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=150)
    except OSError as error:
        raise RunError(f"out = {str(out)!r}: {error}: name a file that can be written") from None
    return out


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of about a fiftieth of all values around each, fewer towards both ends: so the curve does not lag.

    Values that are not finite count for nothing; where there is no other, the mean is not-a-number.
    """
    half = len(values) // 100
    sums, counts = [0.0], [0]
    for value in values:
        finite = math.isfinite(value)
        sums.append(sums[-1] + (value if finite else 0.0))
        counts.append(counts[-1] + finite)
    found = []
    for place in range(len(values)):
        reach = min(half, place, len(values) - 1 - place)
        first, last = place - reach, place + reach + 1
        count = counts[last] - counts[first]
        found.append((sums[last] - sums[first]) / count if count else math.nan)
    return found


def _draw(records: dict[str, RunRecord]) -> Any:
    """A matplotlib Figure. Made without pyplot, which would keep it and might open a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    panels = [panel for panel in _PANELS if any(record.curve(panel.metric) for record in records.values())]
    heights = [panel.height for panel in panels]
    figure = Figure(figsize=(10, 1.6 + 1.25 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0].tolist()
    single = len(records) == 1
    for panel, axis in zip(panels, axes, strict=True):
        for place, (name, record) in enumerate(records.items()):
            _curve(axis, panel, record, name, _RUN_COLOURS[place % len(_RUN_COLOURS)], place, single=single)
        axis.set_ylabel(panel.label)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        if panel.metric == "tokens_per_second":
            axis.yaxis.set_major_formatter(EngFormatter(sep=""))
            axis.set_ylim(bottom=0)
        if panel.metric == "learning_rate":
            axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
            axis.set_ylim(bottom=0)
    (name, record) = next(iter(records.items()))
    if single:
        _pools(axes, record)
    axes[0].legend(loc="upper right", fontsize=8, framealpha=0.9)
    title = _title(name, record) if single else ", ".join(records)
    axes[0].set_title(title, loc="left", fontsize=11, pad=18 if single else 8)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].margins(x=0.01)
    return figure


def _curve(axis: Any, panel: _Panel, record: RunRecord, name: str, colour: str, place: int, *, single: bool) -> None:
    points = record.curve(panel.metric)
    if not points:
        return
    steps, values = [step for step, _ in points], [value for _, value in points]
    if panel.metric == "learning_rate":
        axis.plot(steps, values, color=colour, linewidth=1.3)
        return
    dots = "." if len(points) < 3 else ""
    smooth_label = (f"{name}: loss, smoothed" if not single else "loss, smoothed") if panel.metric == "loss" else None
    raw_label = "loss of each step" if panel.metric == "loss" and single else None
    axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8, marker=dots, label=raw_label)
    # How fast it is changes at once when a pool does, so speed is smoothed on each pool for itself.
    cuts = [first for _, first, _ in _stays(record)[1:]] if panel.metric == "tokens_per_second" else []
    edges = [0, *(bisect_left(steps, cut) for cut in cuts), len(steps)]
    for first, last in pairwise(edges):
        axis.plot(
            steps[first:last], smoothed(values[first:last]), color=colour, linewidth=1.6, label=smooth_label, zorder=3
        )
    found = record.curve("eval_loss") if panel.metric == "loss" else []
    if found:
        axis.plot(
            *zip(*found, strict=True), color="#d55e00" if single else colour, linestyle="none",
            marker="oDs^v"[place % 5], markersize=5, markeredgecolor="white", markeredgewidth=0.7, zorder=4,
            label="evaluation" if single else f"{name}: evaluation",
        )  # fmt: skip


def _pools(axes: Sequence[Any], record: RunRecord) -> None:
    """Bands of the pools, lines where the run was taken over, marks of commits."""
    spans = _stays(record)
    names = list(dict.fromkeys(epoch.pool.name for epoch, _, _ in spans))
    for axis in axes:
        for epoch, first, last in spans:
            colour = _POOL_COLOURS[names.index(epoch.pool.name) % len(_POOL_COLOURS)]
            axis.axvspan(first - 0.5, last + 0.5, color=colour, alpha=0.13, linewidth=0, zorder=0)
        for _, first, _ in spans[1:]:
            axis.axvline(first - 0.5, color=_GREY, linestyle="--", linewidth=0.9, zorder=2)
    _name_pools(axes[0], spans)
    commits = _commits(record)
    if not commits:
        return
    # Many commits as lines would hide the curve: then they are ticks at the foot.
    top = 1.0 if len(commits) <= _MOST_COMMIT_LINES else 0.03
    style = {"color": _GREY, "linewidth": 0.6, "linestyle": ":" if top == 1.0 else "-", "zorder": 1}
    for axis in axes:
        axis.vlines(commits, 0, top, transform=axis.get_xaxis_transform(), **style)
    axes[0].plot([], [], color=_GREY, linewidth=0.8, linestyle=style["linestyle"], label="commit")
    if len(spans) > 1:
        axes[0].plot([], [], color=_GREY, linewidth=0.9, linestyle="--", label="taken over")


def _name_pools(axis: Any, spans: Sequence[tuple[Epoch, int, int]]) -> None:
    """The pools' names over their bands, each where there is room for it."""
    whole = max(last for _, _, last in spans) - min(first for _, first, _ in spans) + 1
    taken_to = -math.inf
    for epoch, first, last in spans:
        middle, half = (first + last) / 2, 0.006 * len(epoch.pool.name) * whole
        if middle - half > taken_to and 2 * half <= max(last - first + 1, 0.06 * whole):
            axis.annotate(
                epoch.pool.name, (middle, 1.0), xycoords=axis.get_xaxis_transform(), xytext=(0, 3),
                textcoords="offset points", ha="center", va="bottom", fontsize=8, color=_GREY,
            )  # fmt: skip
            taken_to = middle + half


def _stays(record: RunRecord) -> list[tuple[Epoch, int, int]]:
    """Epochs that made steps which count, with the first and the last of them."""
    limits = last_kept(record.epochs)
    found = []
    for epoch in record.epochs:
        steps = [line.step for line in epoch.lines if line.kind == "step" and line.step <= limits[epoch.number]]
        if steps:
            found.append((epoch, min(steps), max(steps)))
    return found


def _commits(record: RunRecord) -> list[int]:
    limits = last_kept(record.epochs)
    return sorted(
        {
            event.facts["step"]
            for epoch in record.epochs
            for event in epoch.events
            if event.name == "commit"
            and isinstance(event.facts.get("step"), int)
            and event.facts["step"] <= limits[epoch.number]
        }
    )


def _title(name: str, record: RunRecord) -> str:
    step = max(line.step for line in record.kept() if line.kind == "step")
    return f"{name}: step {step:,}" + (f" of {record.total_steps:,}" if record.total_steps else "")
