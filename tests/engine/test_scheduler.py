"""What the scheduler decides, case by case. Random load is in test_scheduler_properties.py."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from anypool.engine.blocks import BlockPool
from anypool.engine.prefix import block_hashes
from anypool.engine.request import Request, RequestError, RequestState, SamplingParams
from anypool.engine.scheduler import Output, QueueFullError, Scheduler, SchedulerConfig, Step

EOS = 0


def scheduler(blocks: int = 101, **limits: Any) -> Scheduler:
    """One with room for everything, but for what `limits` says."""
    given: dict[str, Any] = {
        "vocab_size": 1000,
        "max_model_len": 1000,
        "max_num_seqs": 4,
        "token_budget": 512,
        "eos_token_ids": frozenset({EOS}),
    }
    return Scheduler(SchedulerConfig(**(given | limits)), BlockPool(blocks))


def request(id: str, prompt: int | list[int], max_tokens: int = 100, **fields: Any) -> Request:
    """A request; a prompt given by length shares no prefix with those of other ids."""
    if isinstance(prompt, int):
        prompt = [1 + ord(id[-1]), *range(1, prompt)]
    params = {name: fields.pop(name) for name in list(fields) if name in SamplingParams.__struct_fields__}
    return Request(id, prompt, SamplingParams(max_tokens=max_tokens, **params), **fields)


def turn(engine: Scheduler, token: int = 5) -> tuple[list[tuple[str, int, int]], list[Output]]:
    """One step in which every sampled token is `token`: what was computed as (id, start, count), and the outputs."""
    step = engine.schedule()
    assert step is not None
    return plan(step), finish(engine, step, token)


def plan(step: Step | None) -> list[tuple[str, int, int]]:
    assert step is not None
    return [(item.request.id, item.start, item.count) for item in step.items]


def finish(engine: Scheduler, step: Step, token: int = 5) -> list[Output]:
    return engine.finish_step(step, {item.request.id: token for item in step.items if item.samples})


def run(engine: Scheduler, *requests: Request, token: int = 5) -> None:
    """Serve `requests` and whatever else is there to the end."""
    for one in requests:
        engine.add(one)
    while (step := engine.schedule()) is not None:
        finish(engine, step, token)


# -- what a step holds ------------------------------------------------------------------------------------------------


def test_nothing_to_do() -> None:
    assert scheduler().schedule() is None


def test_a_long_prompt_is_computed_in_chunks_and_samples_once() -> None:
    engine = scheduler(token_budget=70)
    engine.add(request("a", 150))
    steps = [turn(engine) for _ in range(4)]
    assert [items for items, _ in steps] == [[("a", 0, 64)], [("a", 64, 64)], [("a", 128, 22)], [("a", 150, 1)]]
    assert [[output.token_ids for output in outputs] for _, outputs in steps] == [[], [], [[5]], [[5]]]


def test_prompts_share_a_step_with_decoding_and_never_hold_it_up() -> None:
    engine = scheduler(token_budget=36)
    for id in "ab":
        engine.add(request(id, 16))
    assert turn(engine)[0] == [("a", 0, 16), ("b", 0, 16)]
    engine.add(request("c", 100))
    assert turn(engine)[0] == [("a", 16, 1), ("b", 16, 1), ("c", 0, 32)]
    assert turn(engine)[0] == [("a", 17, 1), ("b", 17, 1), ("c", 32, 32)]


def test_a_running_prompt_leaves_budget_to_those_after_it() -> None:
    engine = scheduler(token_budget=32)
    engine.add(request("a", 16))
    turn(engine)
    engine.add(request("b", 100, priority=-1))
    turn(engine)
    assert turn(engine)[0] == [("b", 16, 16), ("a", 17, 1)]


def test_the_last_tile_of_a_prompt_costs_a_whole_one() -> None:
    engine = scheduler(token_budget=40)
    for id in "abc":
        engine.add(request(id, 17))
    assert turn(engine)[0] == [("a", 0, 17)]  # 32 of the budget
    assert turn(engine)[0] == [("a", 17, 1), ("b", 0, 17)]
    step = engine.schedule()
    assert step is not None
    assert [item.cost for item in step.items] == [1, 1, 32]


def test_a_prompt_of_one_token_costs_one() -> None:
    engine = scheduler(token_budget=20)
    for id in "abcd":
        engine.add(request(id, 1))
    assert len(turn(engine)[0]) == 4


def test_no_more_run_than_max_num_seqs() -> None:
    engine = scheduler(max_num_seqs=2)
    for id in "abc":
        engine.add(request(id, 4, max_tokens=2))
    assert [id for id, *_ in turn(engine)[0]] == ["a", "b"]
    assert (engine.num_running, engine.num_waiting) == (2, 1)
    turn(engine)
    assert [id for id, *_ in turn(engine)[0]] == ["c"]


def test_order_is_priority_then_arrival() -> None:
    engine = scheduler(max_num_seqs=1)
    ids = []
    for id, priority in [("a", 5), ("b", 0), ("c", -1), ("d", 0), ("e", 5)]:
        engine.add(request(id, 4, max_tokens=1, priority=priority))
    while engine.requests:
        ids.append(turn(engine)[0][0][0])
    assert ids == ["c", "b", "d", "a", "e"]


# -- how a stream ends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "tokens", "output", "reason"),
    [
        ({}, [5, 6, EOS], [5, 6, EOS], "stop"),
        ({"max_tokens": 2}, [5, 6], [5, 6], "length"),
        ({"max_tokens": 2}, [5, EOS], [5, EOS], "stop"),  # both at once
        ({"ignore_eos": True, "max_tokens": 3}, [EOS, EOS, 7], [EOS, EOS, 7], "length"),
        ({"stop_token_ids": (9, 8)}, [5, 8], [5, 8], "stop"),
        ({"stop_token_ids": (9,), "ignore_eos": True}, [EOS, 9], [EOS, 9], "stop"),
        ({"stop_token_ids": (EOS,), "ignore_eos": True}, [EOS], [EOS], "stop"),
    ],
)
def test_finish(fields: dict[str, Any], tokens: list[int], output: list[int], reason: str) -> None:
    engine = scheduler()
    one = request("a", 4, **fields)
    engine.add(one)
    outputs = [turn(engine, token)[1][0] for token in tokens]
    assert [output.finish_reason for output in outputs] == [None] * (len(tokens) - 1) + [reason]
    assert one.output_token_ids == output
    assert (one.state, one.finish_reason) == (RequestState.FINISHED, reason)
    assert one.arrival <= (one.scheduled_at or 0) <= (one.first_token_at or 0) <= (one.finished_at or 0)
    assert engine.schedule() is None
    assert (engine.requests, engine.pool.num_used, one.slot) == ({}, 0, -1)


def test_stop_tokens_in_the_prompt_end_nothing() -> None:
    engine = scheduler()
    one = request("a", [EOS, 5, EOS], max_tokens=1)
    run(engine, one)
    assert one.finish_reason == "length"


# -- the prefix cache -------------------------------------------------------------------------------------------------


def test_a_prompt_is_found_again_but_for_its_last_token() -> None:
    engine = scheduler()
    first, again, longer = request("a", 48), request("a", 48), request("a", 50)
    run(engine, first)
    engine.add(again)
    assert turn(engine)[0] == [("a", 32, 16)]  # one block would do; a shared one is never written to
    engine.cancel("a")
    engine.add(longer)
    assert turn(engine)[0] == [("a", 48, 2)]
    assert [one.cached_tokens for one in (first, again, longer)] == [0, 32, 48]
    assert (engine.totals.prefix_queries, engine.totals.prefix_hits) == (48 + 48 + 50, 32 + 48)


def test_a_prefix_is_found_while_its_first_user_still_runs() -> None:
    engine = scheduler()
    one, other = request("a", 40), request("b", [*request("a", 40).prompt, 7])
    engine.add(one)
    turn(engine)
    engine.add(other)
    assert turn(engine)[0] == [("a", 40, 1), ("b", 32, 9)]
    assert one.block_ids[:2] == other.block_ids[:2]
    assert one.block_ids[2:] != other.block_ids[2:]


def test_what_decoding_computed_is_cached_too() -> None:
    engine = scheduler()
    one = request("a", 20, max_tokens=30)
    run(engine, one)
    assert set(engine.pool.matchable()) == set(block_hashes(one.token_ids[:49], ""))  # the last was not computed
    engine.add(request("b", [*one.token_ids, 9]))
    assert turn(engine)[0] == [("b", 48, 3)]


def test_blocks_can_be_shared_only_once_they_are_computed() -> None:
    engine = scheduler()
    engine.add(request("a", 40))
    step = engine.schedule()
    assert step is not None
    assert engine.pool.matchable() == []
    finish(engine, step)
    assert len(engine.pool.matchable()) == 2


def test_salts_share_nothing() -> None:
    engine = scheduler()
    run(engine, request("a", 40, cache_salt="one"))
    engine.add(request("a", 40, cache_salt="two"))
    engine.add(request("b", request("a", 40).token_ids, cache_salt="one"))
    assert turn(engine)[0] == [("a", 0, 40), ("b", 32, 8)]


def test_equal_prompts_that_arrive_together_are_computed_once() -> None:
    engine = scheduler()
    prompt = list(range(1, 101))
    for id in "abc":
        engine.add(request(id, prompt))
    assert turn(engine)[0] == [("a", 0, 100)]
    assert turn(engine)[0] == [("a", 100, 1), ("b", 96, 4), ("c", 96, 4)]


def test_a_request_waits_for_no_prefix_that_nobody_is_computing() -> None:
    engine = scheduler(token_budget=32)
    prompt = list(range(1, 101))
    engine.add(request("a", prompt))
    turn(engine)
    engine.cancel("a")
    engine.add(request("b", prompt))
    assert turn(engine)[0] == [("b", 32, 32)]


def test_equal_output_is_held_once() -> None:
    engine = scheduler()
    one, other = request("a", list(range(1, 12))), request("b", list(range(1, 12)))
    for each in (one, other):
        engine.add(each)
    for _ in range(5):
        turn(engine)
    assert one.block_ids[0] != other.block_ids[0]  # neither is full yet
    turn(engine)
    assert one.block_ids[0] == other.block_ids[0]
    assert engine.block_table[other.slot, 0] == one.block_ids[0]


# -- when blocks run out ----------------------------------------------------------------------------------------------


def full(*requests: Request, blocks: int) -> Scheduler:
    """A scheduler whose blocks `requests`, all running, are about to exhaust."""
    engine = scheduler(blocks=blocks)
    for one in requests:
        engine.add(one)
    turn(engine)
    assert engine.num_running == len(requests)
    return engine


def until_preemption(engine: Scheduler) -> list[str]:
    while True:
        step = engine.schedule()
        assert step is not None
        finish(engine, step)
        if step.preempted:
            return [one.id for one in step.preempted]


def test_the_latest_is_preempted_and_comes_back() -> None:
    one, other = request("a", 10, max_tokens=60), request("b", 10, max_tokens=60)
    engine = full(one, other, blocks=7)
    assert until_preemption(engine) == ["b"]
    assert (other.state, other.num_computed, other.block_ids, other.slot) == (RequestState.WAITING, 0, [], -1)
    generated = list(other.output_token_ids)
    assert generated
    run(engine)
    assert (one.num_preemptions, other.num_preemptions, engine.totals.preemptions) == (0, 1, 1)
    assert other.output_token_ids[: len(generated)] == generated
    assert (other.num_output, other.finish_reason, other.cached_tokens) == (60, "length", 0)


def test_the_lowest_priority_is_preempted_first() -> None:
    urgent = request("c", 10, max_tokens=60, priority=-1)
    engine = full(request("a", 10, priority=3), request("b", 10), urgent, blocks=9)
    assert until_preemption(engine) == ["a"]
    assert until_preemption(engine) == ["b"]
    run(engine)
    assert urgent.num_preemptions == 0


def test_the_preempted_comes_back_before_later_arrivals_and_finds_its_prefix() -> None:
    one, other = request("a", 30, max_tokens=50), request("b", 30, max_tokens=50)
    engine = full(one, other, blocks=8)
    assert until_preemption(engine) == ["b"]
    engine.add(request("c", 3, max_tokens=1))
    while other.state is RequestState.WAITING:
        started = [id for id, *_ in turn(engine)[0]]
        assert "c" not in started or "b" in started
    run(engine)
    assert other.num_output == 50


def test_a_request_starts_only_with_room_for_its_whole_prompt() -> None:
    engine = scheduler(blocks=11, token_budget=32)
    engine.add(request("a", 90, max_tokens=4))
    engine.add(request("b", 80, max_tokens=4))
    while "a" in engine.requests:
        assert [id for id, *_ in turn(engine)[0]] == ["a"]
    assert turn(engine)[0] == [("b", 0, 32)]


def test_a_request_starts_only_with_room_for_the_others_to_grow() -> None:
    engine = scheduler(blocks=11)
    engine.add(request("a", 80, max_tokens=30))
    turn(engine)
    engine.add(request("b", 64, max_tokens=2))  # four blocks, as many as a leaves now
    while "a" in engine.requests:
        assert [id for id, *_ in turn(engine)[0]] == ["a"]
    assert turn(engine)[0] == [("b", 0, 64)]


def test_a_large_request_is_not_overtaken_by_small_ones() -> None:
    engine = scheduler(blocks=11)
    engine.add(request("a", 90, max_tokens=4))
    turn(engine)
    engine.add(request("b", 80, max_tokens=4))
    engine.add(request("c", 4, max_tokens=4))
    while "a" in engine.requests:
        assert [id for id, *_ in turn(engine)[0]] == ["a"]
    assert [id for id, *_ in turn(engine)[0]] == ["b", "c"]


def test_one_request_may_fill_the_whole_cache() -> None:
    engine = scheduler(blocks=6)  # 80 tokens, and the last is never computed
    one = request("a", 41, max_tokens=40)
    run(engine, one)
    assert (one.num_output, one.num_preemptions) == (40, 0)


# -- cancellation -----------------------------------------------------------------------------------------------------


def test_cancel_while_waiting() -> None:
    engine = scheduler(max_num_seqs=1)
    for id in "abc":
        engine.add(request(id, 4, max_tokens=2))
    turn(engine)
    waiting = engine.requests["b"]
    assert engine.cancel("b")
    assert (waiting.state, waiting.finish_reason, engine.num_waiting) == (RequestState.FINISHED, "cancelled", 1)
    turn(engine)
    assert turn(engine)[0] == [("c", 0, 4)]


def test_cancel_between_steps() -> None:
    engine = scheduler()
    one = request("a", 40)
    engine.add(one)
    turn(engine)
    assert engine.cancel("a")
    assert (one.state, one.finish_reason, engine.pool.num_used) == (RequestState.FINISHED, "cancelled", 0)
    assert engine.schedule() is None


def test_cancel_during_a_step_keeps_the_blocks_until_it_ends() -> None:
    engine = scheduler()
    one, other = request("a", 40), request("b", 40)
    engine.add(one)
    engine.add(other)
    step = engine.schedule()
    assert step is not None
    assert engine.cancel("a")
    assert (one.state, one.slot, engine.pool.num_used) == (RequestState.RUNNING, 0, 6)
    engine.add(request("a", 3))  # the name is free at once
    assert [output.request.id for output in finish(engine, step)] == ["b"]
    assert (one.state, one.num_output, engine.pool.num_used) == (RequestState.FINISHED, 0, 3)
    assert turn(engine)[0] == [("b", 40, 1), ("a", 0, 3)]


def test_cancel_of_the_preempted() -> None:
    one, other = request("a", 10, max_tokens=60), request("b", 10, max_tokens=60)
    engine = full(one, other, blocks=7)
    until_preemption(engine)
    assert engine.cancel("b")
    assert engine.num_waiting == 0
    run(engine)
    assert (one.finish_reason, other.finish_reason) == ("length", "cancelled")


def test_cancel_of_the_unknown_and_the_finished() -> None:
    engine = scheduler()
    run(engine, request("a", 4, max_tokens=1))
    assert not engine.cancel("a")
    assert not engine.cancel("never there")


def test_cancelled_requests_do_not_pile_up_in_the_queue() -> None:
    engine = scheduler(max_num_seqs=1, max_waiting=10)
    engine.add(request("a", 4))
    turn(engine)
    for index in range(10_000):
        engine.add(request(f"r{index}", 4))
        engine.cancel(f"r{index}")
    assert engine.num_waiting == 0
    assert len(engine._waiting) < 100


def test_cancelling_many_keeps_the_order_of_the_others() -> None:
    engine = scheduler(max_num_seqs=1)
    for index in range(300):
        engine.add(request(f"r{index}", 4, max_tokens=1, priority=index * 37 % 101))
    kept = list(engine.requests.values())[::7]
    for id in list(engine.requests):
        if engine.requests[id] not in kept:
            engine.cancel(id)
    order = []
    while engine.requests:
        order += [id for id, *_ in turn(engine)[0]]
    assert order == [one.id for one in sorted(kept, key=lambda one: one.rank)]


# -- admission --------------------------------------------------------------------------------------------------------


def test_the_queue_is_bounded() -> None:
    engine = scheduler(max_num_seqs=1, max_waiting=2)
    engine.add(request("a", 4))
    turn(engine)
    engine.add(request("b", 4))
    engine.add(request("c", 4))
    with pytest.raises(QueueFullError, match="2 requests are waiting, the limit is 2"):
        engine.add(request("d", 4))
    assert "d" not in engine.requests
    engine.cancel("b")
    engine.add(request("d", 4))


@pytest.mark.parametrize(
    ("make", "param", "message"),
    [
        (
            lambda: request("b", 1000, 1),
            "prompt",
            "the prompt has 1000 tokens, the context is 1000 and must also hold the output: shorten the prompt",
        ),
        (
            lambda: request("b", 990, 11),
            "max_tokens",
            (
                "990 prompt tokens and max_tokens = 11 make 1001, the context is 1000: lower max_tokens to 10 or "
                "shorten the prompt"
            ),
        ),
        (
            lambda: request("b", 300, 22),
            "max_tokens",
            (
                "300 prompt tokens and max_tokens = 22 make 322, the cache holds 320: lower max_tokens, shorten the "
                "prompt, or enlarge the cache"
            ),
        ),
        (lambda: request("b", [1, 1000]), "prompt", "prompt holds token 1000: the model's ids are 0 to 999"),
        (lambda: request("b", [-1, 2]), "prompt", "prompt holds token -1: the model's ids are 0 to 999"),
        (
            lambda: request("b", 3, logit_bias={1000: 1.0}),
            "logit_bias",
            "logit_bias names token 1000: the model's ids are 0 to 999",
        ),
        (
            lambda: request("a", 3),
            "request_id",
            "request_id 'a' is in use by a request that has not finished",
        ),
    ],
)
def test_refused(make: Callable[[], Request], param: str, message: str) -> None:
    engine = scheduler(blocks=21)
    engine.add(request("a", 3, max_tokens=1))
    with pytest.raises(RequestError) as caught:
        engine.add(make())
    assert (caught.value.param, str(caught.value)) == (param, message)
    assert list(engine.requests) == ["a"]
    run(engine, request("b", 300, 21), request("c", 3))  # it goes on, and what just fits is served


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0: it must be at least 1"),
        ({"max_model_len": 0}, "max_model_len is 0: it must be at least 1"),
        ({"max_waiting": 0}, "max_waiting is 0: it must be at least 1"),
        ({"vocab_size": 0}, "vocab_size is 0: it must be at least 1"),
        (
            {"token_budget": 47, "max_num_seqs": 32},
            (
                "token_budget is 47: with max_num_seqs = 32 it must be at least 48, a token for each request and a "
                "tile for a prompt"
            ),
        ),
    ],
)
def test_bad_limits(limits: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match="at least") as caught:
        scheduler(**limits)
    assert str(caught.value) == message


def test_a_step_must_be_finished_before_the_next() -> None:
    engine = scheduler()
    engine.add(request("a", 4))
    step = engine.schedule()
    assert step is not None
    with pytest.raises(AssertionError, match="finish_step comes before"):
        engine.schedule()
    finish(engine, step)
    with pytest.raises(AssertionError, match="the step that schedule gave last"):
        finish(engine, step)


# -- cost -------------------------------------------------------------------------------------------------------------


def calls_of_a_turn(waiting: int) -> int:
    """Function calls that a step's scheduling makes while `waiting` requests wait."""
    engine = scheduler(max_num_seqs=4, max_waiting=10_000)
    for index in range(waiting + 4):
        engine.add(request(f"r{index}", 4))
    turn(engine)
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        turn(engine)
        engine.cancel("r0")
        turn(engine)
    finally:
        sys.setprofile(None)
    return calls


def test_work_does_not_grow_with_the_queue() -> None:
    assert calls_of_a_turn(waiting=5000) <= calls_of_a_turn(waiting=10)
