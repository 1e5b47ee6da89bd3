"""The draw of the next token against oracles that sort, count and integrate."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.random import threefry_2x32

from anypool.ops.random import gumbel, threefry
from anypool.ops.sampling import (
    TOP_LOGPROBS,
    Sampler,
    SamplingRows,
    best,
    edit,
    first_argmax,
    keep_likely,
    sample,
)

draw = jax.jit(sample, static_argnames="sampler")
filter_scores = jax.jit(keep_likely)
FULL = Sampler(draw=True, filters=True, edits=8)


def rows(count: int, edits: int = 8, **values: Any) -> SamplingRows:
    neutral = SamplingRows.neutral(count, edits)
    for name, value in values.items():
        getattr(neutral, name)[...] = value
    return neutral


# ---- random numbers ----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=2), st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_threefry_is_the_published_one(key: list[int], counter: int) -> None:
    words = jnp.array([counter, counter ^ 0x5DEECE66], jnp.uint32)
    ours = threefry(jnp.uint32(key[0]), jnp.uint32(key[1]), words[0], words[1])
    assert np.array_equal(np.stack(ours), threefry_2x32(jnp.array(key, jnp.uint32), words))


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [  # known answers of Random123 1.14, kat_vectors, threefry2x32 with 20 rounds
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_known_answers(key: tuple[int, int], counter: tuple[int, int], expected: tuple[int, int]) -> None:
    words = threefry(*(jnp.uint32(word) for word in (*key, *counter)))
    assert tuple(int(word) for word in words) == expected


def test_noise_is_gumbel_distributed() -> None:
    noise = np.sort(np.asarray(gumbel(jnp.array([[7, 9]], jnp.uint32), jnp.array([3]), 200_001))[0])
    expected = np.exp(-np.exp(-noise))
    empirical = np.arange(1, noise.size + 1) / noise.size
    assert np.abs(expected - empirical).max() < 1.63 / np.sqrt(noise.size)  # Kolmogorov-Smirnov, 1%


def test_noise_depends_on_seed_and_position_alone() -> None:
    seeds = jnp.array([[1, 0], [1, 0], [2, 0], [1, 1]], jnp.uint32)
    noise = np.asarray(gumbel(seeds, jnp.array([5, 6, 5, 5]), 101))
    assert len({row.tobytes() for row in noise}) == 4
    alone = np.asarray(gumbel(seeds[2:3], jnp.array([5]), 101))[0]
    assert np.array_equal(alone, noise[2])


# ---- filters -----------------------------------------------------------------------------------------------------

scores_lists = st.lists(st.integers(-40, 40).map(lambda n: n / 4), min_size=2, max_size=40)


def kept_by_sorting(scores: np.ndarray, top_k: int, top_p: float, min_p: float) -> set[int]:
    """Min-p, then top-k, then top-p, by sorting; a token that ties with the last one kept is kept too."""
    weights = np.exp(scores - scores.max()).astype(np.float64)
    weights[weights < min_p] = 0
    if 0 < top_k < weights.size:
        weights[weights < np.sort(weights)[-top_k]] = 0
    if top_p < 1:
        order = np.sort(weights)[::-1]
        reached = np.cumsum(order) >= top_p * order.sum()
        weights[weights < order[np.argmax(reached)]] = 0
    return set(np.flatnonzero(weights).tolist())


@given(
    scores_lists,
    st.integers(0, 45),
    st.sampled_from([0.013, 0.31, 0.5, 0.77, 0.951, 1.0]),
    st.sampled_from([0.0, 0.0371, 0.42, 1.0]),
)
@settings(max_examples=150)
def test_filters_keep_what_sorting_keeps(scores: list[float], top_k: int, top_p: float, min_p: float) -> None:
    shifted = np.full((1, 40), -200, np.float32)  # one compiled width; e^-200 is 0, which no filter keeps
    shifted[0, : len(scores)] = np.array(scores, np.float32) - np.float32(max(scores))
    kept = np.asarray(filter_scores(jnp.asarray(shifted), rows(1, top_k=top_k, top_p=top_p, min_p=min_p)))[0]
    assert set(np.flatnonzero(kept > -1e29).tolist()) == kept_by_sorting(shifted[0], top_k, top_p, min_p)


def test_filters_never_leave_nothing() -> None:
    flat = jnp.zeros((1, 50))
    kept = np.asarray(keep_likely(flat, rows(1, top_k=1, top_p=1e-6, min_p=1.0)))
    assert (kept > -1e29).all()  # all tie with the best


# ---- draws -------------------------------------------------------------------------------------------------------


def draws(scores: np.ndarray, count: int, **values: float) -> np.ndarray:
    many = rows(count, 8, seed=(11, 5), position=np.arange(count), **values)
    logits = jnp.broadcast_to(jnp.asarray(scores, jnp.float32), (count, scores.size))
    return np.asarray(draw(logits, many, sampler=FULL).token)


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    scores = np.array([1.0, 0.0, -1.0, 2.0, 0.5, -2.0, 1.5, 0.25])
    counts = np.bincount(draws(scores, 20_000, temperature=temperature), minlength=8)
    weights = np.exp(scores / temperature)
    assert chi_square(counts, weights / weights.sum()) < 24.3  # 7 degrees of freedom, 0.1%


def test_filtered_draws_follow_the_renormalised_softmax() -> None:
    scores = np.array([1.0, 0.0, -1.0, 2.0, 0.5, -2.0, 1.5, 0.25])
    counts = np.bincount(draws(scores, 20_000, temperature=1.0, top_k=3), minlength=8)
    weights = np.where(scores >= 1.0, np.exp(scores), 0)
    assert counts[weights == 0].sum() == 0
    assert chi_square(counts[weights > 0], (weights / weights.sum())[weights > 0]) < 13.8  # 2 degrees, 0.1%


def test_greedy_rows_are_greedy_beside_drawn_ones() -> None:
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((6, 300)), jnp.float32)
    mixed = rows(6, temperature=[0, 5, 0, 5, 0, 5], seed=(3, 4))
    for sampler in (Sampler(draw=True), FULL):
        token = np.asarray(draw(logits, mixed, sampler=sampler).token)
        assert np.array_equal(token[::2], np.argmax(logits, axis=-1)[::2])
    assert not np.array_equal(token[1::2], np.argmax(logits, axis=-1)[1::2])


def test_a_row_draws_the_same_token_by_every_sampler_and_in_every_batch() -> None:
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((16, 500)), jnp.float32)
    many = rows(16, temperature=0.8, seed=(9, 2), position=np.arange(16))
    together = np.asarray(draw(logits, many, sampler=Sampler(draw=True)).token)
    assert np.array_equal(together, np.asarray(draw(logits, many, sampler=FULL).token))
    for row in range(16):
        one = rows(1, temperature=0.8, seed=(9, 2), position=row)
        assert int(draw(logits[row : row + 1], one, sampler=Sampler(draw=True)).token[0]) == together[row]


# ---- edits and log-probabilities -----------------------------------------------------------------------------------


def test_penalties_and_bias() -> None:
    logits = jnp.array([[2.0, -2.0, 1.0, 0.0, 3.0]])
    values = SamplingRows.neutral(1, 4)
    values.repetition[...] = 2.0
    values.edit_ids[0] = [0, 1, 4, 0]  # the last one is unused: id 0, which is also edited in earnest
    values.edit_bias[0] = [0.0, -0.5, 1.25, 0.0]
    values.edit_seen[0] = [1, 1, 0, 0]
    assert np.allclose(edit(logits, values), [[1.0, -4.5, 1.0, 0.0, 4.25]])


@given(st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=4))
@settings(max_examples=30)
def test_first_argmax_is_numpys(table: list[list[int]]) -> None:
    scores = np.array(table, np.float32)
    assert np.array_equal(first_argmax(jnp.asarray(scores)), np.argmax(scores, axis=-1))


def test_best_is_a_stable_sort() -> None:
    scores = np.random.default_rng(2).integers(-5, 5, (3, 60)).astype(np.float32)
    ids, values = best(jnp.asarray(scores), TOP_LOGPROBS)
    order = np.argsort(-scores, axis=-1, kind="stable")[:, :TOP_LOGPROBS]
    assert np.array_equal(ids, order)
    assert np.array_equal(values, np.take_along_axis(scores, order, axis=-1))


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = np.random.default_rng(3).standard_normal((2, 40)).astype(np.float32) * 3
    values = rows(2, temperature=0.7, top_k=5, seed=(1, 2))
    values.edit_bias[:, 0] = -50
    reporting = Sampler(draw=True, filters=True, edits=8, logprobs=True)
    drawn = draw(jnp.asarray(logits), values, sampler=reporting)
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    assert np.allclose(drawn.logprob, exact[np.arange(2), drawn.token], atol=1e-5)
    assert np.array_equal(drawn.top_ids[:, 0], logits.argmax(-1))
    assert np.allclose(drawn.top_logprobs, np.take_along_axis(exact, np.asarray(drawn.top_ids), -1), atol=1e-5)
