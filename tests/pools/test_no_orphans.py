"""A worker does not outlive its launcher, however the launcher ends, by each of the two ways alone."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="waits on process file descriptors")


def watch(pid: int) -> int:
    """A file descriptor that becomes readable when the process ends."""
    return os.pidfd_open(pid)


def wait_for_end(descriptor: int) -> None:
    readable, _, _ = select.select([descriptor], [], [], 60)
    os.close(descriptor)
    assert readable, "the process outlived its parent"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("worker", [[], ["--fault", "never-ready"], ["--fault", "ignores-term", "--busy"]])
def test_workers_end_with_their_launcher(number, worker):
    launcher = subprocess.Popen(
        [sys.executable, str(HERE / "fake_launcher.py"), *worker],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with launcher:
        descriptors = [watch(int(pid)) for pid in launcher.stdout.readline().split()]
        assert len(descriptors) == 2
        launcher.send_signal(number)
        launcher.wait()
    for descriptor in descriptors:
        wait_for_end(descriptor)


def test_end_of_standard_input_alone_ends_a_worker():
    """As on a system that cannot tell a process of its parent's death."""
    code = (
        "import sys; sys.platform = 'elsewhere'; from anypool.pools.guard import die_with_parent; "
        "die_with_parent(); print('up', flush=True); import threading; threading.Event().wait()"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with worker:
        assert worker.stdout.readline() == b"up\n"
        worker.stdin.close()
        assert worker.wait(60) == 1


def test_the_kernel_alone_ends_a_worker_that_reads_nothing():
    """The worker's standard input stays open in this test, so only the parent's death can end it."""
    worker = (
        "import ctypes, threading; from anypool.pools.guard import die_with_parent; die_with_parent(); "
        "print(__import__('os').getpid(), flush=True); threading.Event().wait()"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}])"
    reading, writing = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=reading, stdout=subprocess.PIPE)
    with process:
        descriptor = watch(int(process.stdout.readline()))
        process.kill()
    wait_for_end(descriptor)
    os.close(reading)
    os.close(writing)
