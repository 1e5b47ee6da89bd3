"""What to compute next: continuous batching by token budget.

There is no prefill phase and no decode phase. A request has tokens, some of them computed; a step gives each
of some requests one or more tokens to compute, and a request whose last token is computed samples the next.
A long prompt is computed in chunks beside the others' decoding.

The order is by rank, (priority, arrival). Running requests come before waiting ones, and each of them is
sure of one unit of the budget, so prompts never hold up decoding. When blocks run out, the lowest in rank is
preempted: it gives up its blocks and waits, to be computed again (most of it found in the prefix cache). The
highest in rank is never preempted for another, so it always moves on.

Everything here is host work between two device steps. Its cost does not depend on how many requests wait,
and block tables are kept up to date, not rebuilt. One thread at a time, and one step in flight: schedule,
compute, finish_step; only `add` and `cancel` may come in between.
"""

import bisect
import heapq
import itertools
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from anypool.engine.blocks import SCRATCH_BLOCK, BlockPool
from anypool.engine.prefix import BLOCK_SIZE
from anypool.engine.request import FinishReason, Request, RequestError, RequestState


class QueueFullError(RuntimeError):
    """The waiting queue is at its bound: try again later, or on another pool."""


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one engine. Raises ValueError for limits with which it could not always move on."""

    vocab_size: int
    max_model_len: int
    """Tokens of prompt and output together."""
    max_num_seqs: int
    """Requests that run at once, and so rows of a step."""
    token_budget: int
    """Most that a step's items may cost: 1 for a single token, else the tokens rounded up to tiles of 16."""
    max_waiting: int = 1024
    eos_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_model_len", "max_num_seqs", "max_waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.token_budget < self.max_num_seqs + BLOCK_SIZE:
            raise ValueError(
                f"token_budget is {self.token_budget}: with max_num_seqs = {self.max_num_seqs} it must be at "
                f"least {self.max_num_seqs + BLOCK_SIZE}, a token for each request and a tile for a prompt"
            )


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Compute tokens start .. start + count - 1 of `request`. If count > 1, start is a multiple of 16."""

    request: Request
    start: int
    count: int
    samples: bool
    """True if these reach the request's last token, so that the next is sampled."""

    @property
    def cost(self) -> int:
        """What the item takes from the token budget."""
        return item_cost(self.count)


@dataclass(slots=True)
class Step:
    """One device step: at most one item a request."""

    items: list[Scheduled] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Output:
    """What a step gave to one request."""

    request: Request
    token_ids: list[int]
    """New tokens, including the one that ended the stream."""
    finish_reason: FinishReason | None


@dataclass(slots=True)
class Totals:
    """Counters since the start."""

    prefix_queries: int = 0
    """Prompt tokens looked up in the prefix cache, and those of them found, at a request's first run."""
    prefix_hits: int = 0
    preemptions: int = 0


def item_cost(count: int) -> int:
    """Cost of `count` tokens of one request: decode rows take one token, tiles take 16."""
    return 1 if count == 1 else blocks_for(count) * BLOCK_SIZE


def blocks_for(tokens: int) -> int:
    """Blocks that `tokens` tokens fill, the last perhaps in part."""
    return -(-tokens // BLOCK_SIZE)


class Scheduler:
    """Decides each step over one `BlockPool`, which it alone allocates from."""

    def __init__(self, config: SchedulerConfig, pool: BlockPool) -> None:
        self.config = config
        self.pool = pool
        self.totals = Totals()
        self.requests: dict[str, Request] = {}
        """Every request that is waiting or running, by id."""
        width = min(blocks_for(config.max_model_len), pool.capacity)
        self.block_table: NDArray[np.int32] = np.full((config.max_num_seqs, width), SCRATCH_BLOCK, np.int32)
        """Row `request.slot` holds the request's blocks in order, then zeros."""
        self._arrivals = itertools.count()
        self._running: list[Request] = []  # by rank
        self._waiting: list[tuple[tuple[int, int], Request]] = []  # heap; the cancelled stay till they surface
        self._num_waiting = 0
        self._slots = list(range(config.max_num_seqs))[::-1]
        self._in_flight: Step | None = None

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises RequestError for one that can never be served, QueueFullError if `max_waiting` are waiting.
        """
        self._check(request)
        if self._num_waiting >= self.config.max_waiting:
            raise QueueFullError(f"{self._num_waiting} requests are waiting, the limit is {self.config.max_waiting}")
        request.hash_prompt()
        request.stop_ids = frozenset(request.params.stop_token_ids)
        if not request.params.ignore_eos:
            request.stop_ids |= self.config.eos_token_ids
        request.rank = (request.priority, next(self._arrivals))
        self.requests[request.id] = request
        self._wait(request)

    def cancel(self, request_id: str) -> bool:
        """End a request wherever it is: it gets no further output. False if it is unknown or has finished.

        While a step is in flight, running requests keep slot and blocks until `finish_step`: the device may
        be using them.
        """
        request = self.requests.pop(request_id, None)
        if request is None:
            return False
        request.finish_reason = "cancelled"
        if request.state is RequestState.WAITING:
            self._num_waiting -= 1
            request.state = RequestState.FINISHED
            if len(self._waiting) > 2 * self._num_waiting + 64:
                self._waiting = [entry for entry in self._waiting if entry[1].finish_reason is None]
                heapq.heapify(self._waiting)
        elif self._in_flight is None:
            self._retire([request])
        return True

    def schedule(self) -> Step | None:
        """The next step, or None if there is no request."""
        assert self._in_flight is None, "finish_step comes before the next schedule"
        step = Step()
        budget = self._schedule_running(step, self.config.token_budget)
        # After a preemption blocks are scarce: what it freed belongs to those that run.
        if not step.preempted:
            self._schedule_waiting(step, budget)
        if not step.items:
            return None
        self._in_flight = step
        return step

    def finish_step(self, step: Step, sampled: Mapping[str, int]) -> list[Output]:
        """Take in what the device computed: by request id, the next token of each item that `samples`.

        Returns an output for each of those, but for requests cancelled meanwhile. Finished requests have let
        go of slot and blocks.
        """
        assert step is self._in_flight, "finish_step takes the step that schedule gave last"
        self._in_flight = None
        now = time.monotonic()
        outputs = []
        for item in step.items:
            request = item.request
            if request.finish_reason is None:
                self._commit(item)
                if item.samples:
                    tokens = self._accept(request, [sampled[request.id]])
                    if request.first_token_at is None:
                        request.first_token_at = now
                    outputs.append(Output(request, tokens, request.finish_reason))
        self._retire([request for request in self._running if request.finish_reason is not None], now)
        return outputs

    def _check(self, request: Request) -> None:
        limit, params = self.config.max_model_len, request.params
        total = request.num_prompt + params.max_tokens
        if request.id in self.requests:
            raise RequestError("request_id", f"request_id {request.id!r} is in use by a request that has not finished")
        if request.num_prompt >= limit:
            raise RequestError(
                "prompt",
                f"the prompt has {request.num_prompt} tokens, the context is {limit} and must also hold the "
                "output: shorten the prompt",
            )
        if total > limit:
            raise RequestError(
                "max_tokens",
                f"{request.num_prompt} prompt tokens and max_tokens = {params.max_tokens} make {total}, the "
                f"context is {limit}: lower max_tokens to {limit - request.num_prompt} or shorten the prompt",
            )
        # The last token is sampled, not computed: it needs no place in the cache.
        if blocks_for(total - 1) > self.pool.capacity:
            room = self.pool.capacity * BLOCK_SIZE
            raise RequestError(
                "max_tokens",
                f"{request.num_prompt} prompt tokens and max_tokens = {params.max_tokens} make {total}, the "
                f"cache holds {room}: lower max_tokens, shorten the prompt, or enlarge the cache",
            )
        for token in request.prompt:
            if not 0 <= token < self.config.vocab_size:
                raise RequestError(
                    "prompt",
                    f"prompt holds token {token}: the model's ids are 0 to {self.config.vocab_size - 1}",
                )
        params.check_vocabulary(self.config.vocab_size)

    def _schedule_running(self, step: Step, budget: int) -> int:
        """Give every running request its next tokens, highest rank first; return the budget left."""
        index = 0
        while index < len(self._running):
            request = self._running[index]
            later = len(self._running) - index - 1
            count = _chunk(request.num_left, budget - later)  # each of the later ones is sure of one unit
            if count and not self._make_room(step, request, request.num_computed + count):
                break  # it was the last, and preempted itself
            if count:
                budget -= self._schedule_item(step, request, count)
            index += 1
        return budget

    def _make_room(self, step: Step, request: Request, tokens: int) -> bool:
        """Give `request` blocks for `tokens` tokens, preempting from the lowest rank up; False if itself."""
        while len(request.block_ids) < blocks_for(tokens):
            if self.pool.num_free:
                self._append_blocks(request, [self.pool.allocate()])
                continue
            victim = self._running[-1]
            self._preempt(step, victim)
            if victim is request:
                return False
        return True

    def _schedule_waiting(self, step: Step, budget: int) -> None:
        """Start waiting requests in order of rank while slots, budget and blocks last.

        The first that finds no room ends it, however small the next: otherwise large requests would starve.
        """
        computing = {h for item in step.items if item.count > 1 for h in _block_span(item)}
        while self._slots and (request := self._first_waiting()) is not None:
            # The last token must be computed again to sample from, and no shared block is ever written to.
            hashes = request.block_hashes[: (request.num_tokens - 1) // BLOCK_SIZE]
            cached = self.pool.match(hashes)
            if len(cached) < len(hashes) and hashes[len(cached)] in computing:
                return  # this step computes, for another, what this one needs next: shared in the next step
            start = len(cached) * BLOCK_SIZE
            count = _chunk(request.num_tokens - start, budget)
            fresh = blocks_for(request.num_tokens) - len(cached)
            taken = fresh + sum(map(self.pool.is_idle, cached))
            # Room for all its tokens, not only for this chunk, and for each running request to grow by a
            # block: a request that starts only to be preempted is work done twice.
            if not count or taken + len(self._running) > self.pool.num_free:
                return
            self._start(request, cached)
            self._append_blocks(request, [self.pool.allocate() for _ in range(fresh)])
            budget -= self._schedule_item(step, request, count)
            computing.update(_block_span(step.items[-1]))

    def _schedule_item(self, step: Step, request: Request, count: int) -> int:
        """Add an item to the step; return its cost."""
        item = Scheduled(request, request.num_computed, count, count == request.num_left)
        step.items.append(item)
        return item.cost

    def _start(self, request: Request, cached: list[int]) -> None:
        heapq.heappop(self._waiting)
        self._num_waiting -= 1
        bisect.insort(self._running, request, key=_rank)
        request.state = RequestState.RUNNING
        request.slot = self._slots.pop()
        for block in cached:
            self.pool.share(block)
        self._append_blocks(request, cached)
        request.num_computed = len(cached) * BLOCK_SIZE
        if request.scheduled_at is None:
            request.scheduled_at = time.monotonic()
            request.cached_tokens = request.num_computed
            self.totals.prefix_queries += request.num_prompt
            self.totals.prefix_hits += request.num_computed

    def _preempt(self, step: Step, request: Request) -> None:
        self._leave(request)
        request.num_computed = 0
        request.num_preemptions += 1
        self.totals.preemptions += 1
        step.preempted.append(request)
        self._wait(request)

    def _wait(self, request: Request) -> None:
        request.state = RequestState.WAITING
        heapq.heappush(self._waiting, (request.rank, request))
        self._num_waiting += 1

    def _first_waiting(self) -> Request | None:
        while self._waiting and self._waiting[0][1].finish_reason is not None:
            heapq.heappop(self._waiting)
        return self._waiting[0][1] if self._waiting else None

    def _commit(self, item: Scheduled) -> None:
        """Count the item's tokens as computed and make the blocks they filled matchable."""
        request = item.request
        request.num_computed = item.start + item.count
        for index in range(item.start // BLOCK_SIZE, request.num_computed // BLOCK_SIZE):
            block = self.pool.commit(request.block_ids[index], request.block_hash(index))
            if block != request.block_ids[index]:
                request.block_ids[index] = block
                self.block_table[request.slot, index] = block

    def _accept(self, request: Request, tokens: Iterable[int]) -> list[int]:
        """Append tokens up to the one that ends the request, if any; return those appended."""
        accepted = []
        for token in tokens:
            request.token_ids.append(token)
            accepted.append(token)
            if token in request.stop_ids:
                request.finish_reason = "stop"
            elif request.num_output == request.params.max_tokens:
                request.finish_reason = "length"
            if request.finish_reason is not None:
                break
        return accepted

    def _retire(self, requests: list[Request], now: float | None = None) -> None:
        for request in requests:
            self._leave(request)
            request.state = RequestState.FINISHED
            request.finished_at = time.monotonic() if now is None else now
            self.requests.pop(request.id, None)  # a cancelled one is gone already

    def _leave(self, request: Request) -> None:
        """Take a request out of the running: its slot and blocks are free."""
        del self._running[bisect.bisect_left(self._running, request.rank, key=_rank)]
        self.pool.release(request.block_ids)
        self.block_table[request.slot, : len(request.block_ids)] = SCRATCH_BLOCK
        request.block_ids = []
        self._slots.append(request.slot)
        request.slot = -1

    def _append_blocks(self, request: Request, blocks: list[int]) -> None:
        held = len(request.block_ids)
        self.block_table[request.slot, held : held + len(blocks)] = blocks
        request.block_ids += blocks


def _rank(request: Request) -> tuple[int, int]:
    return request.rank


def _chunk(left: int, budget: int) -> int:
    """How many of `left` tokens to compute within `budget`: all of them, or whole tiles, or none."""
    if item_cost(left) <= budget:
        return left
    return max(0, budget // BLOCK_SIZE * BLOCK_SIZE)


def _block_span(item: Scheduled) -> list[bytes]:
    """Hashes of the known full blocks that the item computes."""
    return item.request.block_hashes[item.start // BLOCK_SIZE : (item.start + item.count) // BLOCK_SIZE]
