"""A worker's death is known before the kernel has taken its memory back."""

import asyncio
import os
import signal
import subprocess
import sys
import threading

import pytest

from anypool.pools.lifeline import ENVIRONMENT_VARIABLE, Lifeline
from anypool.pools.process import WorkerProcess

pytestmark = pytest.mark.skipif(Lifeline.create() is None, reason="needs Linux with glibc")

HOLD = "from anypool.pools.lifeline import hold; hold(); print('held', flush=True); import sys; sys.stdin.read()"


def start(code):
    line = Lifeline.create()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, ENVIRONMENT_VARIABLE: str(line.fd)},
        pass_fds=(line.fd,),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    line.close()
    process.stdout.readline()
    return process, line


def test_the_death_of_the_holder_is_told():
    process, line = start(HOLD)
    died = threading.Event()
    line.watch(died.set)
    assert not died.is_set()
    process.kill()
    assert died.wait(30)
    process.wait()


def test_a_worker_that_holds_no_lifeline_is_not_taken_for_dead():
    process, line = start("print(flush=True); import sys; sys.stdin.read()")
    died, looked = threading.Event(), threading.Event()
    wait = line._wait
    line._wait = lambda callback: (wait(callback), looked.set())
    line.watch(died.set)
    assert looked.wait(30)
    assert not died.is_set()
    process.kill()
    process.wait()


async def test_the_lifeline_tells_while_pipes_are_still_open():
    """A child of the worker holds its pipes open past its death: only the lifeline can tell."""
    script = (
        "import subprocess, sys; from anypool.pools.lifeline import hold; hold();"
        'p = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE);'
        'print(\'{"event": "listening", "port": 1, "child": %d}\' % p.pid, flush=True); sys.stdin.read()'
    )
    listening = asyncio.Event()
    worker = WorkerProcess.start(
        [sys.executable, "-c", script],
        environment=dict(os.environ),
        on_event=lambda event: listening.set(),
        on_log=print,
    )
    await asyncio.wait_for(listening.wait(), 30)
    os.kill(worker.pid, signal.SIGKILL)
    await asyncio.wait_for(worker.gone.wait(), 30)
    assert await worker.ended() == -signal.SIGKILL
