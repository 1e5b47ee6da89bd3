"""What was prepared: the file that stands beside the rows and is written last."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from anypool.train.data.errors import DataError
from anypool.train.data.rows import Shard

FORMAT = 1
"""Changed when the same input would be written as other rows."""

FILE = "manifest.json"


class SourceFile(msgspec.Struct, frozen=True):
    """name: as it was given. size: in bytes. blake3: of the bytes."""

    name: str
    size: int
    blake3: str


class Part(msgspec.Struct):
    """Rows to train on, or those held out. tokens: without padding. learned: tokens that count in the loss, which the
    first of a segment does not. documents: what was packed, however many pieces it is.
    """

    rows: int = 0
    tokens: int = 0
    learned: int = 0
    documents: int = 0
    shards: list[Shard] = []


class Counts(msgspec.Struct):
    """What became of documents. lengths: [i] is the number of those of up to 2**i tokens and more than half of it.

    empty: had nothing but white space, and were left out. cut: longer than a row, and divided. shortened: chats longer
    than a row, whose end was dropped, with all its `dropped` tokens.
    """

    lengths: list[int] = []
    empty: int = 0
    cut: int = 0
    shortened: int = 0
    dropped: int = 0


class UnitResult(msgspec.Struct):
    """What one unit of work became."""

    train: Part
    eval: Part
    counts: Counts


class Options(msgspec.Struct, frozen=True):
    """What decides, beside files and tokenizer, which rows come out."""

    kind: str
    field: str
    split: str
    learn: str
    sequence_length: int
    eval_fraction: float


class Manifest(msgspec.Struct, frozen=True):
    """key: of everything that decides the rows. tokenizer: hash of its files. eot_id: what ends a document."""

    format: int
    key: str
    options: Options
    files: list[SourceFile]
    tokenizer: str
    vocab_size: int
    eot_id: int
    token_type: str
    train: Part
    eval: Part
    counts: Counts

    def efficiency(self) -> float:
        """The part of all positions that has a token."""
        rows = self.train.rows + self.eval.rows
        return (self.train.tokens + self.eval.tokens) / (rows * self.options.sequence_length) if rows else 0.0


def read(folder: Path) -> Manifest:
    """Raises DataError if the folder holds no prepared data."""
    path = folder / FILE
    if not path.is_file():
        state = "was not finished; prepare it again" if (folder / "job.json").is_file() else "holds no prepared data"
        raise DataError(f"{folder} {state}")
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except msgspec.DecodeError as error:
        raise DataError(f"{path} is damaged ({error}); delete {folder} and prepare the data again") from error
    if manifest.format != FORMAT:
        raise DataError(
            f"{path} has format {manifest.format}, this version reads {FORMAT}; delete {folder} and prepare it again"
        )
    return manifest


def add(results: Sequence[UnitResult]) -> UnitResult:
    """All units together, in their order."""
    total = UnitResult(Part(), Part(), Counts())
    for result in results:
        for sum_, one in ((total.train, result.train), (total.eval, result.eval)):
            for name in ("rows", "tokens", "learned", "documents"):
                setattr(sum_, name, getattr(sum_, name) + getattr(one, name))
            sum_.shards = sum_.shards + one.shards
        for name in ("empty", "cut", "shortened", "dropped"):
            setattr(total.counts, name, getattr(total.counts, name) + getattr(result.counts, name))
        size = max(len(total.counts.lengths), len(result.counts.lengths))
        padded = [np.pad(np.asarray(x, int), (0, size - len(x))) for x in (total.counts.lengths, result.counts.lengths)]
        total.counts.lengths = (padded[0] + padded[1]).tolist()
    return total


def publish(path: Path, value: Any) -> None:
    """Writes JSON so that the file is there whole or not at all. value: a struct, or what JSON has."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(msgspec.json.format(msgspec.json.encode(value), indent=1))
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).chmod(0o644)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
