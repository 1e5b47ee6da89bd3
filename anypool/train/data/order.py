"""Which rows a step learns from: a function of seed and step, with no state.

So a run goes on from its step number alone, wherever it is and on however many hosts. All of it is integer arithmetic
of our own, so that no library's next version changes what a run sees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from blake3 import blake3

from anypool.train.data.errors import DataError
from anypool.train.data.rows import Rows, RowStore, SampleId, gather

ROUNDS = 64
"""Of the shuffle. Each moves half of the elements to anywhere, so nothing is left of the order after so many."""

# Odd numbers without a pattern: those of SplitMix64 (Steele, Lea and Flood 2014).
_MULTIPLY_BY = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9], np.uint64)
_HALF, _HIGHEST = np.uint64(32), np.uint64(2**63)


def shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as the smallest whole numbers in exactly their ratio, taken as they are written in decimals."""
    exact = [Fraction(str(weight)) for weight in weights]
    whole = [fraction * math.lcm(*(f.denominator for f in exact)) for fraction in exact]
    divisor = math.gcd(*(int(number) for number in whole))
    return tuple(int(number) // divisor for number in whole)


def drawn(sample: int, shares: Sequence[int]) -> tuple[int, int]:
    """Of which dataset sample number `sample` is, and the how manieth of that dataset, from 0.

    The first dataset takes its share of the samples, evenly spread; the next its share of what is left; and so on. In
    whole numbers, so that shares hold exactly in the long run: of any first N samples a dataset has its part of N
    within the number of datasets.
    """
    left = sum(shares)
    for index, share in enumerate(shares):
        before = sample - sample * (left - share) // left
        after = sample + 1 - (sample + 1) * (left - share) // left
        if after > before:
            return index, before
        sample -= before
        left -= share
    raise AssertionError("the last dataset takes all that is left")


def shuffled(places: np.ndarray, size: int, key: str) -> np.ndarray:
    """What stands at `places`, int64 from 0 to below `size`, when 0 ... size - 1 are shuffled.

    The swap-or-not shuffle (Hoang, Morris and Rogaway 2012): in each round every element has a partner, and a random
    bit of the pair says whether they change places. It needs no memory, whatever the size, and gives every order.
    """
    keys = np.frombuffer(blake3(key.encode()).digest(16 * ROUNDS), "<u8").reshape(2, ROUNDS)
    n, x = np.uint64(size), places.astype(np.uint64)
    for pivot, salt in zip(keys[0] % n + n, keys[1], strict=True):
        partner = (pivot - x) % n
        # The bit is the highest of a hash of the pair; each multiplication carries every bit of it upwards.
        hash = np.maximum(x, partner) * _MULTIPLY_BY[0] ^ salt
        hash ^= hash >> _HALF
        hash *= _MULTIPLY_BY[1]
        np.copyto(x, partner, where=hash >= _HIGHEST)
    return x.astype(np.int64)


class Mixture:
    """Datasets mixed by weight, each shuffled anew whenever all of its rows were seen."""

    def __init__(self, parts: Sequence[tuple[RowStore, float]], *, seed: int, rows: int) -> None:
        """rows: of a step, on all hosts together. Raises DataError."""
        names = [store.name for store, _ in parts]
        lengths = {store.name: store.sequence_length for store, _ in parts}
        if not parts:
            raise DataError("sources: there is none; a run needs at least one")
        if repeated := {name for name in names if names.count(name) > 1}:
            raise DataError(f"sources: two are named {', '.join(sorted(repeated))}; give each a name of its own")
        if empty := [store.name for store, _ in parts if not len(store)]:
            raise DataError(f"sources: {', '.join(empty)} has no rows; remove it")
        if len(set(lengths.values())) > 1:
            raise DataError(f"sequence_length differs between sources: {lengths}; prepare all with the same")
        if bad := [(store.name, weight) for store, weight in parts if not 0 < weight < math.inf]:
            raise DataError(f"weight of {bad[0][0]} = {bad[0][1]!r}: must be a number above 0")
        if rows < 1:
            raise DataError(f"rows = {rows}: a step needs at least one row")
        if seed < 0:
            raise DataError(f"seed = {seed}: must be 0 or more")
        self.rows = rows
        self._stores = [store for store, _ in parts]
        self._shares = shares([weight for _, weight in parts])
        self._seed = seed

    def samples(self, numbers: Sequence[int]) -> list[tuple[RowStore, SampleId]]:
        """Samples of the run by their number, from 0: step s has `rows` of them from s * rows on."""
        by_pass: dict[tuple[int, int], list[tuple[int, int]]] = {}  # dataset and pass -> place here, place in the pass
        for place, number in enumerate(numbers):
            index, nth = drawn(number, self._shares)
            passed, within = divmod(nth, len(self._stores[index]))
            by_pass.setdefault((index, passed), []).append((place, within))
        found: dict[int, tuple[RowStore, SampleId]] = {}
        for (index, passed), places in by_pass.items():
            store = self._stores[index]
            # The dataset's own shuffle, so that another dataset beside it changes nothing.
            key = f"{self._seed}/{passed}/{store.name}"
            rows = shuffled(np.asarray([within for _, within in places], np.int64), len(store), key)
            for (place, _), row in zip(places, rows.tolist(), strict=True):
                found[place] = store, SampleId(store.name, row, passed)
        return [found[place] for place in range(len(numbers))]

    def rows_at(self, step: int, part: slice | None = None) -> Rows:
        """The rows of a step, from 0. part: which of them this host needs; only those are read.

        Raises DataError if a row cannot be read.
        """
        chosen = range(step * self.rows, (step + 1) * self.rows)[part or slice(None)]
        return gather(self.samples(chosen), len(chosen), self._stores[0].sequence_length)
