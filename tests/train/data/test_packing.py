"""Packing and the format of a row."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anypool.train.batch import Batch
from anypool.train.data.packing import best_fit
from anypool.train.data.rows import decode, encode


@given(st.integers(1, 40).flatmap(lambda size: st.tuples(st.lists(st.integers(1, size), max_size=60), st.just(size))))
def test_every_piece_once_and_no_row_too_long(case):
    lengths, capacity = case
    rows = best_fit(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= capacity for row in rows)
    # The bound of best-fit decreasing, 11/9 of the best there is and 6/9 (Dosa 2007), against a bound from below.
    assert len(rows) <= 11 / 9 * sum(np.asarray(lengths) > capacity / 2) + 11 / 9 * (2 * sum(lengths) / capacity) + 1
    assert best_fit(lengths, capacity) == rows


def test_fills_what_is_left():
    assert best_fit([6, 5, 5, 4, 7, 3], 10) == [[4, 5], [0, 3], [1, 2]]


@st.composite
def rows(draw):
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    kind = draw(st.sampled_from(["<u2", "<u4"]))
    most = 2**16 - 1 if kind == "<u2" else 2**31 - 1
    tokens = draw(st.lists(st.integers(0, most), min_size=sum(lengths), max_size=sum(lengths)))
    mask = draw(st.none() | st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths)))
    return np.asarray(tokens, kind), lengths, None if mask is None else np.asarray(mask), kind


@given(rows())
def test_a_row_comes_back(case):
    tokens, lengths, mask, kind = case
    found_tokens, found_lengths, found_mask = decode(encode(tokens, lengths, mask), kind, mask is not None)
    assert np.array_equal(found_tokens, tokens)
    assert list(found_lengths) == lengths
    assert np.array_equal(found_mask, np.ones(len(tokens), bool) if mask is None else mask)


@pytest.mark.parametrize("learn", ["all", "answers"])
def test_what_counts_as_learned_is_what_the_step_weighs(prepared_chats, learn):
    """`learned` of the manifest is the number of tokens in the loss of one pass."""
    prepared = prepared_chats(learn)
    weights = 0.0
    for some in prepared.train.in_order(3):
        weights += float(Batch.from_rows(some.tokens_RT, some.segments_RT, some.learned_RT).weights.sum())
    assert weights == prepared.manifest.train.learned > 0
