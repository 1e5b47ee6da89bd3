"""Reading ahead: the same rows in the same order, from any step, and nothing left behind."""

import threading

import numpy as np
import pytest

from anypool.train.data import DataError, Reader, Rows, SampleId


class Numbered:
    """Rows that say their step. Counts what is asked for; `hold` keeps readers waiting, `bad` is a step that fails."""

    def __init__(self, bad=None):
        self.asked = []
        self.hold = threading.Event()
        self.hold.set()
        self.bad = bad

    def rows_at(self, step, part=None):
        self.asked.append((step, part))
        assert self.hold.wait(60)
        if step == self.bad:
            raise DataError("row 3 cannot be read")
        tokens = np.full((4, 2), step, np.int32)[part or slice(None)]
        return Rows(tokens, np.ones_like(tokens), np.ones(tokens.shape, bool), (SampleId("x", step, 0),))


@pytest.mark.parametrize("ahead", [1, 3])
def test_steps_in_order_from_any(ahead):
    numbered = Numbered()
    with Reader(numbered, first_step=7, part=slice(1, 3), ahead=ahead) as reader:
        found = [next(reader) for _ in range(20)]
    assert [step for step, _ in found] == list(range(7, 27))
    assert all((rows.tokens_RT == step).all() and rows.tokens_RT.shape == (2, 2) for step, rows in found)
    assert sorted(step for step, _ in numbered.asked) == list(range(7, 7 + len(numbered.asked)))
    assert len(numbered.asked) <= 20 + ahead
    assert all(part == slice(1, 3) for _, part in numbered.asked)


def test_an_error_comes_at_its_step_and_again():
    with Reader(Numbered(bad=2), ahead=4) as reader:
        assert [next(reader)[0], next(reader)[0]] == [0, 1]
        for _ in range(2):
            with pytest.raises(DataError, match="row 3 cannot be read"):
                next(reader)


def test_close_ends_the_threads():
    before = set(threading.enumerate())
    numbered = Numbered()
    numbered.hold.clear()
    reader = Reader(numbered, ahead=2)
    assert set(threading.enumerate()) - before
    numbered.hold.set()
    reader.close()
    assert set(threading.enumerate()) == before
    assert list(reader) == []
    reader.close()
