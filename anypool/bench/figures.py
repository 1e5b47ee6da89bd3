"""From when every token came to rates and waiting times: the same arithmetic for every engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from anypool.measure.report import percentiles

Arrivals = list[tuple[float, int]]
"""Of one stream: when tokens came, in seconds from when the first stream was asked for, and how many at once."""


@dataclass
class Round:
    """Streams that were asked for at once. `waits`: from each stream's own request to its first token, in seconds."""

    streams: list[Arrivals]
    waits: list[float]

    @property
    def tokens_per_second(self) -> float:
        """All tokens over all the time, from the first request to the last token."""
        return sum(count for stream in self.streams for _, count in stream) / max(
            stream[-1][0] for stream in self.streams
        )

    @property
    def decode_tokens_per_second(self) -> float | None:
        """The rate while every stream was decoding: from the last first token to the first last one.

        None if there was no such time, because the first stream ended before the last one began.
        """
        begin = max(stream[0][0] for stream in self.streams)
        end = min(stream[-1][0] for stream in self.streams)
        if end <= begin:
            return None
        return sum(count for stream in self.streams for at, count in stream if begin < at <= end) / (end - begin)

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens, of all streams. Tokens that came together share the time before them."""
        return [
            (at - before) / count
            for stream in self.streams
            for (before, _), (at, count) in pairwise(stream)
            for _ in range(count)
        ]


@dataclass
class Row:
    """One line of the table: an engine under one load, with the rounds in which it was measured.

    pools: of the fleet; in a row of another engine, of the fleet it took turns with. peer: the row to compare with.
    """

    engine: str
    pools: int
    streams: int
    cache: str
    rounds: list[Round] = field(default_factory=list)
    peer: Row | None = None

    def rates(self) -> dict[str, float | None]:
        """Medians over the rounds."""
        decode = [rate for one in self.rounds if (rate := one.decode_tokens_per_second) is not None]
        return {
            "output_tokens_per_second": median(one.tokens_per_second for one in self.rounds),
            "decode_tokens_per_second": median(decode) if decode else None,
        }

    def report(self) -> dict[str, Any]:
        """By the words of the table; times in milliseconds over the streams of all rounds."""
        ours = self.rates()
        return {
            "engine": self.engine,
            "pools": self.pools,
            "streams": self.streams,
            "cache": self.cache,
            **{name: _rounded(rate) for name, rate in ours.items()},
            "time_to_first_token_ms": percentiles([wait for one in self.rounds for wait in one.waits]),
            "time_between_tokens_ms": percentiles([gap for one in self.rounds for gap in one.gaps]),
            "ratio_to_transformers": None
            if self.peer is None
            else {name: _ratio(rate, self.peer.rates()[name]) for name, rate in ours.items()},
        }


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 2)


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else round(ours / theirs, 3)
