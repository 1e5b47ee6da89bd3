"""Processes that make units of a job side by side.

Each is asked for a unit by a line on its standard input, and answers with a line. When the process that asks ends,
however it ends, the input ends, and with it the worker.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue

from anypool.train.data.errors import DataError
from anypool.train.data.unit import Maker

WORTH_PROCESSES = 6
"""With fewer units it takes longer to start processes than to do without; the tokenizer itself uses all cores then."""

COMMAND = (sys.executable, "-m", "anypool.train.data.worker")


def make(folder: Path, units: Sequence[int], workers: int, made: Callable[[int], None]) -> None:
    """Makes units in `workers` processes, or in this one if that is 1 or there are few units.

    made: called after each unit, one call at a time. Raises DataError for what is wrong with the texts, or if a process
    dies. Units made before that stay.
    """
    if workers == 1 or len(units) < WORTH_PROCESSES:
        maker = Maker(folder)
        for unit in units:
            maker.make(unit)
            made(unit)
        return
    queue: SimpleQueue[int] = SimpleQueue()
    for unit in units:
        queue.put(unit)
    failed, alone = threading.Event(), threading.Lock()

    def serve(process: subprocess.Popen[bytes]) -> None:
        """Asks one process for units until none is left."""
        while not failed.is_set():
            try:
                unit = queue.get_nowait()
            except Empty:
                return
            try:
                _ask(process, unit)
                with alone:
                    made(unit)
            except BaseException:
                failed.set()
                raise

    processes = [_start(folder) for _ in range(min(workers, len(units)))]
    with ThreadPoolExecutor(len(processes)) as threads:
        try:
            for serving in [threads.submit(serve, process) for process in processes]:
                serving.result()
        finally:
            failed.set()
            for process in processes:
                _end(process)


def _ask(process: subprocess.Popen[bytes], unit: int) -> None:
    """One unit from one process. Raises DataError with what it complains of."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(f"{unit}\n".encode())
        process.stdin.flush()
        line = process.stdout.readline()
    except (OSError, ValueError):  # it ended, or its pipes were closed because another one failed
        line = b""
    if not line:
        raise DataError(
            f"a process that tokenised ended with exit code {process.wait()}, and its last work was lost; what was "
            "finished is kept. Ask again, with fewer workers if memory is short"
        )
    if complaint := json.loads(line).get("error"):
        raise DataError(complaint)


def _start(folder: Path) -> subprocess.Popen[bytes]:
    # One process a core is what divides the work; nothing here computes on an accelerator, or may take hold of it.
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [*COMMAND, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(OSError):  # what it was still to be asked is of no use now
        process.stdin.close()
    process.stdout.close()
