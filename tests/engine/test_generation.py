"""Generation through the paged cache: right by a dense pass, and the same whatever else the engine does.

The truth is `forward_dense`, which tests/models compares with transformers. On the CPU kernels a request's tokens and
log-probabilities have the same bits in every batch; with the references, whose sums depend on shapes, tokens are equal
and log-probabilities agree within 1e-5.
"""

from collections import Counter
from dataclasses import dataclass
from random import Random

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anypool.engine.engine import Logprobs
from anypool.engine.prefix import block_hashes
from anypool.engine.request import SamplingParams
from anypool.engine.runner import Runner
from anypool.ops.random import gumbel
from tests.engine.tiny_engine import (
    BLOCKS,
    CONTEXT,
    EOS,
    MODEL,
    VOCAB,
    Driver,
    Result,
    alone,
    dense_logits,
    load_runner,
    write_model,
)

DENSE_TOLERANCE = 1e-4
"""Of log-probabilities against the dense pass, whose attention sums in another order."""

SAMPLED = SamplingParams(
    max_tokens=24, temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, seed=-7, repetition_penalty=1.2,
    presence_penalty=1.5, frequency_penalty=1.0, logit_bias={5: 4.0, 6: -100.0, 40: 4.0, 70: 3.0},
    logprobs=3, ignore_eos=True,
)  # fmt: skip
NEUTRAL = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
}
GREEDY = SamplingParams(max_tokens=40, temperature=0, logprobs=2, ignore_eos=True)
TEXTS = [[(i * i * k + 3 * i + k) % VOCAB for i in range(CONTEXT)] for k in (3, 5, 7)]


@pytest.fixture(scope="module", params=["cpu", "reference"])
def runner(request: pytest.FixtureRequest) -> Runner:
    made: Runner = request.getfixturevalue(f"{request.param}_runner")
    return made


def exact(runner: Runner) -> bool:
    return bool(runner.kernels.paged_attention.name == "cpu")


def same_logprobs(runner: Runner, actual: list[Logprobs], expected: list[Logprobs]) -> bool:
    """Equal: in every bit on the CPU kernels, else nearly."""
    if exact(runner):
        return actual == expected
    pairs = zip(actual, expected, strict=True)
    return all(
        abs(a.logprob - b.logprob) < 1e-5
        and np.allclose([p for _, p in a.top], [p for _, p in b.top], rtol=0, atol=1e-5)
        for a, b in pairs
    )


def assert_same(runner: Runner, actual: Result, expected: Result) -> None:
    assert actual.token_ids == expected.token_ids
    assert actual.finish_reason == expected.finish_reason
    assert same_logprobs(runner, actual.logprobs, expected.logprobs)


# ---- right -------------------------------------------------------------------------------------------------------


def log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted: np.ndarray = scores.astype(np.float64) - scores.max(-1, keepdims=True)
    normed: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normed


def assert_logprobs(result: Result, scores: np.ndarray) -> None:
    """scores: dense logits before each output token. Log-probabilities are the model's own, before any editing."""
    count = result.request.params.logprobs
    assert count is not None
    for token, given_, row in zip(result.token_ids, result.logprobs, log_softmax(scores), strict=True):
        assert abs(given_.logprob - row[token]) < DENSE_TOLERANCE
        assert len(given_.top) == count
        assert [p for _, p in given_.top] == sorted((p for _, p in given_.top), reverse=True)
        best = np.sort(row)[::-1][:count]
        assert np.abs(np.array([p for _, p in given_.top]) - best).max(initial=0) < DENSE_TOLERANCE
        assert all(abs(row[i] - p) < DENSE_TOLERANCE for i, p in given_.top)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 50])
def test_greedy_is_the_argmax_of_the_dense_pass(runner, length):
    """At every step, by induction: the dense pass over prompt and output has each output token as its first choice."""
    result = alone(runner, TEXTS[0][:length], GREEDY)
    assert len(result.token_ids) == GREEDY.max_tokens
    scores = dense_logits(runner, result.request.token_ids)[length - 1 : -1]
    assert result.token_ids == scores.argmax(-1).tolist()
    assert_logprobs(result, scores)


@pytest.mark.parametrize(("variant", "changes"), [("qwen3", {}), ("smollm2", {}), ("mistral", {"sliding_window": 16})])
@pytest.mark.parametrize("faster", [True, False], ids=["cpu", "reference"])
def test_greedy_of_other_architectures(tmp_path, variant, changes, faster):
    runner = load_runner(write_model(tmp_path / variant, variant, **MODEL | {"sliding_window": None} | changes), faster)
    result = alone(runner, TEXTS[1][:37], GREEDY)
    scores = dense_logits(runner, result.request.token_ids)[36:-1]
    assert result.token_ids == scores.argmax(-1).tolist()
    assert len(set(result.token_ids)) > 3, "a model that repeats itself shows little"


def naive_draw(scores: np.ndarray, params: SamplingParams, prompt: list[int], output: list[int]) -> int:
    """The next token from dense logits, by the definitions, with sorts and loops. `output` counts resumed tokens."""
    scores = scores.astype(np.float64)
    for token in set(prompt + output):
        scores[token] *= 1 / params.repetition_penalty if scores[token] > 0 else params.repetition_penalty
    for token, count in Counter(output).items():
        scores[token] -= params.presence_penalty + params.frequency_penalty * count
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    if params.temperature == 0:
        return int(scores.argmax())
    weights = np.exp((scores - scores.max()) / params.temperature)
    order: list[int] = [token for token in np.argsort(-weights).tolist() if weights[token] >= params.min_p]
    order = order[: params.top_k or VOCAB]
    mass = np.cumsum(weights[order])
    kept = order[: int(np.searchsorted(mass, params.top_p * mass[-1])) + 1]
    words = np.array([[params.seed & 0xFFFFFFFF, (params.seed >> 32) & 0xFFFFFFFF]], np.uint32)
    noise = np.asarray(gumbel(words, np.array([len(prompt) + len(output)], np.int32), VOCAB))[0]  # type: ignore[arg-type]
    return max(kept, key=lambda token: float(scores[token] / params.temperature + noise[token]))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 1.4, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 2**64 - 1},
        {"top_k": 3, "repetition_penalty": 1.0, "presence_penalty": 0.0, "seed": 2**40 + 3},
        {"top_k": 0, "top_p": 0.5, "frequency_penalty": 2.0, "logit_bias": {}},
        {"top_k": 0, "top_p": 1.0, "min_p": 0.2, "presence_penalty": -2.0, "repetition_penalty": 0.7},
        NEUTRAL | {"top_k": 4},
        NEUTRAL | {"top_p": 0.7},
        NEUTRAL | {"min_p": 0.1},
    ],
)
@pytest.mark.parametrize("resumed", [0, 9])
def test_every_draw_is_the_one_defined(runner, changes, resumed):
    params = msgspec.structs.replace(SAMPLED, **changes)
    result = alone(runner, TEXTS[2][:30], params, resumed=resumed)
    tokens, start = result.request.token_ids, 30 - resumed
    scores = dense_logits(runner, tokens)
    expected = [naive_draw(scores[i - 1], params, tokens[:start], tokens[start:i]) for i in range(30, len(tokens))]
    assert result.token_ids == expected
    assert_logprobs(result, scores[29:-1])


def test_how_streams_end(runner):
    prompt = TEXTS[0][:20]
    free = alone(runner, prompt, GREEDY).token_ids
    stop = next(token for token in free[1:] if token != free[0])
    at = free.index(stop)
    params = SamplingParams(max_tokens=40, temperature=0, stop_token_ids=(stop,), ignore_eos=True)
    result = alone(runner, prompt, params)
    assert (result.token_ids, result.finish_reason) == (free[: at + 1], "stop")
    result = alone(runner, prompt, SamplingParams(max_tokens=at + 1, temperature=0, ignore_eos=True))
    assert (result.token_ids, result.finish_reason) == (free[: at + 1], "length")
    force_end = SamplingParams(max_tokens=9, temperature=0, logit_bias={EOS: 100.0})
    result = alone(runner, prompt, force_end)
    assert (result.token_ids, result.finish_reason) == ([EOS], "stop")
    result = alone(runner, prompt, msgspec.structs.replace(force_end, ignore_eos=True))
    assert (result.token_ids, result.finish_reason) == ([EOS] * 9, "length")


# ---- the same whatever else is in the batch ----------------------------------------------------------------------

params_drawn = st.builds(
    SamplingParams,
    max_tokens=st.sampled_from([1, 2, 5, 12, 25, 40, 40]),
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 0, 8]),
    top_p=st.sampled_from([1.0, 1.0, 0.85]),
    min_p=st.sampled_from([0.0, 0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.25]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.75]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    logit_bias=st.sampled_from([{}, {}, {4: 2.0, 70: -3.0}]),
    logprobs=st.sampled_from([None, 0, 2]),
    seed=st.integers(-(2**63), 2**64 - 1),
    ignore_eos=st.booleans(),
)


@dataclass(frozen=True)
class Arrival:
    """A request and when it comes. leaves: the turn after which it is cancelled, if it has not ended by then."""

    text: int
    length: int
    tail: tuple[int, ...]
    params: SamplingParams
    turn: int
    leaves: int | None
    priority: int
    salt: str

    @property
    def prompt(self) -> list[int]:
        return TEXTS[self.text][: self.length] + list(self.tail)


arrivals_drawn = st.lists(
    st.builds(
        Arrival,
        text=st.sampled_from([0, 0, 1]),
        length=st.integers(1, 52) | st.sampled_from([16, 32, 48, 49, 52]),
        tail=st.lists(st.integers(0, VOCAB - 1), max_size=3).map(tuple),
        params=params_drawn,
        turn=st.integers(0, 12),
        leaves=st.sampled_from([None, None, None, 5, 15]),
        priority=st.sampled_from([0, 0, -1]),
        salt=st.sampled_from(["", "", "other"]),
    ),
    min_size=3,
    max_size=8,
)

_EXPECTED: dict[tuple[bool, bytes], Result] = {}


def expected_of(runner: Runner, arrival: Arrival) -> Result:
    """What the request gets alone; kept, because hypothesis tries variations of one case."""
    key = exact(runner), msgspec.json.encode((arrival.prompt, arrival.params))
    if key not in _EXPECTED:
        _EXPECTED[key] = alone(runner, arrival.prompt, arrival.params)
    return _EXPECTED[key]


def check_together(runner: Runner, arrivals: list[Arrival], max_num_seqs: int, token_budget: int) -> Counter[str]:
    """Runs the arrivals in one engine and compares each with itself alone; returns what happened on the way."""
    driver = Driver(runner, max_num_seqs, token_budget)
    results: dict[int, Result] = {}
    turn = 0
    while driver.busy or len(results) < len(arrivals):
        for index, arrival in enumerate(arrivals):
            if arrival.turn <= turn and index not in results:
                options = {"priority": arrival.priority, "cache_salt": arrival.salt}
                results[index] = driver.add(arrival.prompt, arrival.params, **options)
            if arrival.leaves is not None and index in results and turn == arrival.turn + arrival.leaves:
                driver.cancel(results[index])
        driver.turn()
        turn += 1
    driver.finish()
    happened: Counter[str] = Counter()
    for index, arrival in enumerate(arrivals):
        expected, result = expected_of(runner, arrival), results[index]
        if result.finish_reason is None:
            happened["cancelled"] += 1
            assert result.request.finish_reason == "cancelled"
            cut = len(result.token_ids)
            assert result.token_ids == expected.token_ids[:cut]
            assert same_logprobs(runner, result.logprobs, expected.logprobs[:cut])
        else:
            assert_same(runner, result, expected)
    happened["preemptions"] = driver.engine.scheduler.totals.preemptions
    happened["prefix hits"] = driver.engine.scheduler.totals.prefix_hits
    return happened


@pytest.mark.parametrize("kernels", ["cpu_runner", "reference_runner"])
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arrivals=arrivals_drawn, max_num_seqs=st.integers(1, 4), budget=st.sampled_from([20, 36, 64]))
def test_results_do_not_depend_on_the_batch(request, kernels, arrivals, max_num_seqs, budget):
    check_together(request.getfixturevalue(kernels), arrivals, max_num_seqs, budget)


@pytest.mark.parametrize("seed", range(2))
def test_results_do_not_depend_on_a_long_history(runner, seed):
    """As above, with more load than hypothesis draws: most steps run with a full cache."""
    random = Random(seed)
    arrivals = []
    for _ in range(25):
        params = SamplingParams(
            max_tokens=random.choice([1, 5, 20, 40, 40]),
            temperature=random.choice([0.0, 0.8, 1.4]),
            top_p=random.choice([1.0, 0.9]),
            presence_penalty=random.choice([0.0, 1.0]),
            repetition_penalty=random.choice([1.0, 1.2]),
            logprobs=random.choice([None, 2]),
            seed=random.getrandbits(64),
            ignore_eos=random.random() < 0.7,
        )
        arrivals.append(
            Arrival(
                text=random.choice([0, 1]),
                length=random.choice([random.randint(1, 20), random.randint(20, 52)]),
                tail=(random.randrange(VOCAB),),
                params=params,
                turn=random.randint(0, 60),
                leaves=random.choice([None, None, None, 4]),
                priority=random.choice([0, 0, -1]),
                salt="",
            )
        )
    happened = check_together(runner, arrivals, 4, 36)
    assert all(happened[what] for what in ("preemptions", "prefix hits", "cancelled")), happened


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_preemption_changes_nothing(runner, params):
    """Four sequences that together need three times the cache: each gives up its blocks and computes them again."""
    params = msgspec.structs.replace(params, max_tokens=60)
    driver = Driver(runner)
    prompts = [[n, *TEXTS[n % 3][: 20 + n]] for n in range(4)]
    results = [driver.add(prompt, params) for prompt in prompts]
    assert 2 * BLOCKS < 4 * (80 // 16)
    driver.finish()
    assert driver.engine.scheduler.totals.preemptions >= 2
    for prompt, result in zip(prompts, results, strict=True):
        assert_same(runner, result, alone(runner, prompt, params))


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_prefix_hits_change_nothing(runner, params):
    """A second turn of a conversation finds prompt and answer in the cache, and gives what it gives without."""
    driver = Driver(runner)
    first = driver.add(TEXTS[0][:37], params)
    driver.finish()
    prompt = [*first.request.token_ids[:60], 9, 8, 7]
    params = msgspec.structs.replace(params, max_tokens=20)
    again = driver.add(prompt, params)
    salted = driver.add(prompt, params, cache_salt="another workspace")
    driver.finish()
    expected = alone(runner, prompt, params)
    assert again.request.cached_tokens == 48, "what is computed of 37 + 24 tokens: three blocks"
    assert salted.request.cached_tokens == expected.request.cached_tokens == 0
    assert_same(runner, again, expected)
    assert_same(runner, salted, expected)


def test_the_chunk_budget_changes_nothing(runner):
    for length in (17, 50, 70):
        prompt = TEXTS[1][:length]
        results = []
        for budget in (20, 36, 64):
            driver = Driver(runner, token_budget=budget)
            results.append(driver.add(prompt, SAMPLED))
            driver.finish()
        for result in results[1:]:
            assert_same(runner, result, results[0])


# ---- a stream that moves -----------------------------------------------------------------------------------------


def unbroken(runner: Runner, params: SamplingParams) -> Result:
    return alone(runner, TEXTS[1][:21], params)


def rest_of(result: Result, emitted: int) -> tuple[list[int], SamplingParams]:
    """What the gateway sends another worker after `emitted` tokens: prompt and output so far, and what is left."""
    request = result.request
    left = msgspec.structs.replace(request.params, max_tokens=request.params.max_tokens - emitted)
    return request.token_ids[: request.num_prompt + emitted], left


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_stream_continues_from_any_token(runner, params):
    """The worker that takes over computes prompt and output as one prompt; the rest of the stream does not show it."""
    whole = unbroken(runner, params)
    for emitted in range(1, len(whole.token_ids)):
        prompt, left = rest_of(whole, emitted)
        result = alone(runner, prompt, left, resumed=emitted)
        assert result.token_ids == whole.token_ids[emitted:], emitted
        assert result.finish_reason == whole.finish_reason
        assert same_logprobs(runner, result.logprobs, whole.logprobs[emitted:]), emitted


def test_resumed_is_what_makes_penalties_continue(runner):
    """Without it, output would be taken for prompt: a test that could not tell them apart would prove nothing."""
    whole = unbroken(runner, SAMPLED)
    cuts = range(8, 20)
    assert any(alone(runner, *rest_of(whole, cut)).token_ids != whole.token_ids[cut:] for cut in cuts)


def test_streams_continue_in_a_busy_batch(runner):
    """Streams that were cut at different tokens arrive together, on a worker with too little room for them."""
    driver = Driver(runner, token_budget=36)
    cut = [(unbroken(runner, params), emitted) for params in (GREEDY, SAMPLED) for emitted in (3, 11, 20)]
    results = []
    for whole, emitted in cut:
        prompt, left = rest_of(whole, emitted)
        results.append(driver.add(prompt, left, resumed=emitted))
        driver.turn()
    driver.finish()
    for (whole, emitted), result in zip(cut, results, strict=True):
        assert result.token_ids == whole.token_ids[emitted:]
        assert same_logprobs(runner, result.logprobs, whole.logprobs[emitted:])


# ---- what others are told ----------------------------------------------------------------------------------------


def test_the_matchable_blocks_are_the_ones_told(runner):
    driver = Driver(runner)
    for n, salt in ((0, ""), (1, "a"), (2, "")):
        driver.add(TEXTS[n][:40], SAMPLED, cache_salt=salt)
    driver.finish()
    assert driver.matchable == set(driver.engine.matchable())
    assert driver.matchable
    known = {
        one
        for result in driver.results.values()
        for one in block_hashes(result.request.token_ids, result.request.cache_salt)
    }
    assert driver.matchable <= known


def test_counters(runner):
    driver = Driver(runner)
    done = [driver.add(TEXTS[n][:10], GREEDY) for n in range(2)]
    gone = driver.add(TEXTS[2][:10], GREEDY)
    driver.turn()
    driver.cancel(gone)
    driver.finish()
    counters = driver.engine.counters
    assert counters.prompt_tokens == 20
    assert counters.generation_tokens == sum(len(result.token_ids) for result in (*done, gone)) == 81
    assert counters.finished == {"length": 2}
    assert counters.steps == 40
