"""How answers leave: as one body or as server-sent events, and what happens when the client goes away first."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from anypool.gateway.errors import ApiError, body_too_large, internal
from anypool.gateway.generation import Generation
from anypool.gateway.openai_output import Answer, Writer

log = logging.getLogger(__name__)

T = TypeVar("T")


async def read_body(request: Request, limit: int) -> bytes:
    """The request's body. Raises ApiError (413) as soon as it is known to be longer than `limit` bytes."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise body_too_large(limit)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise body_too_large(limit)
    return bytes(body)


async def until_client_leaves(receive: Receive, work: Awaitable[T]) -> T | None:
    """The result of `work`, or None if the client closed the connection first; `work` is then cancelled."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_client_left(receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for pending in (task, leaving):
            pending.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _client_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def collect(generation: Generation, writer: Writer) -> bytes:
    """Run a generation to its end and write the body. Raises ApiError."""
    request = generation.request
    answers = [Answer() for _ in range(len(request.prompts) * request.n)]
    async with generation, aclosing(generation.batches()) as batches:
        async for together in batches:
            for item in together:
                answers[item.choice].add(item.batch)
        return writer.body(answers, generation)


async def events(generation: Generation, writer: Writer) -> AsyncGenerator[bytes]:
    """The server-sent events of a generation that was admitted, those that are ready together joined.

    An error ends the stream with an event in OpenAI's error shape, after which nothing follows.
    """
    try:
        if opening := writer.opening_events():
            yield opening
        async with aclosing(generation.batches()) as batches:
            async for together in batches:
                if data := b"".join([writer.batch_event(item.choice, item.batch) for item in together]):
                    yield data
        yield writer.closing_events(generation)
    except ApiError as error:
        yield error.encode_event()
    except Exception:
        log.exception("request %s failed in mid-stream", generation.request.id)
        yield internal().encode_event()


class EventStream(Response):
    """A response of server-sent events. Whatever ends it, `generation` is left, which cancels the workers' part.

    Starlette's own streaming response notices a client that left only when it sends to it, and a worker that computes
    for nobody should stop at once.
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, writer: Writer, headers: dict[str, str]):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]
        self._generation = generation
        self._writer = writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_client_leaves(receive, self._send(send))
        finally:
            await self._generation.__aexit__(None, None, None)

    async def _send(self, send: Send) -> None:
        start: dict[str, Any] = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async with aclosing(events(self._generation, self._writer)) as chunks:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
