"""Host time of the scheduler for each step: what the device would wait for.

    python benchmarks/scheduler.py [--steps N] [--format json]

A steady load with no device: every request has a prompt of 512 tokens, half of them shared with the others, and 64 to
192 of output; for each that finishes another arrives, so that the queue keeps its length and steps mix prompts with
decoding. `step` is `schedule` and `finish_step` together, `add` the admission of one request.
"""

import argparse
import gc
import itertools
import json
import random
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from anypool.engine.blocks import BlockPool
from anypool.engine.prefix import BLOCK_SIZE
from anypool.engine.request import Request, SamplingParams
from anypool.engine.scheduler import Scheduler, SchedulerConfig
from anypool.measure.report import circumstances, percentiles

VOCAB = 50_000
PROMPT = 512
LONGEST_OUTPUT = 192
RUNNING = (32, 256)
WAITING = (0, 1_000, 10_000)


def measure(running: int, waiting: int, steps: int) -> dict[str, Any]:
    """Times of `steps` steps with `running` requests running and `waiting` waiting."""
    config = SchedulerConfig(
        vocab_size=VOCAB,
        max_model_len=PROMPT + LONGEST_OUTPUT,
        max_num_seqs=running,
        token_budget=running + 4 * PROMPT,
        max_waiting=waiting + running + 1,
    )
    blocks_each = -(-(PROMPT + LONGEST_OUTPUT) // BLOCK_SIZE)
    scheduler = Scheduler(config, BlockPool(1 + (running + 8) * blocks_each))
    numbers = random.Random(0)
    shared = [numbers.randrange(VOCAB) for _ in range(PROMPT // 2)]
    ids = (str(number) for number in itertools.count())

    def arrive() -> float:
        own = [numbers.randrange(VOCAB) for _ in range(PROMPT - len(shared))]
        params = SamplingParams(max_tokens=numbers.randint(64, LONGEST_OUTPUT))
        request = Request(next(ids), shared + own, params)
        start = time.perf_counter()
        scheduler.add(request)
        return time.perf_counter() - start

    def turn() -> float:
        start = time.perf_counter()
        step = scheduler.schedule()
        computing = time.perf_counter()
        assert step is not None
        sampled = {item.request.id: numbers.randrange(VOCAB) for item in step.items if item.samples}
        computed = time.perf_counter()
        scheduler.finish_step(step, sampled)
        return time.perf_counter() - computed + computing - start

    added = [arrive() for _ in range(running + waiting)]
    while scheduler.num_running < running:
        turn()
    gc.collect()
    gc.freeze()  # pauses to collect what was there before belong to the process, not to the scheduler
    seconds = []
    for _ in range(steps):
        while len(scheduler.requests) < running + waiting:
            added.append(arrive())
        seconds.append(turn())
    gc.unfreeze()
    return {
        "running": running,
        "waiting": waiting,
        "steps": steps,
        "step_ms": percentiles(seconds, largest=True),
        "add_ms": percentiles(added),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--format", choices=("table", "json"), default="table")
    options = parser.parse_args()
    rows = [measure(running, waiting, options.steps) for running in RUNNING for waiting in WAITING]
    if options.format == "json":
        print(json.dumps({"scheduler": rows} | circumstances(), indent=2))
        return
    table = Table("running", "waiting", "step ms p50", "p95", "max", "add ms p50", "p95")
    for row in rows:
        times = [*row["step_ms"].values(), *row["add_ms"].values()]
        table.add_row(f"{row['running']}", f"{row['waiting']:,}", *(f"{one:.3f}" for one in times))
    Console().print(table)


if __name__ == "__main__":
    main()
