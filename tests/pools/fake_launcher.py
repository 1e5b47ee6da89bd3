"""Runs a fleet of fake workers and prints their process ids: to be killed, and its orphans looked for."""

import asyncio
import signal
import sys
from pathlib import Path

from anypool.pools import Fleet, PoolManager, PoolSpec
from anypool.pools.fleet import parse_fleet

TEXT = """
[model]
id = "none"
[[pool]]
name = "a"
chip = "cpu"
[[pool]]
name = "b"
chip = "cpu"
"""


def command(fleet: Fleet, spec: PoolSpec) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name("fake_worker.py")), *sys.argv[1:]]


async def main() -> None:
    manager = PoolManager(parse_fleet(TEXT), command=command)
    await manager.start()
    pools = manager.pools.values()
    await manager.wait_until(lambda: all(pool.progress or pool.state == "ready" for pool in pools))
    print(*(pool.pid for pool in pools), flush=True)
    await asyncio.Event().wait()


# A shell that runs the tests in the background, or nohup, has its children ignore some of these.
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
asyncio.run(main())
