"""Which rows a step learns from: a function of seed and step, with no state.

So a run goes on from its step number alone, wherever it is and on however many hosts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import grain
from blake3 import blake3

from anypool.train.data.errors import DataError
from anypool.train.data.rows import Rows, RowStore, SampleId, gather


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
        self._orders = [_order(store, seed) for store in self._stores]

    def sample(self, number: int) -> tuple[RowStore, SampleId]:
        """Sample `number` of the run, from 0: step s has those from s * rows on."""
        index, nth = drawn(number, self._shares)
        store = self._stores[index]
        return store, SampleId(store.name, int(self._orders[index][nth]), nth // len(store))

    def rows_at(self, step: int, part: slice | None = None) -> Rows:
        """The rows of a step, from 0. part: which of them this host needs; only those are read.

        Raises DataError if a row cannot be read.
        """
        chosen = range(step * self.rows, (step + 1) * self.rows)[part or slice(None)]
        return gather([self.sample(number) for number in chosen], len(chosen))


def _order(store: RowStore, seed: int) -> Any:
    """Endless: draw number -> row. The seed is the dataset's own, so that another dataset beside it changes nothing."""
    own = int.from_bytes(blake3(f"{seed}/{store.name}".encode()).digest(4), "little")
    return grain.MapDataset.range(len(store)).seed(own).shuffle().repeat()
