"""`anypool up` with the real gateway and fake workers. Arguments: a fleet file, a port, the workers' arguments."""

import functools
import sys
from pathlib import Path

import anypool.up
from anypool import logs
from anypool.cli import main
from anypool.pools import Backoff, Fleet, PoolManager, PoolSpec

WORKER = Path(__file__).parent / "pools" / "fake_worker.py"
fleet, port, *worker_arguments = sys.argv[1:]


def command(fleet: Fleet, spec: PoolSpec) -> list[str]:
    return [sys.executable, str(WORKER), *worker_arguments]


logs.setup()
backoff = Backoff(first_seconds=0.01, limit_seconds=0.02)
setattr(anypool.up, "PoolManager", functools.partial(PoolManager, command=command, backoff=backoff))  # noqa: B010
sys.argv = ["anypool", "up", fleet, "--port", port]
main()
