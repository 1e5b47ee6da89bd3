"""What people see of a training run: metrics, where the time and the money went, and how it goes now.

- `Recorder(store, epoch, pool, sinks)`: a trainer's own record; `PoolFacts`, `RunFacts` are what it is told;
- `TensorBoardSink`, `WandbSink`, `Sink`: where metrics go besides;
- `read_run(store)`: a `RunRecord` of all epochs; `account(record)`: every second and dollar of it, an `Account`;
- `Progress(total_steps).update(known)`: a run as it goes, from its heartbeats;
- `list_runs`, `show_run`, `print_runs`, `print_shown`, `plot_run`: `anypool runs`.

README.md defines what is recorded, and each category of the ledger.
"""

from anypool.train.report.errors import RunError
from anypool.train.report.ledger import CATEGORIES, OVERLAP, Account, Cost, PoolAccount, account
from anypool.train.report.lines import PHASES, PoolFacts, RunFacts
from anypool.train.report.live import Progress
from anypool.train.report.plots import plot_run
from anypool.train.report.rates import peak_flops, utilisation
from anypool.train.report.reading import Epoch, RunRecord, read_run
from anypool.train.report.recorder import Closed, Recorder
from anypool.train.report.runs import FINISHED, Shown, Summary, list_runs, show_run
from anypool.train.report.sinks import Sink, TensorBoardSink, WandbSink
from anypool.train.report.tables import ledger_table, print_runs, print_shown

__all__ = [
    "CATEGORIES",
    "FINISHED",
    "OVERLAP",
    "PHASES",
    "Account",
    "Closed",
    "Cost",
    "Epoch",
    "PoolAccount",
    "PoolFacts",
    "Progress",
    "Recorder",
    "RunError",
    "RunFacts",
    "RunRecord",
    "Shown",
    "Sink",
    "Summary",
    "TensorBoardSink",
    "WandbSink",
    "account",
    "ledger_table",
    "list_runs",
    "peak_flops",
    "plot_run",
    "print_runs",
    "print_shown",
    "read_run",
    "show_run",
    "utilisation",
]
