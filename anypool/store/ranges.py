"""Which requests serve many byte ranges of one object.

A request has a time limit, so none is large; it has a latency, so near ranges share one, and several run at once.
obstore's own `get_ranges` joins neighbours without limit: a whole checkpoint would be one request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

REQUEST_BYTES = 16 * 1024 * 1024
_GAP_BYTES = 1024 * 1024
_PARALLEL = 8

Span = tuple[int, int]  # first byte, and the byte after the last


def spans_for(ranges: Sequence[tuple[int, int]]) -> list[Span]:
    """The spans to read for ranges (start, length): sorted, none larger than REQUEST_BYTES, none without a use."""
    spans: list[Span] = []
    for asked, length in sorted(ranges):
        start, stop = asked, asked + length
        if spans:
            first, last = spans[-1]
            start = max(asked, last)  # the rest is read already: ranges are sorted by their start
            if stop <= start:
                continue
            if start - last <= _GAP_BYTES and stop - first <= REQUEST_BYTES:
                spans[-1] = (first, stop)
                continue
        spans += [(at, min(at + REQUEST_BYTES, stop)) for at in range(start, stop, REQUEST_BYTES)]
    return spans


def read_ranges(read: Callable[[Span], bytes], ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes of each range. `read` gives a span's bytes, fewer at the object's end; then a range may come short too.

    It is called from several threads; what it raises is raised here.
    """
    spans = spans_for(ranges)
    if len(spans) < 2:
        parts = [read(span) for span in spans]
    else:
        with ThreadPoolExecutor(min(_PARALLEL, len(spans)), thread_name_prefix="read") as pool:
            parts = list(pool.map(read, spans))
    views = [memoryview(part) for part in parts]
    return [_cut(spans, views, start, start + length) for start, length in ranges]


def _cut(spans: Sequence[Span], views: Sequence[memoryview], start: int, stop: int) -> bytes:
    pieces = (
        view[max(start - first, 0) : stop - first]
        for (first, last), view in zip(spans, views, strict=True)
        if first < stop and start < last
    )
    return b"".join(pieces)
