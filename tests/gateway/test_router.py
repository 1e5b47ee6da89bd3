"""Which pool a prompt goes to: the least to compute, within limits, and the same one every time."""

import asyncio
from typing import Any

import pytest

from anypool.engine.prefix import block_hashes
from anypool.gateway import Settings
from anypool.gateway.pool_view import PoolView, PoolViews
from anypool.gateway.prefix_index import PrefixIndex
from anypool.gateway.request import Prompt
from anypool.gateway.router import STREAM_COST_TOKENS, Router
from anypool.gateway.worker_client import WorkerClient
from tests.gateway.fake_worker import FakeWorker, Fault
from tests.gateway.serving import MODEL, FakeManager, gateway, tokens_of

LONG = list(range(200))


def prompt(token_ids: list[int] = LONG) -> Prompt:
    return Prompt(token_ids, 16, block_hashes(token_ids, ""))


def views(**pools: dict[str, Any]) -> tuple[PoolViews, dict[str, PoolView]]:
    """Usable pools with the given fields; `in_flight`, `held` (tokens of LONG in its cache) are the gateway's own."""
    manager = FakeManager()
    own = {name: (fields.pop("in_flight", 0), fields.pop("held", 0)) for name, fields in pools.items()}
    for name, fields in pools.items():
        manager.add(name, None, **{"state": "ready", "url": f"http://{name}", **fields})
    found = PoolViews(manager, WorkerClient(1.0, 1.0), Settings())
    by_name = {view.name: view for view in found.pools}
    for name, (in_flight, held) in own.items():
        by_name[name].described = True
        by_name[name].in_flight = in_flight
        by_name[name].index._hashes = set(block_hashes(LONG[:held], ""))
    return found, by_name


def chosen(found: PoolViews, wanted: Prompt | None = None, **options: Any) -> str | None:
    pool = Router(found).choose(wanted or prompt(), **options).pool
    return None if pool is None else pool.name


def test_the_pool_that_holds_more_of_the_prompt_wins():
    found, by_name = views(a={"held": 32}, b={"held": 96}, c={"held": 64})
    assert chosen(found) == "b"
    by_name["a"].index._hashes = set(block_hashes(LONG, ""))
    assert chosen(found) == "a"


def test_blocks_count_from_the_start_of_the_prompt_only():
    found, by_name = views(a={}, b={"held": 16})
    by_name["a"].index._hashes = set(block_hashes(LONG, "")[1:])  # all but the first
    assert chosen(found) == "b"


def test_another_salt_holds_nothing():
    found, _ = views(a={"held": 192, "in_flight": 1}, b={})
    assert chosen(found) == "a"
    assert chosen(found, Prompt(LONG, 16, block_hashes(LONG, "tenant"))) == "b"


def test_load_outweighs_a_short_prefix_and_not_a_long_one():
    long = list(range(4 * STREAM_COST_TOKENS))
    found, by_name = views(a={"in_flight": 2}, b={})
    by_name["a"].index._hashes = set(block_hashes(long[:STREAM_COST_TOKENS], ""))
    assert chosen(found, prompt(long)) == "b"
    by_name["a"].index._hashes = set(block_hashes(long[: 3 * STREAM_COST_TOKENS], ""))
    assert chosen(found, prompt(long)) == "a"


def test_equal_pools_are_told_apart_by_the_prompt_always_alike():
    found, _ = views(a={}, b={}, c={})
    prompts = [prompt([number, *LONG]) for number in range(60)] + [prompt([number]) for number in range(60)]
    first = [chosen(found, item) for item in prompts]
    assert first == [chosen(found, item) for item in prompts]
    assert set(first) == {"a", "b", "c"}
    # When a pool goes, only its own prompts move.
    without_c, _ = views(a={}, b={}, c={"state": "down"})
    then = [chosen(without_c, item) for item in prompts]
    assert {old for old, new in zip(first, then, strict=True) if old != new} == {"c"}


@pytest.mark.parametrize("state", ["starting", "draining", "down", "failed"])
def test_only_ready_pools_get_streams(state):
    found, _ = views(a={"state": state, "held": 192}, b={})
    assert chosen(found) == "b"
    assert chosen(views(a={"state": state})[0]) is None
    assert not Router(views(a={"state": state})[0]).choose(prompt()).any_usable


def test_a_pool_takes_no_more_than_max_concurrency_but_for_streams_that_have_begun():
    found, _ = views(a={"max_concurrency": 2, "in_flight": 2, "held": 192}, b={"in_flight": 5})
    assert chosen(found) == "b"
    found, _ = views(a={"max_concurrency": 2, "in_flight": 2})
    assert chosen(found) is None
    assert Router(found).choose(prompt()).any_usable
    assert chosen(found, resumed=True) == "a"


def test_backup_pools_serve_only_when_no_other_can():
    found, by_name = views(a={"roles": ("backup",), "held": 192}, b={"in_flight": 5})
    assert chosen(found) == "b"
    by_name["b"].pool.update(state="down")
    assert chosen(found) == "a"


def test_a_suspect_is_the_last_resort():
    found, by_name = views(a={"held": 192}, b={"in_flight": 5})
    by_name["a"].suspect_until = float("inf")
    assert chosen(found) == "b"
    assert chosen(found, avoid={("b", 0)}) == "a"
    assert chosen(found, avoid={("a", 0), ("b", 0)}) is None


def test_foreign_engines_are_left_out_of_what_they_cannot_do():
    found, _ = views(a={"launcher": "external"}, b={"in_flight": 9})
    assert chosen(found) == "a"
    assert chosen(found, workers_only=True) == "b"


# ---- block events


def test_an_index_follows_events() -> None:
    hashes = block_hashes(LONG, "")
    names = [item.hex() for item in hashes]
    index = PrefixIndex()

    def apply(text: str) -> int:
        index.apply(text.encode())
        return index.matched(hashes)

    assert apply(f'{{"reset": true, "stored": ["{names[0]}", "{names[1]}"]}}') == 2
    assert apply(f'{{"stored": ["{names[2]}"], "evicted": []}}') == 3
    assert apply(f'{{"stored": [], "evicted": ["{names[1]}"]}}') == 1
    assert apply(f'{{"reset": true, "stored": ["{names[0]}"]}}') == 1
    assert len(index) == 1
    index.clear()
    assert index.matched(hashes) == 0


async def test_prompts_follow_the_blocks_that_workers_report():
    """Also after the worker is replaced, whose cache is empty."""
    async with FakeWorker(tokens_of()) as a, FakeWorker(tokens_of()) as b, FakeWorker(tokens_of()) as c:
        manager = FakeManager()
        manager.add("a", a)
        manager.add("b", b)
        async with gateway([], manager=manager) as client:
            await asyncio.gather(a.following.wait(), b.following.wait())
            request = {"model": MODEL, "prompt": [token % 256 for token in LONG], "max_tokens": 1}
            _, _ = await client.post("/v1/completions", request)
            usual = client.headers["x-anypool-pool"]
            holder = {"a": "b", "b": "a"}[usual]
            worker = {"a": a, "b": b}[holder]
            hashes = [item.hex() for item in block_hashes([token % 256 for token in LONG], "")]

            async def cached(count: int) -> None:
                await client.until(lambda pools: pools[holder]["cached_blocks"] == count)

            worker.block_events[0].put_nowait({"stored": hashes, "evicted": []})
            await cached(len(hashes))
            await client.post("/v1/completions", request)
            assert client.headers["x-anypool-pool"] == holder
            worker.block_events[0].put_nowait({"stored": [], "evicted": hashes})
            await cached(0)
            await client.post("/v1/completions", request)
            assert client.headers["x-anypool-pool"] == usual
            # The connection for events breaks and is made again.
            worker.blocks = hashes
            worker.block_events[0].put_nowait(None)
            await cached(len(hashes))
            manager.pools[holder].update(state="down", url=None, pid=None)
            manager.pools[holder].update(state="ready", url=c.url, pid=c.port)
            await cached(0)
            await c.following.wait()


async def test_max_concurrency_is_kept_and_freed():
    async with FakeWorker(tokens_of()) as worker:
        manager = FakeManager()
        manager.add("a", worker, max_concurrency=1)
        worker.faults.append(Fault("hold", 2))
        async with gateway([], manager=manager) as client:
            request = {"model": MODEL, "prompt": "a", "max_tokens": 4}
            streaming = asyncio.create_task(client.stream("/v1/completions", request))
            await worker.holding.wait()
            status, body = await client.post("/v1/completions", request)
            assert (status, body["error"]["code"]) == (503, "queue_full")
            worker.release.set()
            await streaming
            assert (await client.post("/v1/completions", request))[0] == 200


async def test_a_foreign_engine_gets_plain_openai_and_its_key():
    async with FakeWorker(tokens_of()) as worker:
        manager = FakeManager()
        manager.add("a", worker, launcher="external", model="foreign", api_key="sk-1")
        async with gateway([], manager=manager) as client:
            request = {"model": MODEL, "prompt": "a", "max_tokens": 4}
            assert (await client.post("/v1/completions", request))[0] == 200
            (sent,) = worker.requests
            assert sent["model"] == "foreign"
            assert sent["return_token_ids"] is True
            assert not {"anypool", "cache_salt", "priority", "logprobs"} & set(sent)
            assert worker.authorizations[-1] == "Bearer sk-1"
            # Log-probabilities by token id are not in OpenAI's form.
            status, body = await client.post("/v1/completions", {**request, "logprobs": 1})
            assert (status, body["error"]["code"]) == (503, "no_pool")
