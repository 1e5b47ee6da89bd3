"""Progress of a run while it runs, from what its trainer's heartbeats tell."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from anypool.train.report.figures import UNKNOWN, duration, loss, share, short, usd

_BAR_WIDTH = 30


class Progress:
    """A bar and one line of figures on a terminal; elsewhere a plain line every `line_seconds`.

    Fed with the heartbeat's fields: step, total_steps, loss, eval_loss, learning_rate, tokens, tokens_per_second, mfu,
    seconds_left, usd, pool, epoch, phase, last_commit_step, gradient_norm, skipped. A field that is missing keeps its
    value while the run is on the same epoch; one that is None has none, as a loss that is not finite. Use it as
    a context, or call `close`.
    """

    def __init__(
        self,
        total_steps: int | None,
        console: Console | None = None,
        *,
        line_seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(stderr=True)
        self._line_seconds, self._clock = line_seconds, clock
        self._known: dict[str, Any] = {"total_steps": total_steps}
        self._said_at: float | None = None
        self._said: str = ""
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, transient=True, refresh_per_second=4)
            self._live.start()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def update(self, known: Mapping[str, Any]) -> None:
        """Shows what is known now. A new epoch, the first step and the last one get a line at once."""
        news = dict(known)
        if news.get("total_steps") is None:
            news.pop("total_steps", None)
        before = self._known
        moved = "epoch" in before and news.get("epoch") not in (None, before["epoch"])
        if moved:
            # Speed and time left are of the pool that was lost.
            before = {name: value for name, value in before.items() if name in _OUTLIVES_AN_EPOCH}
        self._known = {name: value for name, value in (before | news).items() if value is not None}
        if self._live is not None:
            self._live.update(Group(self._bar(), Text(describe(self._known, skip=("step", "left")))))
            return
        now = self._clock()
        stepped = "step" not in before and "step" in self._known
        ended = self._known.get("step") is not None and self._known["step"] == self._known.get("total_steps")
        due = self._said_at is None or now - self._said_at >= self._line_seconds
        if due or moved or stepped or ended:
            self._say(now)

    def close(self) -> None:
        """The last figures stay as a line."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if len(self._known) > 1:
            self._say(self._clock())

    def _say(self, now: float) -> None:
        line = describe(self._known)
        if line != self._said:
            self._console.print(Text(line), soft_wrap=True)
        self._said, self._said_at = line, now

    def _bar(self) -> Table:
        step, total = self._known.get("step"), self._known.get("total_steps")
        row = Table.grid(padding=(0, 2))
        bar = ProgressBar(total or 1, step or 0, width=_BAR_WIDTH, pulse=step is None or total is None)
        left = self._known.get("seconds_left")
        done = share(step / total) if step is not None and total else ""
        row.add_row(_steps(self._known), bar, done, "" if left is None else f"{duration(left)} left")
        return row


_OUTLIVES_AN_EPOCH = ("step", "total_steps", "loss", "eval_loss", "last_commit_step", "usd")


def describe(known: Mapping[str, Any], skip: tuple[str, ...] = ()) -> str:
    """One line of what is known, in an order that does not change; nothing for what is not known, except for MFU."""
    parts: list[tuple[str, str]] = [("step", _steps(known))]
    phase = known.get("phase")
    if phase not in (None, "compute"):
        parts.append(("phase", str(phase)))
    for name, title, write in _FIGURES:
        if known.get(name) is not None:
            parts.append((name, f"{title}{write(known[name])}"))
        elif name == "loss" and known.get("step") is not None:
            parts.append((name, f"loss {UNKNOWN}"))
    if known.get("tokens_per_second") is not None:
        parts.append(("mfu", f"MFU {share(known.get('mfu'))}"))
    if known.get("seconds_left") is not None:
        parts.append(("left", f"{duration(known['seconds_left'])} left"))
    parts.append(("usd", f"cost {usd(known['usd']) if known.get('usd') is not None else UNKNOWN}"))
    if known.get("skipped"):
        parts.append(("skipped", f"{known['skipped']} skipped"))
    if known.get("pool") is not None:
        epoch = f" (epoch {known['epoch']})" if known.get("epoch") is not None else ""
        parts.append(("pool", f"on {known['pool']}{epoch}"))
    if known.get("last_commit_step") is not None:
        parts.append(("commit", f"committed {known['last_commit_step']:,}"))
    return "  ".join(text for name, text in parts if name not in skip)


_FIGURES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("loss", "loss ", loss),
    ("eval_loss", "eval ", loss),
    ("learning_rate", "lr ", "{:.2e}".format),
    ("gradient_norm", "grad ", "{:.3g}".format),
    ("tokens_per_second", "", lambda value: f"{short(value)} tokens/s"),
)


def _steps(known: Mapping[str, Any]) -> str:
    step, total = known.get("step"), known.get("total_steps")
    return f"step {'-' if step is None else f'{step:,}'}" + ("" if total is None else f"/{total:,}")
