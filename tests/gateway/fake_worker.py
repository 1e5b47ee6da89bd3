"""A worker that speaks the worker API from a script, and can be told to go wrong in every way.

Its tokens are keyed by (seed, absolute position) as a real worker's are, so a continuation that was replayed wrongly
shows in the output.
"""

import asyncio
import json
import socket
import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

Kind = Literal[
    "drop", "close", "reset", "cut", "stall", "error", "garbage", "abort", "busy", "bad", "fault", "hold", "slow"
]


@dataclass
class Fault:
    """How the next request goes wrong.

    drop: no answer at all. close, reset, cut: after `after` tokens the connection is closed, reset, or closed in the
    middle of an event. stall: silence. error, garbage, abort: an event that says so, is no JSON, or ends the request
    without a proper reason. busy, bad, fault: status 503, 400, 500. hold: alive, but no token until `release` is set.
    slow: alive for `beats` heartbeats before each further token.
    """

    kind: Kind
    after: int = 0
    beats: int = 0
    beat_seconds: float = 0.02


class _Ended(Exception):
    """The fault ended the connection."""


class FakeWorker:
    """`tokens` is what it says, over and over, from an offset that depends on the seed."""

    def __init__(self, tokens: Sequence[int], *, max_model_len: int = 512, eos_ids: Sequence[int] = ()):
        self.tokens = list(tokens)
        self.max_model_len = max_model_len
        self.eos_ids = frozenset(eos_ids)
        self.faults: deque[Fault] = deque()
        self.requests: list[dict[str, Any]] = []
        self.authorizations: list[str] = []
        self.per_event = 1
        self.separate_finish = False
        self.cached_tokens = 0
        self.tells_cached_early = True
        self.holding = asyncio.Event()
        self.release = asyncio.Event()
        self.client_left = asyncio.Event()
        self.blocks: list[str] = []
        self.block_events: list[asyncio.Queue[dict[str, Any] | None]] = []
        self.following = asyncio.Event()
        self.port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.kill()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def kill(self) -> None:
        """What the other side sees of SIGKILL: every connection closes, and no new one is accepted."""
        if self._server is not None:
            self._server.close()
        self.release.set()
        for queue in self.block_events:
            queue.put_nowait(None)
        for writer in list(self._writers):
            writer.transport.abort()

    def expected(self, prompt_tokens: int, count: int, seed: int = 0) -> list[int]:
        """The ids of an unbroken run."""
        return [self._token(seed, prompt_tokens + index) for index in range(count)]

    def _token(self, seed: int, position: int) -> int:
        return self.tokens[(position + seed % 1000) % len(self.tokens)]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                lengths = [int(line.split(":")[1]) for line in head if line.lower().startswith("content-length")]
                self.authorizations += [
                    line.split(": ")[1] for line in head if line.lower().startswith("authorization")
                ]
                body = await reader.readexactly(lengths[0] if lengths else 0)
                await self._answer(head[0].split(" ")[1], body, reader, writer)
        except (_Ended, asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, path: str, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if path == "/health":
            _whole(writer, 200, {"status": "ready", "max_model_len": self.max_model_len, "block_size": 16})
        elif path == "/v1/models":
            _whole(writer, 200, {"data": [{"id": "foreign", "max_model_len": self.max_model_len}]})
        elif path == "/events":
            await self._tell_blocks(writer)
        else:
            await self._complete(json.loads(body), reader, writer)
        await writer.drain()

    async def _tell_blocks(self, writer: asyncio.StreamWriter) -> None:
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.block_events.append(queue)
        _start(writer)
        _event(writer, {"reset": True, "stored": self.blocks})
        self.following.set()
        while (event := await queue.get()) is not None:
            _event(writer, event)
            await writer.drain()
        raise _Ended

    async def _complete(self, body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.requests.append(body)
        fault = self.faults.popleft() if self.faults else None
        match fault and fault.kind:
            case "drop":
                raise _Ended
            case "busy":
                return _whole(writer, 503, _error("queue full"), "retry-after: 7\r\n")
            case "bad":
                return _whole(writer, 400, _error("no such thing", "invalid_request_error", "seed"))
            case "fault":
                return _whole(writer, 500, _error("it broke"))
        _start(writer)
        left = asyncio.create_task(self._notice_leaving(reader))
        try:
            await self._generate(body, fault, writer)
        except ConnectionError:
            self.client_left.set()
            raise
        finally:
            left.cancel()
            await asyncio.gather(left, return_exceptions=True)
        return None

    async def _notice_leaving(self, reader: asyncio.StreamReader) -> None:
        if not await reader.read(1):
            self.client_left.set()

    async def _generate(self, body: dict[str, Any], fault: Fault | None, writer: asyncio.StreamWriter) -> None:
        prompt, count = len(body["prompt"]), body["max_tokens"]
        seed = body["seed"] if body["temperature"] else 0
        ends = frozenset(body["stop_token_ids"]) | (frozenset() if body["ignore_eos"] else self.eos_ids)
        sent, finish = 0, None
        while finish is None:
            if fault is not None and sent >= fault.after:
                await self._go_wrong(fault, sent, writer)
            ids: list[int] = []
            while len(ids) < self.per_event and finish is None:
                ids.append(self._token(seed, prompt + sent))
                sent += 1
                finish = "stop" if ids[-1] in ends else "length" if sent == count else None
                if fault is not None and sent == fault.after:
                    break
            early = self.tells_cached_early and sent == len(ids)
            _event(writer, self._chunk(body, ids, None if self.separate_finish else finish, early))
            await writer.drain()
            await asyncio.sleep(0)
        if fault is not None and fault.after == sent:
            await self._go_wrong(fault, sent, writer)
        if self.separate_finish:
            _event(writer, self._chunk(body, [], finish, False))
        _chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")

    def _chunk(self, body: dict[str, Any], ids: list[int], finish: str | None, early: bool) -> dict[str, Any]:
        logprobs = None
        if body.get("logprobs") is not None:
            logprobs = {
                "token_logprobs": [-token / 100 for token in ids],
                "top_logprobs": [[[token, -token / 100]] * body["logprobs"] for token in ids],
            }
        choice = {"index": 0, "text": "", "token_ids": ids, "logprobs": logprobs, "finish_reason": finish}
        event: dict[str, Any] = {"id": "x", "object": "text_completion", "model": "m", "choices": [choice]}
        if early or finish is not None:
            event["usage"] = {"prompt_tokens_details": {"cached_tokens": self.cached_tokens}}
            event["anypool"] = {"timing": {"queue_seconds": 0.5, "prefill_seconds": 0.25}}
        return event

    async def _go_wrong(self, fault: Fault, sent: int, writer: asyncio.StreamWriter) -> None:
        await writer.drain()
        # Both ends run in one event loop: a few turns of it, and the gateway has read what was sent.
        for _ in range(20):
            await asyncio.sleep(0)
        match fault.kind:
            case "close":
                raise _Ended
            case "reset":
                sock: socket.socket = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
                raise _Ended
            case "cut":
                whole = b'data: {"choices":[{"index":0,"text":"","token_ids":[65],"finish_reason":null}]}\n\n'
                writer.write(b"%x\r\n%s" % (len(whole), whole[: 20 + sent % 60]))
                await writer.drain()
                raise _Ended
            case "stall":
                self.holding.set()
                await self.release.wait()
                raise _Ended
            case "error":
                _event(writer, _error("out of memory"))
            case "garbage":
                _chunk(writer, b"data: {not json\n\n")
            case "abort":
                _event(writer, {"choices": [{"index": 0, "token_ids": [], "finish_reason": "cancelled"}]})
            case "hold":
                self.holding.set()
                while not self.release.is_set():
                    _chunk(writer, b": alive\n\n")
                    await writer.drain()
                    await asyncio.sleep(fault.beat_seconds)
                return
            case "slow":
                for _ in range(fault.beats):
                    _chunk(writer, b": alive\n\n")
                    await writer.drain()
                    await asyncio.sleep(fault.beat_seconds)
                return
        await writer.drain()
        raise _Ended


def _error(message: str, kind: str = "server_error", param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def _whole(writer: asyncio.StreamWriter, status: int, content: dict[str, Any], headers: str = "") -> None:
    body = json.dumps(content).encode()
    writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n{headers}\r\n".encode() + body)


def _start(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))


def _event(writer: asyncio.StreamWriter, content: dict[str, Any]) -> None:
    _chunk(writer, b"data: " + json.dumps(content).encode() + b"\n\n")
