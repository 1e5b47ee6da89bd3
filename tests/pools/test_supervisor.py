"""Workers are real processes here, killed for real. Every wait is for an event; none is for a time."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import aiohttp
import pytest

from anypool.pools import Backoff, Fleet, PoolManager, PoolSpec
from anypool.pools.fleet import parse_fleet

WORKER = Path(__file__).with_name("fake_worker.py")
QUICK = Backoff(first_seconds=0.01, limit_seconds=0.02)
TWO_POOLS = """
[model]
id = "none"
[gateway]
heartbeat_limit_seconds = {limit}
[[pool]]
name = "a"
chip = "cpu"
[[pool]]
name = "b"
chip = "cpu"
"""


class Watched:
    """A manager of two fake workers, and everything that was told of them."""

    def __init__(self, *arguments: str, limit: float = 60.0, backoff: Backoff = QUICK) -> None:
        def command(fleet: Fleet, spec: PoolSpec) -> list[str]:
            return [sys.executable, str(WORKER), *arguments]

        self.log: list[str] = []
        self.manager = PoolManager(
            parse_fleet(TWO_POOLS.format(limit=limit)),
            backoff=backoff,
            command=command,
            on_log=lambda pool, line: self.log.append(line),
        )
        self.a, self.b = self.manager.pools.values()
        self.states: list[tuple[str, str]] = []
        self.manager.subscribe(self.note)

    def note(self, pool) -> None:
        if self.states_of(pool.name)[-1:] != [pool.state]:
            self.states.append((pool.name, pool.state))

    def states_of(self, name: str) -> list[str]:
        return [state for pool, state in self.states if pool == name]

    async def __aenter__(self) -> "Watched":
        await self.manager.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.manager.kill()
        await self.manager.stop()

    async def ready(self) -> None:
        await self.manager.wait_until(lambda: self.a.state == self.b.state == "ready")

    async def post(self, pool, path: str) -> None:
        async with aiohttp.ClientSession() as session, session.post(f"{pool.url}{path}") as response:
            assert response.status == 200


def runs(pid: int) -> bool:
    """Whether a process with this id exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_pools_become_ready_with_url_pid_and_progress():
    async with Watched() as watched:
        seen = []
        watched.manager.subscribe(lambda pool: seen.append(pool.progress))
        await watched.ready()
        assert watched.a.url.startswith("http://127.0.0.1:")
        assert watched.a.url != watched.b.url
        assert runs(watched.a.pid) and runs(watched.b.pid)
        assert watched.a.progress is None
        assert any(progress and (progress.phase, progress.done, progress.total) == ("load", 1, 2) for progress in seen)


async def test_a_killed_worker_is_down_before_it_is_started_again():
    async with Watched() as watched:
        await watched.ready()
        pid = watched.a.pid
        os.kill(pid, signal.SIGKILL)
        await watched.manager.wait_until(lambda: watched.a.restarts == 1 and watched.a.state == "ready")
        assert watched.states_of("a") == ["starting", "ready", "down", "starting", "ready"]
        assert watched.a.pid != pid
        assert watched.a.last_error == "the worker was ended by SIGKILL"
        assert watched.states_of("b") == ["starting", "ready"]
        assert watched.b.restarts == 0


async def test_down_is_told_with_no_url_so_that_nothing_is_sent_there():
    async with Watched() as watched:
        await watched.ready()
        urls = []
        watched.manager.subscribe(lambda pool: urls.append((pool.state, pool.url)))
        os.kill(watched.a.pid, signal.SIGKILL)
        await watched.manager.wait_until(lambda: bool(urls))
        assert urls[0] == ("down", None)


async def test_a_crash_at_start_tells_the_last_line_and_is_tried_again():
    async with Watched("--fault", "crash") as watched:
        await watched.manager.wait_until(lambda: watched.a.restarts >= 3)
        assert watched.a.last_error == "the worker ended with exit code 1: RuntimeError: out of everything"


async def test_a_users_mistake_is_not_tried_again():
    async with Watched("--fault", "user-error") as watched:
        await watched.manager.wait_until(lambda: watched.a.state == watched.b.state == "failed")
        assert watched.a.last_error == "model 'nope' is not known; did you mean 'smollm2-135m-instruct'?"
        assert watched.a.restarts == 0


async def test_a_command_that_cannot_run_fails():
    fleet = parse_fleet(TWO_POOLS.format(limit=5))
    manager = PoolManager(fleet, command=lambda fleet, spec: ["/nonexistent/worker"])
    async with manager:
        await manager.wait_until(lambda: all(pool.state == "failed" for pool in manager.pools.values()))
        assert manager.pools["a"].last_error == "/nonexistent/worker cannot be started: No such file or directory"


@pytest.mark.parametrize("fault", ["/mute", "/stuck"])
async def test_a_worker_that_stalls_is_killed_and_started_again(fault):
    async with Watched(limit=2.0) as watched:
        await watched.ready()
        pid = watched.a.pid
        await watched.post(watched.a, fault)
        await watched.manager.wait_until(lambda: watched.a.restarts == 1 and watched.a.state == "ready")
        assert "the worker stalled" in watched.a.last_error
        assert not runs(pid)
        assert watched.states_of("b") == ["starting", "ready"]


async def test_a_stopped_process_counts_as_stalled():
    async with Watched(limit=1.0) as watched:
        await watched.ready()
        os.kill(watched.a.pid, signal.SIGSTOP)
        await watched.manager.wait_until(lambda: watched.a.restarts == 1 and watched.a.state == "ready")
        assert "the worker stalled" in watched.a.last_error


async def test_a_worker_that_closes_its_output_is_replaced():
    async with Watched() as watched:
        await watched.ready()
        pid = watched.a.pid
        await watched.post(watched.a, "/silence")
        await watched.manager.wait_until(lambda: watched.a.restarts == 1)
        assert not runs(pid)


async def test_drain_lets_the_stream_finish_and_starts_nothing_again():
    async with Watched("--busy") as watched:
        await watched.ready()
        url, pid = watched.a.url, watched.a.pid
        drained = asyncio.create_task(watched.manager.drain("a"))
        await watched.manager.wait_until(lambda: watched.a.state == "draining")
        assert watched.a.url == url
        assert runs(pid)
        await watched.post(watched.a, "/finish")
        await drained
        assert not runs(pid)
        assert watched.a.state == "down"
        assert watched.a.last_error is None
        assert watched.a.restarts == 0
        assert watched.b.state == "ready"


async def test_a_worker_that_does_not_drain_in_time_is_killed():
    async with Watched("--fault", "ignores-term") as watched:
        await watched.ready()
        pid = watched.a.pid
        await watched.manager.drain("a", grace_seconds=0.05)
        assert not runs(pid)
        assert watched.a.state == "down"


async def test_stop_leaves_no_process_and_tells_down():
    async with Watched() as watched:
        await watched.ready()
        pids = watched.a.pid, watched.b.pid
        await watched.manager.stop()
        assert not any(runs(pid) for pid in pids)
        assert watched.states_of("a") == ["starting", "ready", "draining", "down"]


async def test_kill_ends_a_drain_that_waits():
    async with Watched("--busy") as watched:
        await watched.ready()
        pids = watched.a.pid, watched.b.pid
        stopping = asyncio.create_task(watched.manager.stop())
        await watched.manager.wait_until(lambda: watched.a.state == watched.b.state == "draining")
        watched.manager.kill()
        await stopping
        assert not any(runs(pid) for pid in pids)


async def test_stop_while_workers_start_leaves_no_process():
    async with Watched("--fault", "never-ready") as watched:
        await watched.manager.wait_until(lambda: bool(watched.a.pid and watched.b.pid))
        pids = watched.a.pid, watched.b.pid
        await watched.manager.stop()
        assert not any(runs(pid) for pid in pids)


async def test_stop_before_any_process_runs():
    watched = Watched()
    await watched.manager.start()
    await watched.manager.stop()
    assert {watched.a.state, watched.b.state} == {"down"}
    assert watched.a.pid is None


async def test_stop_during_the_pause_before_a_restart():
    async with Watched("--fault", "crash", backoff=Backoff(first_seconds=3600, limit_seconds=3600)) as watched:
        await watched.manager.wait_until(lambda: watched.a.last_error is not None)
        await watched.manager.stop()
        assert watched.a.restarts == 0


async def test_what_a_library_prints_is_passed_on_and_hurts_nothing():
    async with Watched() as watched:
        await watched.ready()
        await watched.post(watched.a, "/print")
        os.kill(watched.a.pid, signal.SIGKILL)
        await watched.manager.wait_until(lambda: watched.a.restarts == 1)
        assert "hello from a library" in watched.log


async def test_wait_until_gives_up_at_its_timeout():
    async with Watched("--fault", "never-ready") as watched:
        with pytest.raises(TimeoutError):
            await watched.manager.wait_until(lambda: False, timeout=0.01)
        assert watched.manager.pools["a"].listeners == [watched.note]


def test_backoff_doubles_to_its_limit():
    backoff = Backoff()
    assert [backoff.seconds(failures) for failures in (1, 2, 3, 8, 9, 1000)] == [
        0.25,
        0.5,
        1.0,
        30.0,
        30.0,
        30.0,
    ]
