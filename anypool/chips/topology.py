"""Which arrangements of a chip exist: shapes of a torus for TPUs, counts in hosts for the others."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from anypool.chips.errors import TargetError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Topology:
    """The rule of one chip.

    shapes: the small ones, listed: `((2, 2, 1), (2, 2, 2), …)`; for one dimension the counts: `((1,), (2,), …)`.
    multiple_of: what else exists: every dimension a multiple of this, in ascending order, up to `largest` chips;
        None if only `shapes` exist.
    largest: chips in the largest one; None where there is no limit.
    name_counts: what N is in the vendor's names such as `v5p-N`: "cores", "chips", or "" if there are none.
    source: where the rule is from.
    """

    dimensions: int
    shapes: tuple[Shape, ...]
    multiple_of: int | None = None
    largest: int | None = None
    name_counts: str = ""
    source: str = ""

    def parse(self, text: str) -> Shape:
        """The shape that `text` names, such as "4x4x8" or "16". Raises TargetError, saying which exist."""
        if not re.fullmatch(r"[1-9][0-9]{0,6}(x[1-9][0-9]{0,6})*", text):
            raise TargetError(f"topology {text!r}: write it like {self.example!r}")
        shape = tuple(int(part) for part in text.split("x"))
        if not self.exists(shape):
            chips = math.prod(shape)
            near = self.near(chips)
            hint = f"; with {chips} chips: {write(near)}" if near and math.prod(near) == chips else ""
            if not hint and near:
                hint = f"; the nearest is {write(near)}"
            raise TargetError(f"there is no topology {text!r}: {self.what_exists}{hint}")
        return shape

    def exists(self, shape: Shape) -> bool:
        """Whether chips can be had in this shape."""
        if len(shape) != self.dimensions:
            return False
        return shape in self.shapes or self._follows_rule(shape)

    def near(self, chips: int) -> Shape | None:
        """The existing shape whose number of chips is nearest, the most cubic of those; the smaller of two."""
        shapes = [*self.shapes, *self._larger(chips)]
        if not shapes:
            return None
        return min(shapes, key=lambda shape: (abs(math.prod(shape) - chips), math.prod(shape), max(shape)))

    @property
    def example(self) -> str:
        """One that exists, as text."""
        return write(self.shapes[-1] if self.shapes else (self.multiple_of or 1,) * self.dimensions)

    @property
    def what_exists(self) -> str:
        """In words: which shapes exist."""
        words = [f"{', '.join(write(shape) for shape in self.shapes)} exist"] if self.shapes else []
        if self.multiple_of:
            limit = f" up to {self.largest} chips" if self.largest else ""
            if self.dimensions > 1:
                rule = f"AxBxC with A <= B <= C, each a multiple of {self.multiple_of},{limit}".rstrip(",")
            else:
                rule = f"any multiple of {self.multiple_of}{limit}" if self.multiple_of > 1 else f"any number{limit}"
            words.append(rule)
        return ", and ".join(words)

    def _follows_rule(self, shape: Shape) -> bool:
        if self.multiple_of is None or any(axis % self.multiple_of for axis in shape):
            return False
        return shape == tuple(sorted(shape)) and (self.largest is None or math.prod(shape) <= self.largest)

    def _larger(self, chips: int) -> list[Shape]:
        """The shapes of the rule that can be nearest to `chips`."""
        if self.multiple_of is None:
            return []
        step = self.multiple_of
        limit = (self.largest or chips + step) // step**self.dimensions
        if self.dimensions == 1:
            below = min(max(chips // step, 1), limit)
            return [(below * step,), (min(below + 1, limit) * step,)]
        # Counted in cubes of `step`; whatever is nearest holds at most one row of cubes more than asked for.
        most = min(limit, 2 * (chips // step**self.dimensions + 1))
        return [tuple(step * axis for axis in shape) for shape in _ascending(self.dimensions, most)]


def _ascending(dimensions: int, most: int, first: int = 1) -> Iterator[Shape]:
    """Every non-descending shape whose product is at most `most`."""
    if dimensions == 1:
        yield from ((axis,) for axis in range(first, most + 1))
        return
    axis = first
    while axis**dimensions <= most:
        for rest in _ascending(dimensions - 1, most // axis, axis):
            yield (axis, *rest)
        axis += 1


def write(shape: Shape) -> str:
    """A shape as text: (2, 4) is "2x4"."""
    return "x".join(str(axis) for axis in shape)
