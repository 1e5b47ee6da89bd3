"""A stream loses its pool at every place and in every way; the client sees what it would have seen otherwise."""

import asyncio
import time
from contextlib import asynccontextmanager
from typing import Any

import pytest

from anypool.gateway import Settings
from tests.gateway.fake_worker import FakeWorker, Fault
from tests.gateway.serving import MODEL, TEXT, FakeManager, Gateway, content, gateway, tokens_of, without_names

TOKENS = tokens_of()
LENGTH = 40
SEED = 36  # the text then begins in ASCII and ends inside an emoji
CHAT = "/v1/chat/completions"
REQUEST: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": LENGTH,
    "temperature": 0.8,
    "seed": SEED,
    "stream_options": {"include_usage": True},
}
STALLING = Settings(heartbeat_limit_seconds=0.25, recovery_seconds=20.0)


@asynccontextmanager
async def pools(count: int, settings: Settings = Settings(), **attributes: Any):  # noqa: B008 -- frozen
    """A gateway over so many equal workers, each with the given attributes."""
    workers = [FakeWorker(TOKENS) for _ in range(count)]
    for worker in workers:
        await worker.start()
        for name, value in attributes.items():
            setattr(worker, name, value)
    try:
        async with gateway(workers, settings=settings) as client:
            yield client, workers
    finally:
        for worker in workers:
            await worker.__aexit__()


def first_of(client: Gateway, workers: list[FakeWorker]) -> FakeWorker:
    """The worker that the last answer began on."""
    return workers["abcdefgh".index(client.headers["x-anypool-pool"])]


async def unbroken(request: dict[str, Any] = REQUEST, **attributes: Any) -> list[Any]:
    async with pools(1, **attributes) as (client, _):
        return without_names(await client.stream(CHAT, request))


def put(workers: list[FakeWorker], *faults: Fault) -> None:
    """The faults happen in turn to the next requests, whichever worker gets them."""
    for worker in workers:
        worker.faults = workers[0].faults
    workers[0].faults.extend(faults)


@pytest.mark.parametrize("kind", ["close", "reset", "cut", "error", "garbage", "abort"])
async def test_a_loss_at_every_token_changes_no_frame(kind):
    expected = await unbroken()
    async with pools(2) as (client, workers):
        for after in range(LENGTH + 1):
            put(workers, Fault(kind, after))
            before = len(workers[0].requests) + len(workers[1].requests)
            assert without_names(await client.stream(CHAT, REQUEST)) == expected, f"{kind} after {after} tokens"
            attempts = len(workers[0].requests) + len(workers[1].requests) - before
            # After the last token nothing is left to replay.
            assert attempts == (2 if after < LENGTH else 1)


@pytest.mark.parametrize("after", [0, 1, LENGTH // 2, LENGTH - 1])
async def test_a_stall_is_noticed_and_changes_no_frame(after):
    expected = await unbroken()
    async with pools(2, STALLING) as (client, workers):
        put(workers, Fault("stall", after))
        frames = await client.stream(CHAT, {**REQUEST, "anypool": {"trace": True}})
        trace = frames[-2].pop("anypool")
        assert without_names(frames) == expected
        assert trace["failovers"][0]["reason"] == "stalled"


async def test_a_worker_that_is_slow_but_alive_keeps_its_stream():
    async with pools(2, STALLING) as (client, workers):
        put(workers, Fault("slow", after=3, beats=25, beat_seconds=0.02))  # twice the limit in heartbeats
        request = {**REQUEST, "max_tokens": 5, "anypool": {"trace": True}}
        trace = (await client.stream(CHAT, request))[-2]["anypool"]
        assert trace["failovers"] == []
        assert len(trace["pools"]) == 1


@pytest.mark.parametrize("per_event", [2, 7])
@pytest.mark.parametrize("separate_finish", [False, True])
async def test_text_is_the_same_however_workers_batch_their_tokens(per_event, separate_finish):
    expected = content(await unbroken())
    async with pools(2, per_event=per_event, separate_finish=separate_finish) as (client, workers):
        for after in range(0, LENGTH + 1, 3):
            put(workers, Fault("cut", after))
            frames = await client.stream(CHAT, REQUEST)
            assert content(frames) == expected
            assert frames[-2]["usage"]["completion_tokens"] == LENGTH
            assert [c["finish_reason"] for f in frames[:-1] for c in f["choices"]].count("length") == 1


async def test_lost_again_and_again_also_before_the_first_token():
    expected = await unbroken()
    async with pools(3) as (client, workers):
        put(
            workers,
            Fault("drop"), Fault("close", 0), Fault("fault"), Fault("reset", 0), Fault("close", 1), Fault("cut", 0),
            Fault("error", 3), Fault("close", 8), Fault("garbage", 1), Fault("busy"), Fault("close", 2),
        )  # fmt: skip
        frames = await client.stream(CHAT, {**REQUEST, "anypool": {"trace": True}})
        trace = frames[-2].pop("anypool")
        assert without_names(frames) == expected
        assert len(trace["failovers"]) == 10  # a busy worker is no loss
        assert [failover["emitted_tokens"] for failover in trace["failovers"]] == [0, 0, 0, 0, 1, 1, 4, 12, 13, 15]


async def test_the_replay_is_the_prompt_and_the_emitted_ids():
    async with pools(2) as (client, workers):
        put(workers, Fault("close", 6))
        await client.stream(CHAT, REQUEST)
        first = first_of(client, workers)
        second = workers[1] if first is workers[0] else workers[0]
        (sent,), (resent,) = first.requests, second.requests
        prompt = sent["prompt"]
        assert resent["prompt"] == prompt + first.expected(len(prompt), 6, seed=SEED)
        assert (sent["anypool"]["resumed"], resent["anypool"]["resumed"]) == (0, 6)
        assert (sent["max_tokens"], resent["max_tokens"]) == (LENGTH, LENGTH - 6)
        assert sent["seed"] == resent["seed"] == SEED
        assert sent["anypool"]["request_id"] != resent["anypool"]["request_id"]
        changed = {"prompt", "max_tokens", "anypool"}
        assert {k: v for k, v in sent.items() if k not in changed} == {
            k: v for k, v in resent.items() if k not in changed
        }


async def test_without_a_seed_both_attempts_get_the_same_one_and_requests_differ():
    request = {key: value for key, value in REQUEST.items() if key != "seed"}
    async with pools(2) as (client, workers):
        for _ in range(2):
            put(workers, Fault("close", 6))
            await client.stream(CHAT, request)
        seeds = [body["seed"] for worker in workers for body in worker.requests]
        assert sorted(seeds.count(seed) for seed in set(seeds)) == [2, 2]


async def test_lost_between_the_last_token_and_its_finish_reason():
    """The worker sent the id that ends the stream and then died: nothing must follow."""
    async with pools(2, separate_finish=True) as (client, workers):
        ids = workers[0].expected(await prompt_length(client), 10, seed=SEED)
        put(workers, Fault("close", ids.index(ids[-1]) + 1))
        before = sum(len(worker.requests) for worker in workers)
        frames = await client.stream(CHAT, {**REQUEST, "stop_token_ids": [ids[-1]]})
        assert sum(len(worker.requests) for worker in workers) == before + 1
        assert [c["finish_reason"] for f in frames[:-1] for c in f["choices"]][-1] == "stop"
        assert frames[-2]["usage"]["completion_tokens"] == ids.index(ids[-1]) + 1


async def prompt_length(client: Gateway) -> int:
    _, body = await client.post(CHAT, {**REQUEST, "stream_options": None, "max_tokens": 1})
    return int(body["usage"]["prompt_tokens"])


async def test_usage_is_counted_once():
    """Prompt tokens are the client's, and cached ones those that the first worker found."""
    async with pools(2) as (client, workers):
        workers[0].cached_tokens = workers[1].cached_tokens = 16
        put(workers, Fault("close", 6))
        first_usage = (await client.stream(CHAT, REQUEST))[-2]["usage"]
        assert first_usage == {
            "prompt_tokens": await prompt_length(client),
            "completion_tokens": LENGTH,
            "total_tokens": await prompt_length(client) + LENGTH,
            "prompt_tokens_details": {"cached_tokens": 16},
        }
        first = first_of(client, workers)
        other = workers[1] if first is workers[0] else workers[0]
        other.cached_tokens = 9999
        put(workers, Fault("close", 6))
        assert (await client.stream(CHAT, REQUEST))[-2]["usage"] == first_usage


async def test_cached_tokens_are_never_those_that_the_replay_found():
    """The first worker dies before it told; what the second finds cached may be the first one's own work."""
    async with pools(2, tells_cached_early=False, cached_tokens=9999) as (client, workers):
        put(workers, Fault("close", 6))
        usage = (await client.stream(CHAT, REQUEST))[-2]["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


async def test_a_stream_that_has_begun_goes_before_max_concurrency():
    expected = await unbroken()
    async with pools(2) as (client, workers):
        for pool in client.manager.pools.values():
            pool.max_concurrency = 1
        workers[0].faults.append(Fault("hold", 5))
        workers[1].faults.append(Fault("hold", 5))
        streams = [asyncio.create_task(client.stream(CHAT, REQUEST)) for _ in range(2)]
        await asyncio.gather(*[worker.holding.wait() for worker in workers])
        assert (await client.post(CHAT, {**REQUEST, "stream_options": None}))[0] == 503
        workers[0].kill()
        # Its stream comes to the end at the other pool, whose own stream is still held.
        await asyncio.wait(streams, return_when=asyncio.FIRST_COMPLETED)
        assert not workers[1].release.is_set()
        workers[1].release.set()
        assert [without_names(frames) for frames in await asyncio.gather(*streams)] == [expected] * 2


async def test_the_trace_tells_what_the_loss_cost():
    async with pools(2) as (client, workers):
        put(workers, Fault("close", 6))
        before = time.monotonic()
        _, body = await client.post(CHAT, {**REQUEST, "stream_options": None, "anypool": {"trace": True}})
        trace, after = body["anypool"], time.monotonic()
        (failover,) = trace["failovers"]
        assert trace["pools"] == [failover["from"], failover["to"]]
        assert set(trace["pools"]) == {"a", "b"}
        assert (failover["reason"], failover["emitted_tokens"], failover["choice"]) == ("closed", 6, 0)
        assert before < failover["last_token_at"] <= failover["detected_at"] <= failover["first_token_at"] < after
        # The fake says: 0.5 s in its queue and 0.25 s of prefill since the request was sent to it.
        assert failover["detected_at"] + 0.75 <= failover["prefill_done_at"] <= failover["first_token_at"] + 0.75


async def test_losses_are_counted_by_reason():
    async with pools(2) as (client, workers):
        put(workers, Fault("close", 6), Fault("error", 3), Fault("close", 2))
        await client.stream(CHAT, REQUEST)
        metrics = (await client.get("/metrics"))[1].splitlines()
        assert 'anypool:failovers_total{model_name="tiny",reason="closed"} 2.0' in metrics
        assert 'anypool:failovers_total{model_name="tiny",reason="error"} 1.0' in metrics


@pytest.mark.parametrize("endpoint", ["chat", "completion"])
async def test_choices_and_logprobs_survive_a_loss(endpoint):
    path = CHAT if endpoint == "chat" else "/v1/completions"
    ask = {"logprobs": True, "top_logprobs": 2} if endpoint == "chat" else {"logprobs": 2}
    base: dict[str, Any] = {"model": MODEL, "max_tokens": 20, "seed": 5, "n": 3, "return_token_ids": True, **ask}
    base |= {"messages": REQUEST["messages"]} if endpoint == "chat" else {"prompt": "hello"}
    async with pools(1) as (client, _):
        status, expected = await client.post(path, base)
        assert status == 200
    async with pools(2) as (client, workers):
        put(workers, Fault("close", 4), Fault("cut", 9), Fault("reset", 1), Fault("error", 7))
        _, body = await client.post(path, base)
        assert without_names([body]) == without_names([expected])


async def test_a_stop_string_may_span_the_loss():
    text = content(await unbroken())
    start = text.index("rld")
    request = {**REQUEST, "stop": ["rld, "]}
    assert "rld, " in text
    expected = await unbroken(request)
    assert content(expected) == text[:start]
    async with pools(2) as (client, workers):
        for after in range(LENGTH):
            put(workers, Fault("close", after))
            assert without_names(await client.stream(CHAT, request)) == expected
            workers[0].faults.clear()


# ---- the pool manager's word


async def test_a_pool_that_the_manager_calls_down_loses_its_streams_at_once():
    """The connection is silent and the heartbeat limit far away: only the manager can know."""
    expected = await unbroken()
    async with pools(2, Settings(heartbeat_limit_seconds=3600.0)) as (client, workers):
        put(workers, Fault("stall", 5))
        streaming = asyncio.create_task(client.stream(CHAT, REQUEST))
        holding = [asyncio.create_task(worker.holding.wait()) for worker in workers]
        await asyncio.wait(holding, return_when=asyncio.FIRST_COMPLETED)
        name = "ab"[[worker.holding.is_set() for worker in workers].index(True)]
        client.manager.pools[name].update(state="down", url=None, pid=None)
        assert without_names(await streaming) == expected
        for task in holding:
            task.cancel()


async def test_a_draining_pool_finishes_its_streams_and_gets_no_new_ones():
    async with pools(2) as (client, workers):
        put(workers, Fault("hold", 5))
        streaming = asyncio.create_task(client.stream(CHAT, {**REQUEST, "anypool": {"trace": True}}))
        holding = [asyncio.create_task(worker.holding.wait()) for worker in workers]
        await asyncio.wait(holding, return_when=asyncio.FIRST_COMPLETED)
        name = "ab"[[worker.holding.is_set() for worker in workers].index(True)]
        client.manager.pools[name].update(state="draining")
        await client.post(CHAT, {**REQUEST, "stream_options": None})
        assert client.headers["x-anypool-pool"] != name
        for worker in workers:
            worker.release.set()
        trace = (await streaming)[-2]["anypool"]
        assert (trace["pools"], trace["failovers"]) == ([name], [])
        for task in holding:
            task.cancel()


async def test_the_only_pool_comes_back_restarted():
    """The worker dies for good; its successor has another port and process."""
    expected = await unbroken()
    async with FakeWorker(TOKENS) as old, FakeWorker(TOKENS) as new:
        manager = FakeManager()
        pool = manager.add("a", old)
        async with gateway([old], manager=manager) as client:
            old.faults.append(Fault("hold", 7))
            streaming = asyncio.create_task(client.stream(CHAT, REQUEST))
            await old.holding.wait()
            old.kill()
            pool.update(state="down", url=None, pid=None)
            await client.usable(0)
            # A new request is refused meanwhile; the one that has begun waits.
            status, body = await client.post(CHAT, {**REQUEST, "stream_options": None})
            assert (status, body["error"]["code"]) == (503, "no_pool")
            assert client.headers["retry-after"] == "1"
            pool.update(state="starting")
            pool.update(state="ready", url=new.url, pid=new.port)
            assert without_names(await streaming) == expected


async def test_a_cut_connection_to_the_only_pool_is_made_again():
    expected = await unbroken()
    async with pools(1) as (client, workers):
        put(workers, Fault("cut", 7), Fault("reset", 3))
        assert without_names(await client.stream(CHAT, REQUEST)) == expected


async def test_without_any_pool_left_the_stream_ends_with_an_error_event():
    async with pools(1, Settings(recovery_seconds=0.2)) as (client, workers):
        workers[0].faults.append(Fault("hold", 7))
        streaming = asyncio.create_task(client.stream(CHAT, REQUEST))
        await workers[0].holding.wait()
        workers[0].kill()
        frames = await streaming
        assert frames[-1] == {
            "error": {
                "message": "No pool is left that could go on with this request.",
                "type": "server_error",
                "param": None,
                "code": "no_pool_left",
            }
        }
        assert content(frames[:-1]) == content(await unbroken({**REQUEST, "max_tokens": 7})).removesuffix("\ufffd")


async def test_a_request_that_kills_every_worker_is_given_up():
    async with pools(2, Settings(losses_without_progress=3)) as (client, workers):
        put(workers, Fault("close", 2), *[Fault("close", 0)] * 10)
        frames = await client.stream(CHAT, REQUEST)
        assert frames[-1]["error"]["message"] == "The request was lost by 3 workers in a row without a new token."
        assert sum(len(worker.requests) for worker in workers) == 3


async def test_a_full_queue_everywhere_is_503_with_the_workers_own_retry_after():
    async with pools(2) as (client, workers):
        put(workers, Fault("busy"), Fault("busy"))
        status, body = await client.post(CHAT, {**REQUEST, "stream_options": None})
        assert (status, body["error"]["code"], client.headers["retry-after"]) == (503, "queue_full", "7")
        # Also for a stream, whose status is not sent before a worker has admitted it.
        put(workers, Fault("busy"), Fault("busy"))
        assert (await client.post(CHAT, {**REQUEST, "stream": True}))[0] == 503
        put(workers, Fault("busy"))
        assert (await client.post(CHAT, {**REQUEST, "stream_options": None}))[0] == 200


async def test_what_a_worker_refuses_is_the_clients_error():
    async with pools(2) as (client, workers):
        put(workers, Fault("bad"))
        status, body = await client.post(CHAT, {**REQUEST, "stream_options": None})
        assert (status, body["error"]["message"], body["error"]["param"]) == (400, "no such thing", "seed")


# ---- the client goes away


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_cancels_the_work(stream, n):
    async with pools(1) as (client, workers):
        put(workers, *[Fault("hold", 5)] * n)
        body: dict[str, Any] = {**REQUEST, "n": n, "stream": stream}
        body |= {} if stream else {"stream_options": None}
        posting = asyncio.create_task(client.post(CHAT, body))
        await workers[0].holding.wait()
        posting.cancel()
        await workers[0].client_left.wait()
        await client.until(lambda pools: pools["a"]["in_flight"] == 0)


async def test_a_stop_string_cancels_the_rest():
    async with pools(1) as (client, workers):
        put(workers, Fault("hold", 20))
        text = content(await unbroken({**REQUEST, "max_tokens": 15}))
        frames = await client.stream(CHAT, {**REQUEST, "stop": [text[5:8]]})
        assert frames[-3]["choices"][0]["finish_reason"] == "stop"
        await workers[0].client_left.wait()


async def test_text_of_the_fixture_is_worth_the_trouble():
    """The stream crosses characters of one to four bytes, so that a loss may fall inside one."""
    shown = content(await unbroken())
    assert {len(character.encode()) for character in shown} == {1, 2, 3, 4}
    assert any(character in TEXT for character in shown)
