"""Documents to rows of one length: whole where they fit, together where several do."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices into `lengths`, none longer than `capacity` in all.

    Longest first, each into the fullest row that it fits in, which leaves little empty and cuts nothing (best-fit
    decreasing; Ding et al. 2024, "Fewer Truncations Improve Language Modeling"). The same lengths always give the same
    rows.
    """
    rows: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces: list[int] = []  # those with a row, ascending
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        assert 0 < length <= capacity, f"a piece of {length} tokens for rows of {capacity}"
        at = bisect.bisect_left(spaces, length)
        if at == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[at]
            row = by_space[space].pop()
            if not by_space[space]:
                del spaces[at]
        rows[row].append(index)
        if space := space - length:
            if not by_space[space]:
                bisect.insort(spaces, space)
            by_space[space].append(row)
    return [sorted(row) for row in rows]
