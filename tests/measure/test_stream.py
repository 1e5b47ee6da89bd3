"""Streams as clients see them: read from a server that sends exactly what the test says."""

import asyncio
import json
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from anypool.measure import read_stream
from anypool.measure.report import circumstances, percentiles
from anypool.measure.stream import Stream


@asynccontextmanager
async def server(*parts, status=200):
    """A server that answers every request with these bytes, one write a part, and keeps what it was asked."""
    asked = []

    async def answer(request):
        asked.append((request.path, await request.json()))
        response = web.StreamResponse(status=status, headers={"x-anypool-pool": "cpu-a"})
        await response.prepare(request)
        for part in parts:
            await response.write(part)
            await asyncio.sleep(0)
        return response

    app = web.Application()
    app.router.add_post("/v1/{rest:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        async with aiohttp.ClientSession() as session:
            yield session, f"http://127.0.0.1:{runner.addresses[0][1]}", asked
    finally:
        await runner.cleanup()


def event(**fields) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def chunk(text, ids, finish=None) -> bytes:
    return event(choices=[{"delta": {"content": text}, "token_ids": ids, "finish_reason": finish}])


DONE = b"data: [DONE]\n\n"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
LAST = event(choices=[], usage={"prompt_tokens": 3}, anypool={"pools": ["cpu-a"], "failovers": []})


async def test_a_chat_is_put_together_from_its_events():
    sent = event(choices=[{"delta": {"role": "assistant", "content": ""}}]) + chunk("Hé", [1, 2])
    seen = []
    async with server(sent, chunk("llo", [3]) + chunk("", [], "stop"), LAST + DONE) as (session, url, asked):
        stream = await read_stream(session, url, CHAT, lambda stream: seen.append(len(stream.token_ids)))
    assert (stream.text, stream.token_ids, stream.finish_reason, stream.error) == ("Héllo", [1, 2, 3], "stop", None)
    assert stream.usage == {"prompt_tokens": 3}
    assert stream.trace == {"pools": ["cpu-a"], "failovers": []}
    assert stream.pool == "cpu-a"
    assert [count for _, count in stream.arrivals] == [2, 1]
    assert stream.sent_at <= stream.first_token_at <= stream.last_token_at
    assert seen == [0, 2, 3], "told on admission, and after every event with tokens"
    [(path, body)] = asked
    assert path == "/v1/chat/completions"
    assert body["stream"] and body["return_token_ids"] and body["anypool"] == {"trace": True}


async def test_a_prompt_is_a_completion():
    sent = event(choices=[{"text": "ab", "token_ids": [7], "finish_reason": "length"}])
    async with server(sent + DONE) as (session, url, asked):
        stream = await read_stream(session, url, {"model": "tiny", "prompt": [1]})
    assert (stream.text, stream.token_ids, stream.error) == ("ab", [7], None)
    assert asked[0][0] == "/v1/completions"


async def test_an_event_may_be_cut_anywhere():
    sent = chunk("é", [1]) + chunk("", [], "stop") + LAST + DONE
    for cut in range(0, len(sent), 7):
        async with server(sent[:cut] or b"\n", sent[cut:]) if cut else server(sent) as (session, url, _):
            stream = await read_stream(session, url, CHAT)
        assert (stream.text, stream.token_ids, stream.error) == ("é", [1], None)


@pytest.mark.parametrize(
    ("parts", "status", "error"),
    [
        ([chunk("a", [1])], 200, "the stream broke off"),
        ([chunk("a", [1]), DONE], 200, "the stream ended without a finish_reason"),
        ([chunk("a", [1]), event(error={"message": "no pool is left"})], 200, "error event: no pool is left"),
        ([b'{"error": "full"}'], 503, 'HTTP 503: {"error": "full"}'),
        ([b"data: {\n\n"], 200, "DecodeError"),
    ],
)
async def test_what_goes_wrong_is_told_and_what_came_is_kept(parts, status, error):
    async with server(*parts, status=status) as (session, url, _):
        stream = await read_stream(session, url, CHAT)
    assert error in stream.error
    assert stream.token_ids == ([1] if b"[1]" in parts[0] else [])


async def test_nobody_there():
    async with aiohttp.ClientSession() as session:
        stream = await read_stream(session, "http://127.0.0.1:9", CHAT)
    assert "ClientConnectorError" in stream.error


@pytest.mark.parametrize(
    ("count", "around"),
    [(0, (None, 1.0)), (1, (1.0, 2.0)), (2, (2.0, 2.0)), (3, (2.0, 3.0)), (4, (3.0, None)), (9, (None, None))],
)
def test_when_the_tokens_around_a_place_came(count, around):
    assert Stream(arrivals=[(1.0, 1), (2.0, 2), (3.0, 1)]).around(count) == around


def test_percentiles_are_in_milliseconds():
    assert percentiles([0.001, 0.002, 0.003]) == {"p50": 2.0, "p95": 2.9}
    assert percentiles([0.004], largest=True) == {"p50": 4.0, "p95": 4.0, "max": 4.0}
    assert percentiles([]) == {"p50": None, "p95": None}


def test_circumstances_say_where_when_and_with_what():
    found = circumstances("numpy")
    assert found["machine"]["cores"] >= 1
    assert {"python", "anypool", "jax", "jaxlib", "numpy"} == set(found["versions"])
    assert len(found["date"]) == len("2026-01-01")
