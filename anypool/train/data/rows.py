"""Rows of tokens on disk, read in any order.

A record of an array-record file is one row without its padding: the number of its segments and the length of each as
u32, the tokens as u16 or u32, and where not every token is learned, a bit for each token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from anypool.train.data.errors import DataError

# R row  T position  S segment of a row  P token of a row without its padding


class SampleId(NamedTuple):
    """Which row of which dataset, and the how manieth time that all of its rows are gone through, from 0."""

    dataset: str
    row: int
    passed: int


@dataclass(frozen=True)
class Rows:
    """What one step learns from.

    tokens_RT: int32, 0 in padding. segments_RT: int32, from 1 in each row, 0 for padding. learned_RT: bool. ids: of the
    rows; fewer than there are rows if the last ones are empty.
    """

    tokens_RT: np.ndarray
    segments_RT: np.ndarray
    learned_RT: np.ndarray
    ids: tuple[SampleId, ...]


def encode(tokens_P: np.ndarray, lengths_S: Sequence[int], learned_P: np.ndarray | None) -> bytes:
    """A row as a record. tokens_P: u16 or u32."""
    head = np.asarray([len(lengths_S), *lengths_S], "<u4").tobytes()
    return head + tokens_P.tobytes() + (b"" if learned_P is None else np.packbits(learned_P).tobytes())


def decode(record: bytes, token_type: str, masked: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A record as (tokens_P, lengths_S, learned_P)."""
    segments = int(np.frombuffer(record, "<u4", 1)[0])
    lengths_S = np.frombuffer(record, "<u4", segments, 4)
    count, at = int(lengths_S.sum()), 4 * (segments + 1)
    tokens_P = np.frombuffer(record, token_type, count, at)
    if not masked:
        return tokens_P, lengths_S, np.ones(count, bool)
    bits = np.frombuffer(record, np.uint8, offset=at + tokens_P.nbytes)
    return tokens_P, lengths_S, np.unpackbits(bits, count=count).astype(bool)


class Shard(msgspec.Struct, frozen=True):
    """One file of rows. size: in bytes."""

    file: str
    rows: int
    size: int


@dataclass(frozen=True)
class _Whole:
    """A file that is read as a whole, in the words of array-record, which need not be opened to be counted."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class RowStore:
    """The rows of one dataset. Safe to read from several threads."""

    def __init__(
        self, name: str, folder: Path, shards: Sequence[Shard], sequence_length: int, token_type: str, masked: bool
    ) -> None:
        """Raises DataError if a file is missing or not as long as it was."""
        for shard in shards:
            path = folder / shard.file
            if not path.is_file() or path.stat().st_size != shard.size:
                raise DataError(f"{path} is missing or damaged; delete {folder} and prepare the data again")
        self.name = name
        self.sequence_length = sequence_length
        self._folder, self._token_type, self._masked = folder, token_type, masked
        files = [_Whole(str(folder / s.file), 0, s.rows, s.rows) for s in shards if s.rows]
        self._source = ArrayRecordDataSource(files) if files else []

    def __len__(self) -> int:
        return len(self._source)

    def fill(self, row: int, tokens_T: np.ndarray, segments_T: np.ndarray, learned_T: np.ndarray) -> None:
        """Reads a row into arrays of zeros. Raises DataError if it cannot be read."""
        try:
            record = self._source[row]
            tokens_P, lengths_S, learned_P = decode(record, self._token_type, self._masked)
            count = len(tokens_P)
            tokens_T[:count], learned_T[:count] = tokens_P, learned_P
            segments_T[:count] = np.repeat(np.arange(1, len(lengths_S) + 1), lengths_S)
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            raise DataError(
                f"row {row} of {self._folder} cannot be read ({error}); delete the folder and prepare the data again"
            ) from error

    def in_order(self, rows: int, part: slice | None = None) -> Iterator[Rows]:
        """All rows once, `rows` at a time and the last ones filled up with empty rows: what evaluation goes through.

        part: which of each `rows` to read.
        """
        for first in range(0, len(self), rows):
            chosen = range(first, first + rows)[part or slice(None)]
            samples = [(self, SampleId(self.name, row, 0)) for row in chosen if row < len(self)]
            yield gather(samples, len(chosen), self.sequence_length)


def gather(samples: Sequence[tuple[RowStore, SampleId]], count: int, length: int) -> Rows:
    """Reads rows of `length` tokens, and adds empty ones up to `count`."""
    rows = Rows(
        np.zeros((count, length), np.int32),
        np.zeros((count, length), np.int32),
        np.zeros((count, length), bool),
        tuple(id for _, id in samples),
    )
    for index, (store, id) in enumerate(samples):
        store.fill(id.row, rows.tokens_RT[index], rows.segments_RT[index], rows.learned_RT[index])
    return rows
