"""Between the engine's thread and the server's event loop: whose tokens are whose."""

import asyncio
import json
import time
import types

import pytest

from anypool.engine import protocol, server
from anypool.engine.blocks import BlockEvents
from anypool.engine.engine import StepResult, Update
from anypool.engine.request import Request, SamplingParams

# ---- between the engine's thread and the event loop --------------------------------------------------------------


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def idle_worker() -> server.Worker:
    made = server.Worker(server.WorkerOptions("no model"))
    made.engine = types.SimpleNamespace(beat=time.monotonic())  # type: ignore[assignment]
    return made


def request(name: str = "r") -> Request:
    return Request(name, [1, 2], SamplingParams(max_tokens=9))


async def test_a_comment_at_every_beat_of_silence(monkeypatch):
    """One for each beat without tokens, none for a beat with some, none at all when the engine hangs."""
    beat = asyncio.Event()

    async def sleep(seconds: float) -> None:
        assert seconds == server.ALIVE_SECONDS == 0.25
        await beat.wait()
        beat.clear()

    worker, sent = idle_worker(), []

    async def send(message):
        sent.append(message.get("body"))

    monkeypatch.setattr(server, "asyncio", types.SimpleNamespace(**vars(asyncio) | {"sleep": sleep}))
    stream = server._Stream(request())
    worker._streams["r"] = stream
    tasks = [
        asyncio.create_task(worker._tick()),
        asyncio.create_task(worker._stream(send, stream, protocol.StreamWriter(stream.request, "m"))),
    ]

    async def next_beat() -> list[bytes]:
        sent.clear()
        beat.set()
        await settle()
        return list(sent)

    await settle()
    assert [await next_beat() for _ in range(3)] == [[b": alive\n\n"]] * 3
    worker._dispatch(StepResult([Update(stream.request, [7], None, None)], BlockEvents([], [])))
    await settle()
    assert sent[-1].startswith(b"data: ")
    assert await next_beat() == []
    assert await next_beat() == [b": alive\n\n"]
    worker.engine.beat -= 2 * server.HUNG_SECONDS
    assert [await next_beat() for _ in range(2)] == [[], []]
    for task in tasks:
        task.cancel()


def test_tokens_of_a_request_that_left_do_not_reach_the_next_of_its_name():
    worker = idle_worker()
    old, new = request("same"), request("same")
    stream = server._Stream(new)
    worker._streams["same"] = stream
    worker._dispatch(StepResult([Update(old, [7], None, None)], BlockEvents([], [])))
    assert not stream.updates
    worker._dispatch(StepResult([Update(new, [8], None, None)], BlockEvents([], [])))
    assert [update.token_ids for update in stream.updates] == [[8]]


@pytest.mark.parametrize("streaming", [True, False])
async def test_tokens_on_their_way_do_not_keep_a_stream_whose_client_left(streaming):
    worker, stream = idle_worker(), server._Stream(request())
    stream.updates.append(Update(stream.request, [], None, "cancelled"))
    stream.updates.append(Update(stream.request, [7], None, None))
    stream.news.set()

    async def send(message):
        assert message["type"] == "http.response.start", "an answer to nobody"

    answer = worker._stream if streaming else worker._whole
    await asyncio.wait_for(answer(send, stream, protocol.StreamWriter(stream.request, "m")), 10)


def test_an_engine_that_died_ends_the_process(monkeypatch, capsys):
    """It could only hang: the gateway replays its streams elsewhere, and the launcher starts a new worker."""
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)
    server.Worker(server.WorkerOptions("no model", supervised=True))._engine_died(RuntimeError("no device"))
    assert codes == [70]
    told = json.loads(capsys.readouterr().out)
    assert told == {"event": "error", "message": "the engine died: RuntimeError: no device"}


def test_timing_of_the_first_event_when_the_engine_is_ahead():
    """The engine may have finished a short request before its first event is written."""
    made = request()
    made.scheduled_at, made.first_token_at, made.finished_at = made.arrival + 1, made.arrival + 3, made.arrival + 7
    writer = protocol.StreamWriter(made, "m")
    first = json.loads(writer.event(Update(made, [5], None, None)).removeprefix(b"data: "))
    last = json.loads(writer.event(Update(made, [6], None, "length")).removeprefix(b"data: "))
    assert first["anypool"]["timing"] == {"queue_seconds": pytest.approx(1), "prefill_seconds": pytest.approx(2)}
    assert last["anypool"]["timing"]["decode_seconds"] == pytest.approx(4)
