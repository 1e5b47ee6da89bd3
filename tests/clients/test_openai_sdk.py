"""The openai SDK against the served application, as users call it."""

import asyncio
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.gateway.fake_worker import FakeWorker, Fault
from tests.gateway.serving import MODEL, FakeManager, gateway, tokens_of

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
SEED = 28  # the text of these prompts then begins in ASCII


@pytest.fixture
async def worker():
    async with FakeWorker(tokens_of(), max_model_len=256) as fake:
        fake.cached_tokens = 16
        yield fake


@pytest.fixture
async def client(worker):
    async with (
        gateway([worker]) as served,
        AsyncOpenAI(base_url=f"{served.base}/v1", api_key="x", max_retries=0) as sdk,
    ):
        yield sdk


async def test_chat(client):
    answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES, max_completion_tokens=20, seed=SEED)
    (choice,) = answer.choices
    assert (answer.object, answer.model) == ("chat.completion", MODEL)
    assert answer.id.startswith("chatcmpl-")
    assert answer._request_id.startswith("req_")
    assert (choice.index, choice.finish_reason, choice.message.role, choice.logprobs) == (
        0,
        "length",
        "assistant",
        None,
    )
    assert choice.message.content
    assert answer.usage.completion_tokens == 20
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 20
    assert answer.usage.prompt_tokens_details.cached_tokens == 16
    # An answer can be sent back as it is.
    again = await client.chat.completions.create(
        model=MODEL, messages=[*MESSAGES, choice.message, {"role": "user", "content": "go on"}], max_tokens=1
    )
    assert again.usage.completion_tokens == 1


async def test_chat_stream_gives_the_same_text_and_usage(client):
    ask = {"model": MODEL, "messages": MESSAGES, "max_tokens": 20, "seed": SEED}
    whole = await client.chat.completions.create(**ask)
    stream = await client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


async def test_chat_stream_without_usage(client):
    stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=5, stream=True)
    chunks = [chunk async for chunk in stream]
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


async def test_the_stream_helper_accumulates(client, worker):
    worker.eos_ids = frozenset(worker.expected(0, len(worker.tokens))[10:11])
    async with client.chat.completions.stream(model=MODEL, messages=MESSAGES, seed=SEED) as stream:
        deltas = [event.delta async for event in stream if event.type == "content.delta"]
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "".join(deltas)


async def test_choices_come_interleaved_with_their_index(client):
    ask = {"model": MODEL, "messages": MESSAGES, "max_tokens": 10, "n": 3, "seed": SEED}
    whole = await client.chat.completions.create(**ask)
    texts = {0: "", 1: "", 2: ""}
    finished = []
    async for chunk in await client.chat.completions.create(**ask, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        finished += [choice.index] if choice.finish_reason else []
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert sorted(finished) == [0, 1, 2]
    assert len(set(texts.values())) == 3
    assert whole.usage.completion_tokens == 30
    assert whole.usage.prompt_tokens_details.cached_tokens == 16
    alone = await client.chat.completions.create(**{**ask, "n": 1})
    assert alone.choices[0].message.content == texts[0]
    assert alone.usage.prompt_tokens == whole.usage.prompt_tokens


async def test_chat_logprobs(client):
    ask = {"model": MODEL, "messages": MESSAGES, "max_tokens": 12, "seed": SEED, "logprobs": True, "top_logprobs": 2}
    whole = await client.chat.completions.create(**ask)
    entries = whole.choices[0].logprobs.content
    assert len(entries) == 12
    assert bytes(byte for entry in entries for byte in entry.bytes).decode("utf-8", "replace") == (
        whole.choices[0].message.content
    )
    assert all(len(entry.top_logprobs) == 2 and entry.top_logprobs[0].token == entry.token for entry in entries)
    streamed = []
    async for chunk in await client.chat.completions.create(**ask, stream=True):
        streamed += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    assert streamed == entries


async def test_completions(client):
    answer = await client.completions.create(model=MODEL, prompt="hello", max_tokens=12, seed=SEED, logprobs=1)
    (choice,) = answer.choices
    assert (answer.object, choice.finish_reason) == ("text_completion", "length")
    assert answer.id.startswith("cmpl-")
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 12
    assert [list(top) for top in logprobs.top_logprobs] == [[token] for token in logprobs.tokens]
    whole_tokens = [i for i, token in enumerate(logprobs.tokens) if "\ufffd" not in token]
    assert all(choice.text.startswith(logprobs.tokens[i], logprobs.text_offset[i]) for i in whole_tokens)
    stream = await client.completions.create(
        model=MODEL, prompt="hello", max_tokens=12, seed=SEED, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.text for chunk in chunks for c in chunk.choices) == choice.text
    assert chunks[-1].usage == answer.usage


async def test_completions_of_several_prompts_and_of_token_ids(client):
    several = await client.completions.create(model=MODEL, prompt=["a", "bcd"], max_tokens=3, n=2, seed=SEED)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.usage.prompt_tokens == 2 + 4  # with the token that begins every text
    assert several.usage.completion_tokens == 12
    as_ids = await client.completions.create(model=MODEL, prompt=[[257, 66]], max_tokens=3, seed=SEED)
    assert as_ids.usage.prompt_tokens == 2
    assert (await client.completions.create(model=MODEL, prompt="a")).usage.completion_tokens == 16


async def test_stop_and_extensions(client, worker):
    plain = await client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=20, seed=SEED)
    text = plain.choices[0].message.content
    stopped = await client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=20,
        seed=SEED,
        stop=[text[6:9]],
        extra_body={"top_k": 5, "min_p": 0.1, "return_token_ids": True, "anypool": {"trace": True}},
    )
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content == text[: text.index(text[6:9])]
    assert len(stopped.choices[0].token_ids) == stopped.usage.completion_tokens < 20
    assert stopped.anypool == {"pools": ["a"], "failovers": []}
    assert (worker.requests[-1]["top_k"], worker.requests[-1]["min_p"]) == (5, 0.1)


async def test_what_the_worker_is_asked(client, worker):
    await client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=3,
        temperature=0.5,
        top_p=0,
        seed=-5,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"7": -100},
        extra_body={
            "repetition_penalty": 1.5,
            "ignore_eos": True,
            "stop_token_ids": [3],
            "priority": 2,
            "cache_salt": "t",
        },
    )
    sent = {key: value for key, value in worker.requests[-1].items() if key not in ("prompt", "anypool")}
    assert sent == {
        "max_tokens": 3, "stream": True, "seed": -5, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
        "presence_penalty": 1.0, "frequency_penalty": -1.0, "repetition_penalty": 1.5, "logit_bias": {"7": -100.0},
        "stop_token_ids": [3], "ignore_eos": True, "logprobs": None, "priority": 2, "cache_salt": "t",
        "return_token_ids": True,
    }  # fmt: skip


async def test_models(client):
    assert [model.id async for model in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).owned_by == "anypool"


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"max_tokens": 1000}, openai.BadRequestError, "messages"),
        ({"extra_body": {"foo": 1}}, openai.BadRequestError, None),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format"),
        ({"model": "gpt-9"}, openai.NotFoundError, "model"),
    ],
)
async def test_errors_arrive_as_the_sdks_own(client, fields, kind, param):
    with pytest.raises(kind) as caught:
        await client.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, **fields})
    assert (caught.value.type, caught.value.param) == ("invalid_request_error", param)
    assert caught.value.request_id.startswith("req_")


async def test_a_full_queue_is_retried_by_the_sdk(client, worker):
    worker.faults.append(Fault("busy"))
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert (caught.value.status_code, caught.value.response.headers["retry-after"]) == (503, "7")


async def test_an_error_in_mid_stream_is_raised(worker):
    from anypool.gateway import Settings

    async with gateway([worker], settings=Settings(recovery_seconds=0.2)) as served:
        client = AsyncOpenAI(base_url=f"{served.base}/v1", api_key="x", max_retries=0)
        worker.faults.append(Fault("hold", 3))
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=9, stream=True)
        await worker.holding.wait()
        worker.kill()
        with pytest.raises(openai.APIError, match="No pool is left"):
            async for _ in stream:
                pass
        await client.close()


async def test_the_sdk_sees_nothing_of_a_fail_over():
    async with FakeWorker(tokens_of()) as a, FakeWorker(tokens_of()) as b:
        manager = FakeManager()
        manager.add("a", a)
        manager.add("b", b)
        async with gateway([], manager=manager) as served:
            client = AsyncOpenAI(base_url=f"{served.base}/v1", api_key="x", max_retries=0)
            ask: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 20, "seed": SEED}
            expected = (await client.chat.completions.create(**ask)).choices[0].message.content
            a.faults = b.faults
            a.faults.extend([Fault("cut", 7), Fault("reset", 4)])
            stream = await client.chat.completions.create(**ask, stream=True)
            assert "".join([c.choices[0].delta.content or "" async for c in stream]) == expected
            await client.close()


async def test_the_synchronous_client(worker):
    async with gateway([worker]) as served:

        def talk() -> str:
            with OpenAI(base_url=f"{served.base}/v1", api_key="x") as sdk:
                stream = sdk.chat.completions.create(
                    model=MODEL, messages=MESSAGES, max_tokens=8, seed=SEED, stream=True
                )
                return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

        async_client = AsyncOpenAI(base_url=f"{served.base}/v1", api_key="x")
        whole = await async_client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8, seed=SEED)
        assert await asyncio.to_thread(talk) == whole.choices[0].message.content
        await async_client.close()
