"""What a worker sends, however the network cuts it."""

from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anypool.gateway.text import TokenBatch
from anypool.gateway.worker_client import WorkerLost, WorkerStream

GOOD = b'data: {"choices":[{"index":0,"text":"","token_ids":[%d],"logprobs":null,"finish_reason":null}]}\n\n'
LAST = (
    b'data: {"choices":[{"token_ids":[9],"logprobs":{"token_logprobs":[-0.5],"top_logprobs":[[[9,-0.5],[3,-2]]]},'
    b'"finish_reason":"stop"}],"usage":{"prompt_tokens_details":{"cached_tokens":32}},'
    b'"anypool":{"timing":{"queue_seconds":0.25,"prefill_seconds":0.5,"decode_seconds":1.0}}}\n\n'
)


class _Response:
    """An answer whose body arrives in the given pieces; an exception in their place is raised."""

    def __init__(self, pieces: list[bytes | Exception]):
        self.content = self
        self._pieces = pieces

    async def readany(self) -> bytes:
        piece = self._pieces.pop(0) if self._pieces else b""
        if isinstance(piece, Exception):
            raise piece
        return piece


def stream(*pieces: bytes | Exception) -> WorkerStream:
    response: Any = _Response(list(pieces))
    return WorkerStream(response)


@given(st.data())
async def test_events_are_the_same_however_their_bytes_are_cut(data):
    body = b": alive\n\n" + GOOD % 1 + GOOD % 2 + b": alive\n\n" + LAST + b"data: [DONE]\n\n"
    places = sorted(data.draw(st.sets(st.integers(1, len(body) - 1), max_size=8)))
    reader = stream(*[body[a:b] for a, b in zip([0, *places], [*places, len(body)], strict=True)])
    batches: list[TokenBatch] = []
    finished = False
    while not finished:
        events = await reader.read()
        batches += events.batches
        finished = events.finished
    assert batches == [
        TokenBatch([1]),
        TokenBatch([2]),
        TokenBatch([9], [-0.5], [[(9, -0.5), (3, -2.0)]], "stop"),
    ]
    assert events.cached_tokens == 32
    assert events.timing is not None
    assert (events.timing.queue_seconds, events.timing.prefill_seconds) == (0.25, 0.5)


async def test_tokens_before_a_failure_in_the_same_read_count():
    reader = stream(GOOD % 1 + b'data: {"error": {"message": "out of memory"}}\n\n')
    assert (await reader.read()).batches == [TokenBatch([1])]
    with pytest.raises(WorkerLost, match="out of memory") as caught:
        await reader.read()
    assert caught.value.reason == "error"


@pytest.mark.parametrize(
    ("piece", "reason"),
    [
        (b"", "closed"),
        (aiohttp.ClientPayloadError("cut"), "closed"),
        (ConnectionResetError(), "closed"),
        (aiohttp.SocketTimeoutError(), "stalled"),
        (b'data: {"error": {}}\n\n', "error"),
        (b"data: {\n\n", "error"),
        (b'data: {"choices": [{"token_ids": ["x"]}]}\n\n', "error"),
        (b'data: {"choices": [{"text": "no ids"}]}\n\n', "error"),
        (b'data: {"choices": [{"token_ids": [], "finish_reason": "abort"}]}\n\n', "error"),
    ],
)
async def test_every_way_to_be_lost_has_its_reason(piece, reason):
    with pytest.raises(WorkerLost) as caught:
        await stream(piece).read()
    assert caught.value.reason == reason
