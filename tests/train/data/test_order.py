"""The order of the data: the same for any number of hosts, each row once a pass, and mixed as the weights say."""

import itertools
from collections import Counter
from fractions import Fraction
from math import ceil

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from anypool.train.data import DataError, Mixture, RowStore
from anypool.train.data.order import drawn, shares, shuffled
from anypool.train.data.rows import Shard, encode

LENGTH = 8
SIZES = {"a": 1, "b": 7, "c": 24, "d": 50}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Datasets by name; the tokens of a row say which row it is. In two files, where there are rows enough."""
    made = {}
    for index, (name, size) in enumerate(SIZES.items()):
        folder = tmp_path_factory.mktemp(name)
        shards = []
        for part, rows in enumerate(np.array_split(np.arange(size), min(2, size))):
            writer = ArrayRecordWriter(str(folder / str(part)), "group_size:1")
            for row in rows:
                tokens = np.asarray([index, row, *range(row % (LENGTH - 2))], "<u2")
                writer.write(encode(tokens, [len(tokens)], None))
            writer.close()
            shards.append(Shard(str(part), len(rows), (folder / str(part)).stat().st_size))
        made[name] = RowStore(name, folder, shards, LENGTH, "<u2", masked=False)
    return made


def mixture(stores, weights, seed=3, rows=6):
    return Mixture([(stores[name], weight) for name, weight in weights.items()], seed=seed, rows=rows)


def same(one, other):
    return one.ids == other.ids and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ("tokens_RT", "segments_RT", "learned_RT")
    )


ROWS = st.integers(1, 12)
weights = st.dictionaries(st.sampled_from(sorted(SIZES)), st.sampled_from([0.1, 0.25, 1, 2.5, 7]), min_size=1)


@settings(max_examples=40, deadline=None)
@given(
    weights, st.integers(0, 2**40), st.integers(0, 10**9), st.lists(st.integers(0, 12), max_size=5), st.integers(1, 12)
)
def test_hosts_together_have_the_batch(stores, weights, seed, step, cuts, rows):
    mixed = mixture(stores, weights, seed, rows)
    whole = mixed.rows_at(step)
    assert whole.tokens_RT.shape == whole.segments_RT.shape == whole.learned_RT.shape == (rows, LENGTH)
    edges = sorted({0, rows, *(min(cut, rows) for cut in cuts)})
    parts = [mixed.rows_at(step, slice(start, stop)) for start, stop in itertools.pairwise(edges)]
    for name in ("tokens_RT", "segments_RT", "learned_RT"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))
    assert tuple(id for part in parts for id in part.ids) == whole.ids
    # Another process, at the same step, with what happened before forgotten.
    assert same(mixture(stores, weights, seed, rows).rows_at(step), whole)


def test_a_part_reads_only_its_rows(stores, monkeypatch):
    read = []
    fill = RowStore.fill
    monkeypatch.setattr(RowStore, "fill", lambda self, row, *arrays: (read.append(row), fill(self, row, *arrays)))
    part = mixture(stores, {"d": 1}, rows=8).rows_at(5, slice(2, 4))
    assert read == [id.row for id in part.ids]
    assert len(read) == 2


@settings(max_examples=15, deadline=None)
@given(weights, st.integers(0, 2**32), st.integers(5, 30))
def test_each_row_once_in_every_pass(stores, weights, seed, rows):
    mixed = mixture(stores, weights, seed, rows)
    seen: dict[tuple[str, int], list[int]] = {}
    for step in range(3 * sum(SIZES.values()) // rows + 1):
        for id in mixed.rows_at(step).ids:
            seen.setdefault((id.dataset, id.passed), []).append(id.row)
    for (name, passed), found in seen.items():
        assert len(set(found)) == len(found)
        if (name, passed + 1) in seen:
            assert sorted(found) == list(range(SIZES[name]))


def test_rows_are_those_that_ids_name(stores):
    some = mixture(stores, {"b": 1, "d": 2}, rows=30).rows_at(2)
    for index, id in enumerate(some.ids):
        assert some.tokens_RT[index, :2].tolist() == [sorted(SIZES).index(id.dataset), id.row]
        assert some.segments_RT[index].tolist() == [1] * (2 + id.row % 6) + [0] * (6 - id.row % 6)
        assert some.learned_RT[index].tolist() == [True] * (2 + id.row % 6) + [False] * (6 - id.row % 6)


@settings(deadline=None)
@given(st.integers(1, 3000), st.text(max_size=5))
def test_a_shuffle_has_everything_once(size, key):
    assert sorted(shuffled(np.arange(size), size, key).tolist()) == list(range(size))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 2**40).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), unique=True))))
def test_a_part_of_a_shuffle_is_part_of_the_whole(case):
    size, places = case
    together = shuffled(np.asarray(places, np.int64), size, "key").tolist()
    assert together == [int(shuffled(np.asarray([place]), size, "key")[0]) for place in places]
    assert len(set(together)) == len(places)
    assert all(0 <= row < size for row in together)


def test_every_order_is_as_likely():
    """All 24 orders of four rows over 2400 keys: chi-squared with 23 degrees of freedom, 99.9 % are below 49.7."""
    counts = Counter(tuple(shuffled(np.arange(4), 4, str(key)).tolist()) for key in range(2400))
    assert len(counts) == 24
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 49.7


@pytest.mark.parametrize("size", [1000, 1024, 65537])
def test_a_shuffle_keeps_nothing_of_the_order(size):
    """Correlations of places, of neighbours and of parity are within four standard deviations of none."""
    found = shuffled(np.arange(size), size, "a key").astype(float)
    for one, other in ((found, np.arange(size)), (found[1:], found[:-1]), (found % 2, np.arange(size) % 2)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 4 / size**0.5
    assert abs(np.sum(found == np.arange(size)) - 1) <= 4


def test_passes_and_seeds_differ(stores):
    def order(seed, passed, beside=None):
        mixed = mixture(stores, {"d": 1} | (beside or {}), seed, rows=1)
        ids = [id for _, id in mixed.samples(range(300))]
        return [id.row for id in ids if id.dataset == "d" and id.passed == passed]

    assert len(order(3, 0)) == len(order(3, 1)) == 50
    assert order(3, 0) != order(3, 1)
    assert order(3, 0) != order(4, 0)
    assert order(3, 1) != order(4, 0)
    assert order(3, 0) == order(3, 0, {"c": 1})


def test_the_order_stays_what_it_is(stores):
    """A run that goes on with another version of the libraries must see what it would have seen."""
    mixed = mixture(stores, {"b": 1, "d": 3}, seed=11, rows=8)
    found = [(id.dataset, id.row, id.passed) for step in (0, 9) for id in mixed.rows_at(step).ids]
    assert found == ORDER


@given(st.lists(st.decimals("0.001", "1000", places=3), min_size=1, max_size=6).map(lambda w: [float(x) for x in w]))
def test_shares_are_exact(weights):
    whole = shares(weights)
    for one, share in zip(weights, whole, strict=True):
        assert Fraction(str(one)) * sum(whole) == share * sum(Fraction(str(w)) for w in weights)


@settings(max_examples=60)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(0, 10**15))
def test_weights_are_honoured_and_nothing_is_skipped(shares, start):
    """In any stretch each dataset's draws follow one another, and number its part within the number of datasets."""
    total, count = sum(shares), 200
    first, last = {}, {}
    for sample in range(start, start + count):
        index, nth = drawn(sample, shares)
        assert nth == last.get(index, nth - 1) + 1
        first.setdefault(index, nth)
        last[index] = nth
    for index, nth in last.items():
        assert abs(nth + 1 - Fraction((start + count) * shares[index], total)) <= len(shares)
    for index, share in enumerate(shares):
        had = last[index] - first[index] + 1 if index in last else 0
        assert abs(had - Fraction(count * share, total)) <= 2 * len(shares)


def test_the_first_samples_start_at_the_first_draw():
    drawn_first = [drawn(sample, [3, 1]) for sample in range(8)]
    assert drawn_first == [(0, 0), (0, 1), (0, 2), (1, 0), (0, 3), (0, 4), (0, 5), (1, 1)]


def test_evaluation_goes_through_all_rows_once(stores):
    for rows in (1, 4, 50, 64):
        found = list(stores["d"].in_order(rows))
        assert len(found) == ceil(50 / rows)
        assert all(some.tokens_RT.shape == (rows, LENGTH) for some in found)
        assert [id.row for some in found for id in some.ids] == list(range(50))
        assert not found[-1].segments_RT[len(found[-1].ids) :].any()
        halves = [list(stores["d"].in_order(rows, part)) for part in (slice(0, rows // 2), slice(rows // 2, rows))]
        for one, other, whole in zip(*halves, found, strict=True):
            assert np.array_equal(np.concatenate([one.tokens_RT, other.tokens_RT]), whole.tokens_RT)


def test_bad_mixtures(stores, tmp_path):
    b, empty = stores["b"], RowStore("none", tmp_path, [], LENGTH, "<u2", masked=False)
    longer = RowStore("longer", b._folder, [], 2 * LENGTH, "<u2", masked=False)
    longer._source = b._source
    for parts, changes, expected in [
        ([], {}, "sources: there is none"),
        ([(b, 1), (b, 2)], {}, "sources: two are named b; give each a name of its own"),
        ([(empty, 1)], {}, "sources: none has no rows; remove it"),
        ([(b, 1), (longer, 1)], {}, "sequence_length differs between sources: {'b': 8, 'longer': 16}"),
        ([(b, 0)], {}, "weight of b = 0: must be a number above 0"),
        ([(b, float("nan"))], {}, "weight of b = nan: must be a number above 0"),
        ([(b, 1)], {"rows": 0}, "rows = 0: a step needs at least one row"),
        ([(b, 1)], {"seed": -1}, "seed = -1: must be 0 or more"),
    ]:
        with pytest.raises(DataError) as caught:
            Mixture(parts, **{"seed": 0, "rows": 1} | changes)
        assert str(caught.value).startswith(expected)


def test_a_damaged_file(stores, tmp_path):
    path = tmp_path / "0"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for _ in range(4):
        writer.write(encode(np.arange(6, dtype="<u2"), [6], None))
    writer.close()
    shard = Shard("0", 4, path.stat().st_size)
    path.write_bytes(bytes(path.stat().st_size))
    broken = Mixture([(RowStore("x", tmp_path, [shard], LENGTH, "<u2", masked=False), 1)], seed=0, rows=1)
    with pytest.raises(DataError, match=f"row . of {tmp_path} cannot be read .*; delete the folder"):
        broken.rows_at(0)
    path.write_bytes(b"short")
    with pytest.raises(DataError, match="is missing or damaged; delete"):
        RowStore("x", tmp_path, [shard], LENGTH, "<u2", masked=False)


ORDER = [
    ("b", 2, 0), ("d", 14, 0), ("d", 15, 0), ("d", 20, 0), ("b", 1, 0), ("d", 8, 0), ("d", 18, 0), ("d", 21, 0),
    ("b", 4, 2), ("d", 0, 1), ("d", 13, 1), ("d", 30, 1), ("b", 6, 2), ("d", 25, 1), ("d", 34, 1), ("d", 7, 1),
]  # fmt: skip
