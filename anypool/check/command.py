"""`anypool check`: asks, shows what goes on, prints the report."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import TaskID

from anypool.check import compilers, report
from anypool.check.options import Options
from anypool.check.run import Running, check
from anypool.progress import bars


def install(platform: str) -> int:
    """Installs a compiler and says which."""
    home = compilers.install(platform)
    sys.stdout.write(f"{home.name} in {home.folder}\n")
    return 0


def run(model: str, targets: str, options: Options, running: Running, format: str) -> int:
    """Checks, prints, and returns the exit code: 0 only if every target fits."""
    console = Console(stderr=True)
    with bars(console) as shown:
        tasks: dict[str, TaskID] = {}

        def progress(label: str, stage: str) -> None:
            if label not in tasks:
                tasks[label] = shown.add_task(label, total=1)
            done = stage in ("fits", "does_not_fit", "rejected", "unsupported", "failed")
            shown.update(tasks[label], description=f"{label}: {stage}", completed=int(done))
            if not console.is_terminal and done:
                console.print(f"{label}: {stage}", highlight=False)

        name, results = check(model, targets, options, running, progress)
    if format == "json":
        sys.stdout.write(report.as_json(name, results) + "\n")
    elif format == "html":
        sys.stdout.write(report.as_html(name, results))
    else:
        report.show(name, results, Console())
    return 0 if all(result.verdict == "fits" for result in results) else 1
