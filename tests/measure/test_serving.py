"""A fleet in a process of its own: started, told from one that cannot start, and never left behind."""

import os
import select
import signal
import subprocess
import sys

import pytest

from anypool.measure import ServingError, serving

FLEET = """
[model]
id = "smollm2-135m-instruct"
[[pool]]
name = "only"
chip = "cpu"
[[pool]]
name = "spare"
chip = "cpu"
[pool.engine]
max_num_seqs = 2
token_budget = 32
max_model_len = 256
"""
# Prints the processes of a fleet and waits for its own end.
HOLD = """
import asyncio, sys
from anypool.measure import serving
async def hold():
    async with serving(sys.argv[1], ["spare"]) as running:
        print(running.process.pid, *(await running.ready()).values(), flush=True)
        await asyncio.Event().wait()
asyncio.run(hold())
"""


@pytest.fixture
def fleet(tmp_path):
    path = tmp_path / "fleet.toml"
    path.write_text(FLEET)
    return str(path)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[modle]\nid = 'x'", "did you mean 'model'"),
        (FLEET.replace("smollm2-135m-instruct", "./nowhere"), "nowhere"),
    ],
)
async def test_a_fleet_that_cannot_start_says_why(tmp_path, text, error):
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    with pytest.raises(ServingError, match=error) as caught:
        async with serving(str(path)):
            pass
    assert "exit code 2" in str(caught.value)
    assert "error:" not in str(caught.value), "the message is told once, without the command's prefix"


async def test_a_pool_that_is_not_in_the_file(fleet):
    with pytest.raises(ServingError, match="serves from no pool 'spar'; did you mean 'spare'"):
        async with serving(fleet, ["spar"]):
            pass


async def test_a_pool_that_its_worker_cannot_serve(tmp_path):
    path = tmp_path / "fleet.toml"
    path.write_text(FLEET.replace("max_model_len = 256", "max_model_len = 99999"))
    with pytest.raises(ServingError, match="pool spare cannot be served from: max_model_len is 99999"):
        async with serving(str(path), ["spare"]):
            pass


@pytest.mark.skipif(sys.platform != "linux", reason="waits on process file descriptors")
@pytest.mark.timeout(900)  # the first time, the model is converted and compiled
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_of_a_fleet_whose_measurer_ended(fleet, number):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, fleet], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as one:
        descriptors = [os.pidfd_open(int(pid)) for pid in one.stdout.readline().split()]
        assert len(descriptors) == 2, "the fleet and the worker of the one pool that was asked for"
        one.send_signal(number)
    for descriptor in descriptors:
        readable, _, _ = select.select([descriptor], [], [], 60)
        os.close(descriptor)
        assert readable, "a process outlived the one that started it"
