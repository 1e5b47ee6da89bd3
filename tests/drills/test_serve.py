"""The drill itself: the real one with a few kills, and one on a fleet that loses what it should not."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager

import pytest

from anypool.drills import serve
from anypool.drills.prompts import LARGEST_GROUP, draw_group
from anypool.measure.stream import Stream

TOKENS = 10
PIDS = {"a": 101, "b": 102}


@pytest.mark.timeout(900)  # the first time, the model is converted and compiled
def test_workers_killed_in_mid_stream_cost_no_token():
    command = [sys.executable, "-m", "anypool", "drill", "serve", "--kills", "3", "--seed", "7", "--format", "json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["kills"] == 3
    assert seen["streams"] >= seen["streams_interrupted"] >= 3
    assert [seen[name] for name in ("tokens_lost", "tokens_repeated", "streams_differing")] == [0, 0, 0]
    for name in ("gap_ms", "detection_ms", "prefill_ms", "first_token_ms"):
        assert 0 < seen[name]["p50"] <= seen[name]["p95"] <= seen[name]["max"]


class Fleet:
    """Stands for a fleet: every stream is on pool `a`, and moves to `b` when `a` is killed.

    fault: what happens to the tokens of a stream that moves. misses: so many kills come after the stream's end.
    """

    def __init__(self, fault, misses=0):
        self.fault, self.misses = fault, misses
        self.model, self.session, self.url = "tiny", None, ""
        self.killed = []
        self.waited_without = []
        self.salts = []

    @asynccontextmanager
    async def serving(self, fleet, on_log):
        yield self

    async def ready(self, without):
        self.waited_without.append(list(without))
        return dict(PIDS)

    def kill(self, pid, number):
        self.killed.append((pid, number))

    async def read(self, session, url, request, on_news=lambda _: None):
        self.salts.append(request["cache_salt"])
        ids = [(request["seed"] + place) % 97 for place in range(TOKENS)]
        stream = Stream(sent_at=time.monotonic(), pool="a", trace={"pools": ["a"], "failovers": []})
        kills, moved = len(self.killed), False
        on_news(stream)
        while len(stream.token_ids) < len(ids):
            if len(self.killed) > kills and not moved and not self.misses:
                moved = True
                ids = self.fault(ids, len(stream.token_ids))
                self._move(stream)
            await asyncio.sleep(0)
            if len(stream.token_ids) == len(ids):
                break
            stream.token_ids.append(ids[len(stream.token_ids)])
            stream.arrivals.append((time.monotonic(), 1))
            on_news(stream)
        self.misses -= self.misses > 0 and len(self.killed) > kills
        stream.text = " ".join(map(str, stream.token_ids))
        stream.finish_reason, stream.usage = "length", {"total_tokens": 20}
        return stream

    def _move(self, stream):
        now = time.monotonic()
        failover = {"from": "a", "to": "b", "emitted_tokens": len(stream.token_ids), "prefill_done_at": now}
        stream.trace = {"pools": ["a", "b"], "failovers": [failover | {"detected_at": now, "first_token_at": now}]}


@pytest.fixture
def drill(monkeypatch, capsys):
    """Runs the drill on such a fleet; its exit code, its report and what it wrote to standard error."""

    def run(fleet, kills=5, stall=False):
        monkeypatch.setattr(serve, "serving", fleet.serving)
        monkeypatch.setattr(serve, "read_stream", fleet.read)
        monkeypatch.setattr(os, "kill", fleet.kill)
        # One stream at a time: then a kill meets no stream but the one it is for.
        monkeypatch.setattr(serve, "draw_group", lambda rng, model: draw_group(rng, model)[:1])
        code = serve.run(None, kills=kills, seed=1, stall=stall, format="json")
        out, err = capsys.readouterr()
        return code, json.loads(out), err

    return run


def unharmed(ids, place):
    return ids


def test_a_fleet_that_loses_nothing(drill):
    fleet = Fleet(unharmed)
    code, seen, _ = drill(fleet)
    assert code == 0
    assert (seen["kills"], seen["streams"], seen["streams_interrupted"], seen["tokens"]) == (5, 5, 5, 50)
    assert fleet.killed == [(101, signal.SIGKILL)] * 5
    assert fleet.waited_without == [[101] * count for count in range(5)], "each time until the killed ones are replaced"
    assert len(set(fleet.salts)) == len(fleet.salts), "no stream finds in a cache what another one computed"


@pytest.mark.parametrize(
    ("fault", "lost", "repeated"),
    [
        (lambda ids, place: ids[:place] + ids[place + 1 :], 5, 0),
        (lambda ids, place: [*ids[:place], 99, *ids[place:]], 0, 5),
        (lambda ids, place: ids[:place], 5, 0),
        (lambda ids, place: [*ids[:place], 99, *ids[place + 1 :]], 0, 0),
    ],
    ids=["drops a token", "has one too many", "breaks off", "goes on differently"],
)
def test_a_fleet_that_loses_something(drill, fault, lost, repeated):
    code, seen, err = drill(Fleet(fault))
    assert code == 1
    assert seen["streams_differing"] == 5
    assert seen["tokens_lost"] >= lost
    assert seen["tokens_repeated"] == repeated
    assert err.count("a stream differs from its unbroken run") == 5
    assert "token ids from" in err
    assert '"seed"' in err, "what it takes to repeat the stream"


def test_a_kill_that_came_too_late_does_not_count(drill):
    fleet = Fleet(unharmed, misses=2)
    code, seen, _ = drill(fleet)
    assert code == 0
    assert (seen["kills"], seen["kills_too_late"], seen["streams"]) == (5, 2, 7)


def test_a_drill_that_never_hits_gives_up(drill):
    with pytest.raises(serve.DrillError, match="10 streams in a row ended before their worker was lost"):
        drill(Fleet(unharmed, misses=1000))


def test_stalled_workers_are_stopped_not_killed(drill):
    fleet = Fleet(unharmed)
    _, seen, _ = drill(fleet, kills=1, stall=True)
    assert fleet.killed == [(101, signal.SIGSTOP)]
    assert seen["signal"] == "SIGSTOP"


A_LOCAL_POOL = '[[pool]]\nname = "a"\nchip = "cpu"\n'
AN_EXTERNAL_POOL = '[[pool]]\nname = "b"\nchip = "h100"\nlauncher = "external"\nendpoint = "http://10.0.0.7:8000"\n'


@pytest.mark.parametrize("pools", [A_LOCAL_POOL, A_LOCAL_POOL + AN_EXTERNAL_POOL])
def test_a_fleet_that_cannot_be_drilled(tmp_path, pools):
    path = tmp_path / "fleet.toml"
    path.write_text(f'[model]\nid = "smollm2-135m-instruct"\n{pools}')
    with pytest.raises(serve.DrillError, match="needs two pools or more, all with launcher"):
        serve.run(str(path), kills=1, seed=0, stall=False, format="json")


def test_streams_are_drawn_from_the_seed():
    groups = [draw_group(random.Random(seed), "tiny") for seed in range(50)]
    assert groups[3] == draw_group(random.Random(3), "tiny")
    assert {len(group) for group in groups} == set(range(1, LARGEST_GROUP + 1))
    temperatures = {request["temperature"] > 0 for group in groups for request in group}
    assert temperatures == {True, False}, "greedy and sampled"
