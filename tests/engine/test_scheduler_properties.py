"""The scheduler under random load, on a fake device that checks every token a request attends to.

The device's cache holds, for each token, a digest of the salt and of all tokens up to it. A step writes the digests of
the tokens it computes where the block table says, then reads those of the whole sequence back: whatever was leaked,
overwritten, evicted too soon or shared wrongly shows as a digest that is not the one of the request's own tokens.
The fake model's next token is a function of the last digest.
"""

from collections import Counter
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from anypool.engine.blocks import SCRATCH_BLOCK, BlockPool
from anypool.engine.prefix import BLOCK_SIZE, block_hashes
from anypool.engine.request import Request, RequestError, RequestState, SamplingParams
from anypool.engine.scheduler import QueueFullError, Scheduled, Scheduler, SchedulerConfig, Step, blocks_for

VOCAB = 50
EOS = 7
CONTEXT = 150

# Prompts are cut from a few texts, so that prefixes are shared; a digest is a number, so that it can be folded.
TEXTS = [[(i * i * k + i) % VOCAB for i in range(CONTEXT)] for k in (3, 5)]


def fold(digest: int, token: int) -> int:
    """The digest of a prefix with one more token."""
    return hash((digest, token))


def digests(salt: str, tokens: list[int]) -> list[int]:
    """The digest of each prefix of `tokens` that is not empty."""
    result, digest = [], len(salt)  # not hash(salt): Python's differs between runs
    for token in tokens:
        digest = fold(digest, token)
        result.append(digest)
    return result


def next_token(salt: str, digest: int) -> int:
    """The fake model."""
    return fold(digest, 12345) % VOCAB


def alone(request: Request) -> tuple[list[int], str]:
    """What the fake model gives for a request with nothing else in the world, and why it ends."""
    params, digest, output = request.params, digests(request.cache_salt, list(request.prompt))[-1], list[int]()
    while True:
        output.append(next_token(request.cache_salt, digest))
        digest = fold(digest, output[-1])
        if output[-1] in params.stop_token_ids or (output[-1] == EOS and not params.ignore_eos):
            return output, "stop"
        if len(output) == params.max_tokens:
            return output, "length"


class FakeDevice:
    """A cache of digests, and the checks of what a step may touch."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.cache: dict[tuple[int, int], int] = {}

    def compute(self, step: Step, block_table: list[list[int]]) -> dict[str, int]:
        """Write every item's tokens, then check all that each item attends to; give the next tokens."""
        matchable = {self.pool.match([prefix])[0] for prefix in self.pool.matchable()}
        for item in step.items:
            row = block_table[item.request.slot]
            own = digests(item.request.cache_salt, item.request.token_ids)
            for position in range(item.start, item.start + item.count):
                block = row[position // BLOCK_SIZE]
                assert block != SCRATCH_BLOCK, "writes to scratch"
                assert self.pool.references(block) == 1, "writes to a block that others hold"
                assert block not in matchable, "writes to a block that others may share"
                self.cache[block, position % BLOCK_SIZE] = own[position]
        sampled = {}
        for item in step.items:
            request, row = item.request, block_table[item.request.slot]
            own = digests(request.cache_salt, request.token_ids)
            end = item.start + item.count
            seen = [self.cache.get((row[p // BLOCK_SIZE], p % BLOCK_SIZE)) for p in range(end)]
            assert seen == own[:end], "attends to what is not its own prefix"
            assert item.samples == (end == request.num_tokens)
            if item.samples:
                sampled[request.id] = next_token(request.cache_salt, own[-1])
        return sampled


PROMPTS = st.builds(
    lambda text, length, tail: text[:length] + tail,
    st.sampled_from(TEXTS),
    st.integers(1, 20) | st.integers(1, CONTEXT),
    st.lists(st.integers(0, VOCAB - 1), max_size=3),
)
PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 20) | st.integers(40, 100),
    ignore_eos=st.sampled_from([True, True, False]),
    stop_token_ids=st.sampled_from([(), (), (), (3,), (3, EOS)]),
)


@dataclass
class Expected:
    """What is known from outside about a request: its result alone, and what it has delivered so far."""

    request: Request
    output: list[int]
    reason: str
    delivered: list[int]
    cancelled: bool = False
    blocks_named: int = 0


class Engine(RuleBasedStateMachine):
    """Arrivals, cancellations and steps in any order, over a pool small enough to preempt and evict."""

    step: Step | None = None

    @initialize(
        blocks=st.integers(3, 16),
        max_num_seqs=st.sampled_from([1, 2, 4, 6]),
        spare=st.integers(0, 60),
        max_waiting=st.integers(1, 12),
    )
    def start(self, blocks: int, max_num_seqs: int, spare: int, max_waiting: int) -> None:
        self.config = SchedulerConfig(
            vocab_size=VOCAB,
            max_model_len=CONTEXT,
            max_num_seqs=max_num_seqs,
            token_budget=max_num_seqs + BLOCK_SIZE + spare,
            max_waiting=max_waiting,
            eos_token_ids=frozenset({EOS}),
        )
        self.pool = BlockPool(blocks)
        self.scheduler = Scheduler(self.config, self.pool)
        self.device = FakeDevice(self.pool)
        self.expected: dict[str, Expected] = {}
        self.replica: set[bytes] = set()
        self.contents: dict[bytes, list[int]] = {}
        self.parent: dict[bytes, bytes | None] = {}

    @rule(
        prompt=PROMPTS,
        params=PARAMS,
        salt=st.sampled_from(["", "", "a"]),
        priority=st.sampled_from([0, 0, 0, -1, 5]),
        copies=st.integers(1, 3),
    )
    def arrive(self, prompt: list[int], params: SamplingParams, salt: str, priority: int, copies: int) -> None:
        for _ in range(copies):
            self.add(prompt, params, salt, priority)

    @rule(prompts=st.lists(PROMPTS, min_size=2, max_size=8), params=PARAMS)
    def many_arrive(self, prompts: list[list[int]], params: SamplingParams) -> None:
        for prompt in prompts:
            self.add(prompt, params, "", 0)

    @rule(data=st.data(), more=st.lists(st.integers(0, VOCAB - 1), max_size=20), max_tokens=st.integers(1, 40))
    def follow_up(self, data: st.DataObject, more: list[int], max_tokens: int) -> None:
        """The next turn of a conversation, whose beginning decoding left in the cache; or a stream that moved here."""
        known = [e.request for e in self.expected.values() if e.request.num_output]
        assume(known)
        earlier = data.draw(st.sampled_from(known), label="earlier")
        prompt = earlier.token_ids + more
        self.add(prompt, SamplingParams(max_tokens=max_tokens), earlier.cache_salt, earlier.priority)

    def add(self, prompt: list[int], params: SamplingParams, salt: str, priority: int) -> None:
        request = Request(
            f"r{len(self.expected)}", prompt, params, cache_salt=salt, priority=priority, resumed=len(prompt) // 2
        )
        total = len(prompt) + params.max_tokens
        fits = total <= CONTEXT and blocks_for(total - 1) <= self.pool.capacity
        waiting = sum(r.state is RequestState.WAITING for r in self.scheduler.requests.values())
        try:
            self.scheduler.add(request)
        except RequestError:
            assert not fits
        except QueueFullError:
            assert fits
            assert waiting >= self.config.max_waiting
        else:
            assert fits
            assert waiting < self.config.max_waiting
            self.expected[request.id] = Expected(request, *alone(request), delivered=[])

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        assume(self.expected)
        alive = sorted(self.scheduler.requests) or sorted(self.expected)
        self.end(data.draw(st.sampled_from(alive), label="cancel"))

    def end(self, request_id: str) -> None:
        known = self.expected[request_id]
        under_way = known.request.finish_reason is None
        assert self.scheduler.cancel(known.request.id) == under_way
        assert not self.scheduler.cancel(known.request.id)
        known.cancelled |= under_way

    @precondition(lambda self: self.step is None)
    @rule()
    def schedule(self) -> None:
        running = {r.id: r for r in self.running()}
        decoding = {id for id, r in running.items() if r.num_left == 1}
        self.step = self.scheduler.schedule()
        if self.step is None:
            assert not self.scheduler.requests, "requests wait, and nothing is done"
            return
        items = {item.request.id: item for item in self.step.items}
        assert len(items) == len(self.step.items) <= self.config.max_num_seqs
        assert sum(self.cost(item) for item in items.values()) <= self.config.token_budget
        for item in items.values():
            assert item.count >= 1
            assert item.start == item.request.num_computed
            assert item.count == 1 or item.start % BLOCK_SIZE == 0
            assert item.request.finish_reason is None
        preempted = {r.id for r in self.step.preempted}
        assert decoding <= items.keys() | preempted, "a prompt held up decoding"
        if running:
            best = min(running.values(), key=lambda r: r.rank)
            assert best.id in items, "the highest in rank does not move on"
        started = [r for r in self.running() if r.id not in running]
        assert not (started and preempted)
        waiting = [r for r in self.scheduler.requests.values() if r.state is RequestState.WAITING]
        kept = [r for r in running.values() if r.id not in preempted]
        for later in waiting:
            assert all(r.rank < later.rank for r in started), "overtaken while waiting"
            if later.id in preempted:
                assert all(r.rank < later.rank for r in kept), "preempted before one lower in rank"

    @precondition(lambda self: self.step is not None)
    @rule()
    def finish_step(self) -> None:
        step, self.step = self.step, None
        assert step is not None
        sampled = self.device.compute(step, self.scheduler.block_table.tolist())
        outputs = {output.request.id: output for output in self.scheduler.finish_step(step, sampled)}
        for item in step.items:
            known = self.expected[item.request.id]
            output = outputs.pop(item.request.id, None)
            assert (output is not None) == (item.samples and not known.cancelled)
            if output is not None:
                known.delivered += output.token_ids
                assert output.finish_reason == item.request.finish_reason
        assert not outputs

    @rule(steps=st.integers(1, 40))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            if self.step is None:
                self.schedule()
            if self.step is None:
                break
            self.accounts()
            self.finish_step()
            self.accounts()
            self.results()

    @staticmethod
    def cost(item: Scheduled) -> int:
        return 1 if item.count == 1 else -(-item.count // 16) * 16

    def running(self) -> list[Request]:
        return list(self.scheduler._running)

    @invariant()
    def accounts(self) -> None:
        """Every block is blank, idle or held exactly as often as block tables say; nothing is lost."""
        running = self.running()
        assert self.scheduler.num_running == len(running) <= self.config.max_num_seqs
        assert running == sorted(running, key=lambda r: r.rank)
        held = Counter(block for request in running for block in request.block_ids)
        assert [self.pool.references(b) for b in range(self.pool.num_blocks)] == [
            held[b] for b in range(self.pool.num_blocks)
        ]
        blank, idle = self.pool._blank, list(self.pool._idle)
        assert sorted([*blank, *idle, *held]) == list(range(1, self.pool.num_blocks))
        assert (self.pool.num_used, self.pool.num_free) == (len(held), len(blank) + len(idle))
        assert not any(self.pool.is_idle(block) for block in [*blank, *held])

        waiting = [r for r in self.scheduler.requests.values() if r.state is RequestState.WAITING]
        assert self.scheduler.num_waiting == len(waiting)
        for request in waiting:
            assert (request.block_ids, request.slot, request.num_computed) == ([], -1, 0)
        table = self.scheduler.block_table.tolist()
        rows = {request.slot: request.block_ids for request in running}
        assert len(rows) == len(running)
        for slot, row in enumerate(table):
            blocks = rows.get(slot, [])
            assert row == blocks + [SCRATCH_BLOCK] * (len(row) - len(blocks))

    @invariant()
    def prefixes(self) -> None:
        """What can be shared is computed, is what its name says, and is evicted from the chain's end."""
        for known in self.expected.values():
            request = known.request
            if request.num_tokens // BLOCK_SIZE > known.blocks_named:
                hashes = block_hashes(request.token_ids, request.cache_salt)
                own = digests(request.cache_salt, request.token_ids)
                for index in range(known.blocks_named, len(hashes)):
                    self.contents[hashes[index]] = own[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]
                    self.parent[hashes[index]] = hashes[index - 1] if index else None
                known.blocks_named = len(hashes)
        age = {block: order for order, block in enumerate(self.pool._idle)}
        for prefix in self.pool.matchable():
            [block] = self.pool.match([prefix])
            assert [self.device.cache.get((block, offset)) for offset in range(BLOCK_SIZE)] == self.contents[prefix]
            before = self.parent[prefix]
            if before is not None:
                holders = self.pool.match([before])
                assert holders, "a prefix lost its beginning"
                held_longer = age.get(holders[0], len(age)) > age.get(block, -1)
                assert held_longer, "would evict the beginning of a prefix before its end"

        events = self.pool.drain_events()
        assert not set(events.stored) & set(events.evicted)
        assert not set(events.stored) & self.replica
        assert set(events.evicted) <= self.replica
        self.replica = (self.replica | set(events.stored)) - set(events.evicted)
        assert self.replica == set(self.pool.matchable())

    @invariant()
    def results(self) -> None:
        """Whatever else is in the batch, a request gets the tokens it would get alone."""
        for known in self.expected.values():
            request = known.request
            assert known.delivered == request.output_token_ids
            assert known.delivered == known.output[: len(known.delivered)]
            if known.cancelled:
                assert request.finish_reason == "cancelled"
            elif request.finish_reason is not None:
                assert (request.state, request.finish_reason) == (RequestState.FINISHED, known.reason)
                assert known.delivered == known.output
            assert (request.id in self.scheduler.requests) == (request.finish_reason is None)
            assert request.cached_tokens % BLOCK_SIZE == 0
            assert request.cached_tokens < request.num_prompt

    def teardown(self) -> None:
        """All that is left finishes, in no more steps than the requests would take one after the other."""
        if not hasattr(self, "pool"):
            return
        left = list(self.scheduler.requests.values())
        bound = 2 + sum(blocks_for(r.num_tokens) + r.params.max_tokens - r.num_output for r in left)
        for _ in range(bound * (1 + len({r.priority for r in left}))):
            if self.step is None:
                self.schedule()
                if self.step is None:
                    break
            self.finish_step()
            self.results()
        assert not self.scheduler.requests, "starved"
        assert (self.pool.num_used, self.scheduler.num_running, self.scheduler.num_waiting) == (0, 0, 0)
        self.accounts()
        self.prefixes()


def test_any_order_of_events() -> None:
    run_state_machine_as_test(Engine, settings=settings(max_examples=120, stateful_step_count=40))


@pytest.mark.parametrize("seed", range(8))
def test_long_runs(seed: int) -> None:
    """The same machine kept under load for longer than hypothesis would: most steps are taken with a full pool."""
    random = Random(seed)
    engine = Engine()
    engine.start(blocks=random.randint(11, 16), max_num_seqs=8, spare=random.randint(0, 60), max_waiting=12)
    for _ in range(1200):
        event = random.random()
        if engine.scheduler.num_waiting < 4 and event < 0.5:
            length = random.choice([random.randint(1, 20), random.randint(1, 40), random.randint(1, CONTEXT)])
            params = SamplingParams(
                max_tokens=random.choice([random.randint(1, 40), random.randint(40, 90)]),
                ignore_eos=random.random() < 0.8,
            )
            salt, priority = random.choice(["", "", "a"]), random.choice([0, 0, 0, -1, 5])
            engine.add(random.choice(TEXTS)[:length], params, salt, priority)
        elif engine.scheduler.requests and event > 0.99:
            engine.end(random.choice(sorted(engine.scheduler.requests)))
        elif engine.step is None:
            engine.schedule()
        else:
            engine.finish_step()
        engine.accounts()
        engine.prefixes()
        engine.results()
    assert engine.scheduler.totals.preemptions
    assert engine.scheduler.totals.prefix_hits
    engine.teardown()
