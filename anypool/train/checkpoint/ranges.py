"""Which bytes of a file a part of a tensor is, and how they get from there to the arrays that want them.

Tensors lie row by row. Of a part, what is read goes from its first row to its last, with the columns between: a gap
within a row is nearly always smaller than what another request costs. Where the gap is larger than GAP_BYTES, each row
is read alone.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from anypool.store import Store
from anypool.train.checkpoint.names import Region
from anypool.train.checkpoint.shards import Stored

Array = npt.NDArray[Any]

GAP_BYTES = 1024 * 1024
WINDOW_BYTES = 8 * 1024 * 1024  # of one request
AHEAD = 4  # requests on their way for one file


@dataclass
class Block:
    """Neighbouring bytes of a file, and the arrays that take parts of them.

    shape: of the rows they are. targets: (which part of the rows, array of that shape).
    """

    start: int
    stop: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    targets: list[tuple[tuple[slice, ...], Array]] = field(default_factory=list)
    _rows: Array | None = None
    _left: int = 0

    def put(self, start: int, data: memoryview) -> None:
        """Take what is ours of the bytes that begin at `start` of the file. Each byte comes once."""
        first, last = max(start, self.start), min(start + len(data), self.stop)
        if first >= last:
            return
        if self._rows is None:
            self._rows, self._left = self._room(), self.stop - self.start
        flat = self._rows.reshape(-1).view(np.uint8)
        flat[first - self.start : last - self.start] = np.frombuffer(data[first - start : last - start], np.uint8)
        self._left -= last - first
        if not self._left:
            for part, target in self.targets:
                if target is not self._rows:
                    target[...] = self._rows[part]
            self._rows = None

    def _room(self) -> Array:
        """The target itself if the bytes go there as they are."""
        for _, target in self.targets:
            if target.dtype == self.dtype and target.shape == self.shape and target.flags.c_contiguous:
                return target
        return np.empty(self.shape, self.dtype)


class Blocks:
    """All blocks of one file; the same bytes are one block, however many arrays take from them."""

    def __init__(self) -> None:
        self._by_range: dict[tuple[int, int], Block] = {}

    def add(self, stored: Stored, box: Region, target: Array) -> None:
        """target takes the part `box` of a stored tensor; both have the same number of axes."""
        self._add(stored.dtype, stored.shape, stored.start, box, target)

    def sorted(self) -> list[Block]:
        return [self._by_range[key] for key in sorted(self._by_range)]

    def _add(self, dtype: np.dtype[Any], shape: tuple[int, ...], start: int, box: Region, target: Array) -> None:
        if not target.size:
            return
        row = math.prod(shape[1:]) * dtype.itemsize
        (first, last), inner = box[0], box[1:]
        if row - _span(shape[1:], inner) * dtype.itemsize > GAP_BYTES:
            for i in range(first, last):
                self._add(dtype, shape[1:], start + i * row, inner, target[i - first])
            return
        key = (start + first * row, start + last * row)
        block = self._by_range.setdefault(key, Block(*key, dtype, (last - first, *shape[1:])))
        block.targets.append(((slice(None), *(slice(*axis) for axis in inner)), target))


def _span(shape: Sequence[int], box: Region) -> int:
    """From the first value of a part to its last, counted along a tensor's values."""
    last = 0
    for size, (start, stop) in zip(shape, box, strict=True):
        last = last * size + (stop - 1 - start)
    return last + 1


def needed(blocks: Sequence[Block]) -> list[tuple[int, int]]:
    """(start, length) of every request for sorted blocks: near ones together, none longer than a window."""
    merged: list[list[int]] = []
    for block in blocks:
        if merged and block.start - merged[-1][1] <= GAP_BYTES:
            merged[-1][1] = max(merged[-1][1], block.stop)
        else:
            merged.append([block.start, block.stop])
    return [window for start, stop in merged for window in windows(start, stop)]


def windows(start: int, stop: int) -> list[tuple[int, int]]:
    return [(at, min(WINDOW_BYTES, stop - at)) for at in range(start, stop, WINDOW_BYTES)]


def read(store: Store, key: str, ranges: Sequence[tuple[int, int]], pool: Executor) -> Iterator[tuple[int, bytes]]:
    """(start, bytes) of every range in order, with some requests under way ahead of what is taken."""
    waiting: deque[tuple[int, Future[bytes]]] = deque()
    for start, length in ranges:
        waiting.append((start, pool.submit(store.get_range, key, start, length)))
        if len(waiting) > AHEAD:
            at, future = waiting.popleft()
            yield at, future.result()
    for at, future in waiting:
        yield at, future.result()
