"""All choices of one request: their relays run side by side, their text comes out in the order it arrives."""

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from anypool.gateway.relay import Relay, Services
from anypool.gateway.request import GenerationRequest
from anypool.gateway.text import TextBatch, TextStream
from anypool.gateway.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class UsageCount:
    """What a request used. Each prompt counts once however many choices it has, and cached tokens are part of it."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(slots=True)
class ChoiceBatch:
    """What arrived for one choice."""

    choice: int
    batch: TextBatch


class Generation:
    """An async context manager: leaving it cancels what is still running at the workers."""

    def __init__(self, request: GenerationRequest, vocabulary: Vocabulary, services: Services):
        self.request = request
        self._services = services
        self._started_at = time.monotonic()
        count = len(request.prompts) * request.n
        self._relays = [Relay(request, choice, services) for choice in range(count)]
        self._texts = [
            TextStream(
                vocabulary,
                request.stop,
                ending_ids=request.ending_ids,
                logprobs=request.wants_logprobs,
                continues=request.kind == "completion",
            )
            for _ in range(count)
        ]
        self._counts = [0] * count
        self._last_at: list[float | None] = [None] * count

    async def __aenter__(self) -> "Generation":
        """Returns when every choice is admitted by some pool. Raises ApiError if one is not."""
        starting = [asyncio.ensure_future(relay.start()) for relay in self._relays]
        try:
            await asyncio.gather(*starting)
        except BaseException:
            for task in starting:
                task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)
            self._close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._close()

    @property
    def first_pool(self) -> str:
        return self._relays[0].pools[0]

    @property
    def usage(self) -> UsageCount:
        n = self.request.n
        return UsageCount(
            prompt_tokens=sum(len(prompt.token_ids) for prompt in self.request.prompts),
            completion_tokens=sum(self._counts),
            cached_tokens=sum(relay.cached_tokens for relay in self._relays[::n]),
        )

    @property
    def trace(self) -> dict[str, Any]:
        """Which pools served the request, choice by choice in order of use, and every loss."""
        return {
            "pools": [pool for relay in self._relays for pool in relay.pools],
            "failovers": [failover.as_dict() for relay in self._relays for failover in relay.failovers],
        }

    async def batches(self) -> AsyncGenerator[list[ChoiceBatch]]:
        """What arrived together, until every choice has a finish_reason. Raises ApiError when one is lost for good."""
        if len(self._relays) == 1:
            async for batches in self._choice(0):
                yield batches
        else:
            async for batches in self._merged():
                yield batches
        usage = self.usage
        seconds = time.monotonic() - self._started_at
        self._services.metrics.request_done(usage.prompt_tokens, usage.cached_tokens, seconds)

    async def _choice(self, choice: int) -> AsyncGenerator[list[ChoiceBatch]]:
        relay, text = self._relays[choice], self._texts[choice]
        async for received in relay.batches():
            batches = []
            for batch in received:
                shown = text.push(batch)
                batches.append(ChoiceBatch(choice, shown))
                if shown.finish_reason is not None:
                    break
            self._count(choice, batches)
            yield batches
            if batches[-1].batch.finish_reason is not None:
                break
        relay.close()

    async def _merged(self) -> AsyncGenerator[list[ChoiceBatch]]:
        queue: asyncio.Queue[list[ChoiceBatch] | BaseException | None] = asyncio.Queue(maxsize=64)

        async def pump(choice: int) -> None:
            try:
                async for batches in self._choice(choice):
                    await queue.put(batches)
                await queue.put(None)
            except Exception as error:
                await queue.put(error)

        tasks = [asyncio.create_task(pump(choice)) for choice in range(len(self._relays))]
        try:
            running = len(tasks)
            while running:
                item = await queue.get()
                if item is None:
                    running -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _count(self, choice: int, batches: list[ChoiceBatch]) -> None:
        tokens = sum(len(item.batch.token_ids) for item in batches)
        metrics, now = self._services.metrics, time.monotonic()
        if tokens:
            before = self._last_at[choice]
            if before is None:
                metrics.first_token(now - self._started_at)
            metrics.tokens(tokens, None if before is None else (now - before) / tokens)
            self._last_at[choice] = now
            self._counts[choice] += tokens
        reason = batches[-1].batch.finish_reason
        if reason is not None:
            metrics.finished(reason)

    def _close(self) -> None:
        for relay in self._relays:
            relay.close()
