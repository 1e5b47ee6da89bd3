"""A step as arrays: where every token, block table and sample lies, and what each row's draw is told."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anypool.engine.batch import build, edit_bucket, logit_edits, sampling_rows
from anypool.engine.request import Request, SamplingParams
from anypool.engine.scheduler import Scheduled
from anypool.engine.shapes import ShapeSet
from anypool.ops.sampling import Sampler

SHAPES = ShapeSet.make(max_num_seqs=8, token_budget=128, max_model_len=160, bounded_by_table=False)
GREEDY = SamplingParams(max_tokens=9, temperature=0)


def request(length: int = 5, slot: int = 0, resumed: int = 0, output: tuple[int, ...] = (), **params) -> Request:
    """Token i of the prompt is 100 * slot + i."""
    prompt = [100 * slot + i for i in range(length)]
    made = Request(f"r{slot}", prompt, SamplingParams(**{"max_tokens": 9, "temperature": 0} | params), resumed=resumed)
    made.token_ids += output
    made.slot = slot
    return made


def item(of: Request, start: int, count: int) -> Scheduled:
    return Scheduled(of, start, count, start + count == of.num_tokens)


def tables(rows: int = 8, width: int = 10) -> np.ndarray:
    """Block j of slot i is 10 * i + j + 1."""
    return (10 * np.arange(rows)[:, None] + np.arange(width) + 1).astype(np.int32)


# ---- arrays ------------------------------------------------------------------------------------------------------


def test_layout():
    """A chunk first in the step's order still comes after the decode rows; each of its tiles is a row."""
    long, deciding, middle = request(40, slot=1), request(8, slot=2), request(70, slot=3)
    batch = build([item(long, 16, 24), item(deciding, 7, 1), item(middle, 0, 32)], tables(), SHAPES)
    assert (batch.shape.decode, batch.shape.tiles, batch.shape.blocks, batch.shape.samples) == (4, 4, 10, 8)
    assert batch.start_R.tolist() == [7, 0, 0, 0, 16, 32, 0, 16]
    assert batch.count_R.tolist() == [1, 0, 0, 0, 16, 8, 16, 16]
    own = tables()
    nothing = [0] * 10
    expected = [own[2].tolist(), nothing, nothing, nothing, *[own[1].tolist()] * 2, *[own[3].tolist()] * 2]
    assert batch.table_RM.tolist() == expected
    tokens = batch.tokens_T.tolist()
    assert tokens[:4] == [207, 0, 0, 0]
    assert tokens[4:28] == [100 + i for i in range(16, 40)]
    assert tokens[28:36] == [0] * 8
    assert tokens[36:] == [300 + i for i in range(32)]
    # `middle` is not at its last token: it draws nothing. Draws are in the order of rows.
    assert batch.requests == [deciding, long]
    assert batch.sample_S[:2].tolist() == [0, 27]
    assert batch.sampling.position[:2].tolist() == [8, 40]


def test_every_array_is_what_the_device_compiled_for():
    batch = build([item(request(3, slot=0), 2, 1)], tables(), SHAPES)
    shape = batch.shape
    assert (shape.decode, shape.tiles) == (1, 0)
    for array, size in (
        (batch.tokens_T, (1,)),
        (batch.start_R, (1,)),
        (batch.count_R, (1,)),
        (batch.table_RM, (1, 10)),
        (batch.sample_S, (1,)),
    ):
        assert (array.dtype, array.shape) == (np.int32, size)


def test_a_single_prompt_token_draws_nothing_before_the_last():
    """A chunk of one token, when a prefix hit or the budget leaves only one, is a decode row that samples or not."""
    first, last = request(20, slot=0), request(17, slot=1)
    batch = build([item(first, 3, 1), item(last, 16, 1)], tables(), SHAPES)
    assert (batch.shape.decode, batch.shape.tiles) == (2, 0)
    assert batch.requests == [last]
    assert batch.sample_S[0] == 1


def test_nothing_drawn():
    batch = build([item(request(40), 0, 16)], tables(), SHAPES)
    assert (batch.requests, batch.sampler) == ([], Sampler())
    assert batch.sample_S.tolist() == [0] * batch.shape.samples


items = st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.integers(1, 64), st.booleans()), min_size=1, max_size=8)


@given(items)
def test_every_scheduled_token_is_in_exactly_one_place(drawn):
    scheduled = []
    cost = 0
    for slot, (single, first_block, length, samples) in enumerate(drawn):
        count = 1 if single else length
        tiles = 0 if count == 1 else -(-count // 16)
        if cost + tiles > 8:
            continue
        cost += tiles
        start = 16 * first_block + (slot % 16 if count == 1 else 0)
        scheduled.append(item(request(start + count + (not samples), slot), start, count))
    batch = build(scheduled, tables(), SHAPES)
    placed = {}
    row_of = {}
    decode = batch.shape.decode
    for row in range(batch.shape.rows):
        first = row if row < decode else decode + 16 * (row - decode)
        width = 1 if row < decode else 16
        assert 0 <= batch.count_R[row] <= width
        for offset in range(batch.count_R[row]):
            slot = (batch.table_RM[row, 0] - 1) // 10
            position = batch.start_R[row] + offset
            assert (slot, position) not in placed
            placed[slot, position] = batch.tokens_T[first + offset]
            row_of[slot, position] = first + offset
        if batch.count_R[row] == 0:
            assert not batch.table_RM[row].any(), "padding writes outside scratch"
    assert placed == {
        (one.request.slot, position): one.request.token_ids[position]
        for one in scheduled
        for position in range(one.start, one.start + one.count)
    }
    sampled = {one.request.id: one for one in scheduled if one.samples}
    assert {made.id for made in batch.requests} == sampled.keys()
    for index, made in zip(batch.sample_S.tolist(), batch.requests, strict=False):
        assert index == row_of[made.slot, made.num_tokens - 1]


# ---- sampling rows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ([{}], Sampler()),
        # A greedy row has no use for filters.
        ([{"top_k": 5, "top_p": 0.5, "min_p": 0.1}], Sampler()),
        ([{"temperature": 0.5}], Sampler(draw=True)),
        ([{}, {"temperature": 0.5}, {}], Sampler(draw=True)),
        ([{"temperature": 1.0, "top_k": 5}], Sampler(draw=True, filters=True, edits=256)),
        ([{"temperature": 1.0, "top_p": 0.9}], Sampler(draw=True, filters=True, edits=256)),
        ([{"temperature": 1.0, "min_p": 0.1}], Sampler(draw=True, filters=True, edits=256)),
        ([{"logit_bias": {3: 1.0}}], Sampler(draw=True, filters=True, edits=256)),
        ([{"presence_penalty": 0.1}], Sampler()),  # nothing was generated yet
        ([{"repetition_penalty": 1.1}], Sampler(draw=True, filters=True, edits=256)),
        ([{"logit_bias": dict.fromkeys(range(257), 1.0)}], Sampler(draw=True, filters=True, edits=2048)),
        ([{"logprobs": 0}], Sampler(logprobs=True)),
        ([{"temperature": 1.0}, {"logprobs": 3}], Sampler(draw=True, logprobs=True)),
    ],
)
def test_the_least_sampler_that_serves_every_row(params, expected):
    sampler, rows = sampling_rows([request(slot=i, **one) for i, one in enumerate(params)], 8)
    assert sampler == expected
    assert rows.edit_ids.shape == (8, expected.edits)


def test_rows_hold_each_request_and_then_neutral_ones():
    first = request(7, slot=0, temperature=0.25, top_k=3, top_p=0.5, min_p=0.125, seed=5, repetition_penalty=1.5)
    _, rows = sampling_rows([first, request(3, slot=1)], 4)
    assert rows.temperature.tolist() == [0.25, 0, 0, 0]
    assert rows.top_k.tolist() == [3, 0, 0, 0]
    assert rows.top_p.tolist() == [0.5, 1, 1, 1]
    assert rows.min_p.tolist() == [0.125, 0, 0, 0]
    assert rows.repetition.tolist() == [1.5, 1, 1, 1]
    assert rows.position.tolist() == [7, 3, 0, 0]
    assert not rows.edit_seen[1:].any()


@pytest.mark.parametrize(
    ("seed", "low", "high"),
    [
        (0, 0, 0),
        (1, 1, 0),
        (2**32 - 1, 2**32 - 1, 0),
        (2**32, 0, 1),
        (0x0123456789ABCDEF, 0x89ABCDEF, 0x01234567),
        (2**64 - 1, 2**32 - 1, 2**32 - 1),
        (-1, 2**32 - 1, 2**32 - 1),
        (-2, 2**32 - 2, 2**32 - 1),
        (-(2**63), 0, 2**31),
    ],
)
def test_seed_words(seed, low, high):
    _, rows = sampling_rows([request(seed=seed)], 1)
    assert rows.seed.dtype == np.uint32
    assert rows.seed.tolist() == [[low, high]]


def test_position_is_absolute():
    """A stream that moved here draws with the number it would have drawn with where it was."""
    _, rows = sampling_rows([request(5, output=(1, 2)), request(7, slot=1, resumed=2), request(7, slot=2)], 3)
    assert rows.position.tolist() == [7, 7, 7]


@pytest.mark.parametrize("top_k", [2**31 - 1, 2**31, 2**63, 10**30])
def test_a_top_k_beyond_32_bits_keeps_all(top_k):
    _, rows = sampling_rows([request(temperature=1.0, top_k=top_k)], 1)
    assert rows.top_k.tolist() == [2**31 - 1]


@pytest.mark.parametrize(
    ("widest", "bucket"),
    [(0, 0), (1, 256), (256, 256), (257, 2048), (16385, 131072), (131073, 2**20), (200_000, 2**20)],
)
def test_edits_of_a_whole_vocabulary_have_a_bucket(widest, bucket):
    assert edit_bucket(widest) == bucket


# ---- edits -------------------------------------------------------------------------------------------------------


def edits(of: Request) -> dict[int, tuple[float, float]]:
    """token id -> (added, 1 where the repetition penalty applies)."""
    found = logit_edits(of)
    assert found is not None
    ids, bias, seen = found
    assert len(set(ids.tolist())) == len(ids), "an id that appears twice would be edited twice"
    return {token: (added, mark) for token, added, mark in zip(ids.tolist(), bias.tolist(), seen.tolist(), strict=True)}


def test_nothing_to_edit():
    assert logit_edits(request(output=(1, 1, 1))) is None


def test_penalties_count_output_and_not_the_prompt():
    made = request(3, output=(1, 50, 50, 50), presence_penalty=0.5, frequency_penalty=0.25)
    assert edits(made) == {1: (-0.75, 0), 50: (-1.25, 0)}


def test_penalties_count_what_was_generated_elsewhere():
    """Of the prompt 0 1 2 3 4 the last two were generated on another worker."""
    made = request(5, resumed=2, output=(4, 9), presence_penalty=0.5, frequency_penalty=0.25)
    assert edits(made) == {3: (-0.75, 0), 4: (-1.0, 0), 9: (-0.75, 0)}


def test_each_penalty_alone():
    assert edits(request(3, output=(7, 7), presence_penalty=-1.0)) == {7: (1.0, 0)}
    assert edits(request(3, output=(7, 7), frequency_penalty=-1.0)) == {7: (2.0, 0)}


def test_repetition_sees_the_prompt():
    made = request(3, output=(2, 50), repetition_penalty=1.3)
    assert edits(made) == {0: (0, 1), 1: (0, 1), 2: (0, 1), 50: (0, 1)}


def test_everything_at_once():
    """Bias and penalties add up on one id."""
    made = request(2, output=(1, 8), repetition_penalty=1.3, presence_penalty=0.5, logit_bias={8: 4.0, 9: -2.0})
    assert edits(made) == {0: (0, 1), 1: (-0.5, 1), 8: (3.5, 1), 9: (-2.0, 0)}


def test_edits_reach_their_row():
    _, rows = sampling_rows([request(), request(slot=1, logit_bias={70: 2.0, 9: -1.0})], 4)
    assert rows.edit_ids[1, :3].tolist() == [9, 70, 0]
    assert rows.edit_bias[1, :3].tolist() == [-1, 2, 0]
    assert not rows.edit_bias[[0, 2, 3]].any()
    assert not rows.edit_bias[1, 2:].any()
