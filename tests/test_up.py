"""`anypool up` as a process: what it prints, how it stops, and that no worker outlives it.

The gateway is the real one; the workers are fakes that need no model.
"""

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "fleets" / "local-two-pools.toml"


class Up:
    """A running `anypool up`, once it has printed where it serves."""

    def __init__(self, *worker_arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "fake_up.py"), str(EXAMPLE), "0", *worker_arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.printed: list[str] = []
        self.logged: list[str] = []

    def read_until(self, words: str) -> str:
        """The first line of standard output with these words."""
        return self._read(self.process.stdout, words, self.printed)

    def log_until(self, words: str) -> str:
        """The first line of standard error with these words."""
        return self._read(self.process.stderr, words, self.logged)

    @staticmethod
    def _read(stream: IO[str] | None, words: str, seen: list[str]) -> str:
        assert stream is not None
        for line in stream:
            seen.append(line)
            if words in line:
                return line
        raise AssertionError(f"{words!r} did not come; all that came: {''.join(seen)}")

    def serve(self) -> str:
        """Waits until it serves; its address."""
        self.read_until("twice stops now")
        return str(self.printed[0].split()[-1])

    def pids(self) -> list[int]:
        """The workers' process ids, from the printed table."""
        return [int(re.split(r"\s+", line.strip())[4]) for line in self.printed if line.startswith("  cpu-")]


@pytest.fixture
def start() -> Iterator[Callable[..., Up]]:
    running: list[Up] = []

    def start(*worker_arguments: str) -> Up:
        running.append(Up(*worker_arguments))
        return running[-1]

    yield start
    for up in running:
        with up.process:
            up.process.kill()


def get(url: str) -> Any:
    with urllib.request.urlopen(url) as response:
        return json.load(response)


def ended(descriptor: int) -> bool:
    readable, _, _ = select.select([descriptor], [], [], 60)
    os.close(descriptor)
    return bool(readable)


def test_it_prints_pools_address_and_a_curl_line_and_serves(start):
    up = start()
    url = up.serve()
    text = "".join(up.printed)
    assert text.startswith(f"local-two-pools serves smollm2-135m-instruct at {url}\n")
    assert re.search(r"(?m)^  cpu-a  cpu   local     ready  \d+ +http://127", text)
    assert f"curl -N {url}/v1/chat/completions" in text
    assert f"kill -9 {up.pids()[0]}" in text
    assert get(f"{url}/v1/models")["data"][0]["id"] == "smollm2-135m-instruct"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_signal_drains_and_ends_with_zero(start, number):
    up = start()
    up.serve()
    descriptors = [os.pidfd_open(pid) for pid in up.pids()]
    up.process.send_signal(number)
    assert up.process.wait(60) == 0
    assert all(ended(descriptor) for descriptor in descriptors)
    log = up.process.stderr.read()
    assert "draining" in log
    assert "Traceback" not in log


def test_a_second_signal_ends_workers_that_would_not(start):
    up = start("--fault", "ignores-term")
    up.serve()
    descriptors = [os.pidfd_open(pid) for pid in up.pids()]
    up.process.send_signal(signal.SIGINT)
    up.log_until("draining pool=")
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(60) == 0
    assert all(ended(descriptor) for descriptor in descriptors)


def test_a_signal_while_workers_start_stops_them(start):
    up = start("--fault", "never-ready")
    up.log_until("still compiling")
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(60) == 0
    assert up.process.stdout.read() == ""


def test_workers_do_not_survive_its_sudden_death(start):
    up = start()
    up.serve()
    descriptors = [os.pidfd_open(pid) for pid in up.pids()]
    up.process.kill()
    assert all(ended(descriptor) for descriptor in descriptors)


def test_a_killed_worker_is_replaced_while_the_endpoint_goes_on(start):
    up = start()
    url = up.serve()
    pid = up.pids()[0]
    os.kill(pid, signal.SIGKILL)
    up.log_until("down pool=cpu-a")
    up.log_until("ready pool=cpu-a")
    health = get(f"{url}/health")
    assert {pool["name"] for pool in health["pools"]} == {"cpu-a", "cpu-b"}


def test_when_no_pool_can_ever_serve_it_says_why_and_ends_with_two(start):
    up = start("--fault", "user-error")
    assert up.process.wait(60) == 2
    log = up.process.stderr.read()
    assert "pool cpu-a cannot be served from: model 'nope' is not known" in log
    assert "Traceback" not in log
    assert up.process.stdout.read() == ""


def anypool(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the real command line to its end."""
    return subprocess.run(
        [sys.executable, "-m", "anypool", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_a_port_in_use_is_told_before_anything_starts():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = anypool("up", "--port", str(port))
    assert result.returncode == 2
    assert result.stderr == (
        f"error: port {port} on 127.0.0.1 is in use: stop what listens there, choose another with --port, "
        "or --port 0 for any free one\n"
    )


def test_an_address_that_is_not_ours():
    result = anypool("up", "--host", "192.0.2.1", "--port", "0")
    assert result.returncode == 2
    assert result.stderr.startswith("error: cannot listen on 192.0.2.1:0: ")


def test_an_unknown_model(tmp_path):
    fleet = tmp_path / "fleet.toml"
    fleet.write_text('[model]\nid = "smollm2-135m"\n[[pool]]\nname = "a"\nchip = "cpu"\n')
    result = anypool("up", str(fleet), "--port", "0")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "smollm2-135m-instruct" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_misspelt_fleet_file(tmp_path):
    fleet = tmp_path / "fleet.toml"
    fleet.write_text('[model]\nid = "m"\n[[pool]]\nname = "a"\nchp = "cpu"\n')
    result = anypool("up", str(fleet))
    assert result.returncode == 2
    assert result.stderr == f"error: {fleet}:5: [[pool]] 'a': unknown key 'chp'; did you mean 'chip'?\n"


def test_a_missing_key_of_an_external_pool(tmp_path):
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(
        '[model]\nid = "m"\n[[pool]]\nname = "a"\nchip = "ascend910c"\nlauncher = "external"\n'
        'endpoint = "http://127.0.0.1:1"\napi_key_env = "NOT_SET_ANYWHERE"\n'
    )
    result = anypool("up", str(fleet), "--port", "0")
    assert result.returncode == 2
    assert "NOT_SET_ANYWHERE, which is not set" in result.stderr
