"""The engine's thread: requests come from any thread, results go out in one call a step, and its end is told."""

import queue
import threading

import msgspec
import pytest

from anypool.engine.engine import Engine, StepResult
from anypool.engine.request import Request, RequestError, SamplingParams
from anypool.engine.scheduler import QueueFullError
from tests.engine.tiny_engine import CONTEXT, alone

TIMEOUT = 60
PARAMS = SamplingParams(max_tokens=20, temperature=0.8, seed=11, ignore_eos=True)


@pytest.fixture
def results():
    return queue.Queue()


@pytest.fixture
def engine(cpu_runner, results):
    made = Engine(cpu_runner, 8, results.put, results.put)
    yield made
    if made._thread.is_alive():
        made.stop()


def collect(results: "queue.Queue[StepResult]", wanted: int) -> dict[str, list[int]]:
    """Tokens by request, until so many requests have finished."""
    tokens: dict[str, list[int]] = {}
    while wanted:
        for update in results.get(timeout=TIMEOUT).updates:
            tokens.setdefault(update.request.id, []).extend(update.token_ids)
            wanted -= update.finish_reason is not None
    return tokens


def test_requests_from_many_threads(cpu_runner, engine, results):
    engine.start()
    prompts = {f"r{n}": [n + 1, 2, 3] * (n + 1) for n in range(6)}
    threads = [
        threading.Thread(target=engine.add, args=(Request(name, prompt, PARAMS),)) for name, prompt in prompts.items()
    ]
    for thread in threads:
        thread.start()
    tokens = collect(results, len(prompts))
    for thread in threads:
        thread.join()
    assert tokens == {name: alone(cpu_runner, prompt, PARAMS).token_ids for name, prompt in prompts.items()}


def test_it_wakes_for_a_request_and_shows_life_while_idle(engine, results):
    engine.start()
    beat = engine.beat
    while engine.beat == beat:  # an idle loop beats by itself
        pass
    engine.add(Request("r", [1, 2, 3], PARAMS))
    assert len(collect(results, 1)["r"]) == PARAMS.max_tokens


def test_what_is_refused_does_not_disturb_the_loop(engine, results):
    with pytest.raises(RequestError, match=f"the context is {CONTEXT}"):
        engine.add(Request("long", [1] * CONTEXT, PARAMS))
    for n in range(8):
        engine.add(Request(f"r{n}", [n], PARAMS))
    with pytest.raises(QueueFullError, match="8 requests are waiting, the limit is 8"):
        engine.add(Request("r8", [8], PARAMS))
    engine.start()
    assert len(collect(results, 8)) == 8


def test_a_cancelled_request_gets_no_more(engine, results):
    engine.start()
    engine.add(Request("gone", [1, 2], msgspec.structs.replace(PARAMS, max_tokens=90)))
    assert results.get(timeout=TIMEOUT).updates[0].request.id == "gone"
    engine.cancel("gone")
    engine.cancel("gone")
    engine.cancel("never there")
    engine.add(Request("next", [3, 4], PARAMS))
    tokens = collect(results, 1)
    assert len(tokens["next"]) == PARAMS.max_tokens
    assert engine.pool.num_used == 0


def test_stop_ends_the_thread_in_mid_stream(engine, results):
    engine.start()
    engine.add(Request("r", [1, 2], PARAMS))
    results.get(timeout=TIMEOUT)
    engine.stop()
    assert not engine._thread.is_alive()


def test_its_death_is_told(engine, results, monkeypatch):
    fault = RuntimeError("the device fell off")

    def run(batch: object) -> None:
        raise fault

    monkeypatch.setattr(engine.runner, "run", run)
    engine.start()
    engine.add(Request("r", [1, 2], PARAMS))
    assert results.get(timeout=TIMEOUT) is fault
    engine._thread.join(TIMEOUT)
    assert not engine._thread.is_alive()
