"""Progress of long steps, shown on standard error."""

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from anypool.models import resolve


def bars(console: Console) -> Progress:
    """Progress bars for a terminal; silent elsewhere, where the log lines say enough."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


class Reporter:
    """A bar whose name and length follow what is being done."""

    def __init__(self, shown: Progress, title: str) -> None:
        self._shown, self._title = shown, title
        self._task = shown.add_task(f"{title}: looking it up", total=None)

    def __call__(self, phase: str, done: int, total: int, detail: str = "") -> None:
        description = f"{self._title}: {phase} {detail}".rstrip()
        self._shown.update(self._task, description=description, completed=done, total=total or None)


def resolve_shown(model: str, shown: Progress) -> Path:
    """The model's directory; the first time it is fetched or converted, with a bar. Raises ModelError."""
    return resolve(model, Reporter(shown, model))
