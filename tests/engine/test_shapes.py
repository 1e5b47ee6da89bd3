"""Every step the scheduler can make fits a compiled shape, and none that is much larger than it needs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anypool.engine.blocks import BlockPool
from anypool.engine.request import Request, SamplingParams
from anypool.engine.scheduler import Scheduler, SchedulerConfig, blocks_for
from anypool.engine.shapes import Shape, ShapeSet, doublings


@pytest.mark.parametrize(
    ("largest", "smallest", "expected"),
    [
        (1, 1, (1,)),
        (2, 1, (1, 2)),
        (8, 1, (1, 2, 4, 8)),
        (9, 1, (1, 2, 4, 8, 9)),
        (40, 16, (16, 32, 40)),
        (3, 16, (3,)),
    ],
)
def test_doublings(largest, smallest, expected):
    assert doublings(largest, smallest) == expected


def test_sizes_of_a_shape():
    shape = Shape(decode=3, tiles=2, blocks=5, samples=4)
    assert (shape.rows, shape.tokens) == (5, 35)
    assert str(shape) == "3+2x16 tokens, 80 context"


def test_the_shapes_of_the_default_worker():
    """A change here changes how long every first start takes, so it should be seen."""
    shapes = ShapeSet.make(32, 256, 8192, bounded_by_table=False)
    assert shapes.decode == (1, 2, 4, 8, 16, 32)
    assert shapes.mixed == (0, 4, 32)
    assert shapes.tiles == (1, 2, 4, 8, 16)
    assert shapes.blocks == (512,)
    assert len(shapes.all()) == 6 + 3 * 5
    assert ShapeSet.make(32, 256, 8192, bounded_by_table=True).blocks == (16, 64, 512)
    assert ShapeSet.make(32, 256, 100, bounded_by_table=True).blocks == (7,)


limits = st.tuples(st.integers(1, 40), st.integers(16, 300), st.integers(1, 2000), st.booleans())


@given(limits, st.data())
def test_a_step_fits_the_smallest_shape_that_holds_it(sizes, data):
    max_num_seqs, spare, max_model_len, bounded = sizes
    shapes = ShapeSet.make(max_num_seqs, max_num_seqs + spare, max_model_len, bounded)
    every = shapes.all()
    assert len(set(every)) == len(every)
    # Items cost 1 or tiles of 16; there are at most max_num_seqs, at least one.
    tiles = data.draw(st.integers(0, (max_num_seqs + spare) // 16))
    decode = data.draw(
        st.integers(0 if tiles else 1, min(max_num_seqs - (tiles > 0), max_num_seqs + spare - 16 * tiles))
    )
    blocks = data.draw(st.integers(1, blocks_for(max_model_len)))
    shape = shapes.fit(decode, tiles, blocks)
    assert shape in every, "warm-up would miss it"
    assert shape.decode >= decode
    assert shape.tiles >= tiles
    assert shape.blocks >= blocks
    assert shape.samples >= min(decode + tiles, max_num_seqs)
    # The factor promised: at most twice the tiles, and twice the rows where there is nothing else.
    assert (tiles == 0) == (shape.tiles == 0)
    assert shape.tiles < 2 * max(tiles, 1)
    if tiles == 0:
        assert shape.decode < 2 * decode
        assert shape.samples == shape.decode
    else:
        assert shape.decode in (0, min(4, max_num_seqs), max_num_seqs)
        assert shape.decode == 0 or decode > 0
        assert shape.decode <= 4 or decode > 4
    smaller = [
        other
        for other in every
        if other.decode >= decode
        and other.tiles >= tiles
        and other.blocks >= blocks
        and (other.tiles > 0) == (tiles > 0)
    ]
    assert shape == min(smaller, key=lambda other: (other.tokens, other.blocks))
    assert shape.samples < 2 * min(shape.decode + shape.tiles, max_num_seqs)


requests = st.lists(st.tuples(st.integers(1, 120), st.integers(1, 20), st.integers(0, 9)), min_size=1, max_size=12)


@given(requests, st.integers(1, 9), st.integers(0, 70), st.integers(8, 30), st.booleans())
def test_every_step_of_a_real_scheduler_fits(arrivals, max_num_seqs, spare, blocks, bounded):
    """Also after preemptions and prefix hits, where chunks start in the middle and single tokens are prompt tokens."""
    context, budget = 128, max_num_seqs + 16 + spare
    shapes = ShapeSet.make(max_num_seqs, budget, context, bounded)
    config = SchedulerConfig(vocab_size=9, max_model_len=context, max_num_seqs=max_num_seqs, token_budget=budget)
    scheduler = Scheduler(config, BlockPool(1 + blocks))
    due = sorted((turn, n) for n, (_, _, turn) in enumerate(arrivals))
    turn = 0
    while due or scheduler.requests:
        while due and due[0][0] <= turn:
            _, n = due.pop(0)
            length, max_tokens, _ = arrivals[n]
            params = SamplingParams(max_tokens=min(max_tokens, context - length))
            scheduler.add(Request(f"r{n}", [1] * length, params))
        turn += 1
        step = scheduler.schedule()
        if step is None:
            continue
        singles = [item for item in step.items if item.count == 1]
        tiles = sum(blocks_for(item.count) for item in step.items if item.count > 1)
        shape = shapes.fit(len(singles), tiles, max(blocks_for(item.start + item.count) for item in step.items))
        assert shape in shapes.all()
        assert shape.samples >= sum(item.samples for item in step.items)
        scheduler.finish_step(step, {item.request.id: 1 for item in step.items if item.samples})
