"""A stream as its client sees it: what came, when, and how it ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import aiohttp
import msgspec

SILENCE_LIMIT_SECONDS = 300.0
"""After so long without a byte a stream is given up, as an error."""


@dataclass
class Stream:
    """One answer. Times are `time.monotonic()` seconds, comparable with those of other processes of this machine.

    pool: the first to serve it. arrivals: for every event with tokens when it was read and how many tokens it had.
    trace: the gateway's account of the pools used and of every fail-over. error: why it did not end as it should.
    """

    sent_at: float = 0.0
    pool: str = ""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    trace: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def first_token_at(self) -> float:
        return self.arrivals[0][0]

    @property
    def last_token_at(self) -> float:
        return self.arrivals[-1][0]

    def around(self, count: int) -> tuple[float | None, float | None]:
        """When its `count`-th token came and when the next one did; None for one that does not exist."""
        totals = list(accumulate(tokens for _, tokens in self.arrivals))
        before = next((at for (at, _), total in zip(self.arrivals, totals, strict=True) if total >= count > 0), None)
        after = next((at for (at, _), total in zip(self.arrivals, totals, strict=True) if total > count), None)
        return before, after


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    token_ids: list[int] = []
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: dict[str, Any] | None = None
    anypool: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


_decode = msgspec.json.Decoder(_Event).decode


async def read_stream(
    session: aiohttp.ClientSession,
    url: str,
    body: dict[str, Any],
    on_news: Callable[[Stream], None] = lambda _: None,
) -> Stream:
    """Posts a request and reads its stream to the end. Never raises for what the server does: see `Stream.error`.

    body: a chat if it has `messages`, else a completion; what makes it a stream that tells ids, usage and trace is
    added. on_news: called when the request was admitted, and after every event with tokens.
    """
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    asked = body | {
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "anypool": {"trace": True},
    }
    timeout = aiohttp.ClientTimeout(total=None, sock_read=SILENCE_LIMIT_SECONDS)
    stream = Stream(sent_at=time.monotonic())
    try:
        async with session.post(
            url + path,
            data=msgspec.json.encode(asked),
            headers={"content-type": "application/json"},
            timeout=timeout,
        ) as response:
            if response.status != 200:
                stream.error = f"HTTP {response.status}: {(await response.text())[:500]}"
                return stream
            stream.pool = response.headers.get("x-anypool-pool", "")
            on_news(stream)
            await _read(response, stream, on_news)
    except TimeoutError:
        stream.error = f"no byte for {SILENCE_LIMIT_SECONDS:g} s"
    except (aiohttp.ClientError, OSError, msgspec.DecodeError) as error:
        stream.error = f"{type(error).__name__}: {error}"
    return stream


async def _read(response: aiohttp.ClientResponse, stream: Stream, on_news: Callable[[Stream], None]) -> None:
    rest, ended = b"", False
    while data := await response.content.readany():
        now = time.monotonic()
        *events, rest = (rest + data).split(b"\n\n")
        for event in events:
            payload = event.removeprefix(b"data: ")
            if payload == b"[DONE]":
                ended = True
            elif _take(_decode(payload), stream, now):
                on_news(stream)
    if stream.error is None and not (ended and stream.finish_reason):
        stream.error = "the stream broke off" if not ended else "the stream ended without a finish_reason"


def _take(event: _Event, stream: Stream, now: float) -> bool:
    """Adds one event; whether it brought tokens."""
    if event.error is not None:
        stream.error = f"error event: {event.error.get('message')}"
    stream.usage = event.usage or stream.usage
    stream.trace = event.anypool or stream.trace
    count = 0
    for choice in event.choices:
        stream.text += choice.text or (choice.delta.content if choice.delta else None) or ""
        stream.token_ids += choice.token_ids
        stream.finish_reason = choice.finish_reason or stream.finish_reason
        count += len(choice.token_ids)
    if count:
        stream.arrivals.append((now, count))
    return count > 0
