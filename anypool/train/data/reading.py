"""Files to documents: which parts of a file can be read apart from the rest, and what is in a part.

A part is a range of bytes that begins and ends where a document does, or of a Parquet file's row groups. So a file can
be read by several processes, and the documents do not depend on how it was divided.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anypool.train.data.errors import DataError
from anypool.train.data.source import Source

LARGEST_DOCUMENT_BYTES = 64 * 2**20
"""A tokenizer needs some hundred bytes of memory for each token of a document."""

_BLANK_LINES = re.compile(r"\n(?:[ \t\r]*\n)+")
_PARQUET_BATCH = 256


@dataclass(frozen=True)
class Part:
    """Of file number `file`: bytes, or for Parquet row groups, from `start` to before `stop`."""

    file: int
    start: int
    stop: int


@dataclass(frozen=True)
class Place:
    """Where a document stands, for messages. kind: "line" or "byte", `at` being a byte's offset, or "row"."""

    path: Path
    kind: str
    at: int

    def __str__(self) -> str:
        if self.kind == "line":
            return f"{self.path}, line {_line(self.path, self.at)}"
        return f"{self.path}, {self.kind} {self.at}"


def parts(source: Source, files: list[Path], target: int) -> Iterator[tuple[Part, int]]:
    """All parts of all files with their sizes in bytes, each of at most about `target` bytes where files can be
    divided.

    Raises DataError if a file cannot be read, or a Parquet file lacks the column.
    """
    for number, path in enumerate(files):
        if path.suffix.lower() == ".parquet":
            table = _parquet(path, source.field)
            for group in range(table.metadata.num_row_groups):
                yield Part(number, group, group + 1), int(table.metadata.row_group(group).total_byte_size)
            continue
        size = path.stat().st_size
        whole = source.kind == "text" and source.split == "document"
        if whole and size > LARGEST_DOCUMENT_BYTES:
            raise DataError(
                f"{path} is one document of {size // 2**20} MiB, more than the {LARGEST_DOCUMENT_BYTES // 2**20} MiB "
                "that are tokenised at once; use split = 'blank-line', or divide it into files"
            )
        start = 0
        while start < size:
            stop = size if whole or size - start <= target else _boundary(path, start + target, source.kind == "text")
            yield Part(number, start, stop), stop - start
            start = stop


def _boundary(path: Path, at: int, blank: bool) -> int:
    """The first beginning of a line after byte `at`; of the first line that follows blank ones, if `blank`."""
    with path.open("rb") as file:
        file.seek(at - 1)
        file.readline()  # the rest of a line says nothing about the line
        position, seen = file.tell(), not blank
        while line := file.readline():
            empty = not line.strip()
            if seen and not (blank and empty):
                return position
            seen = seen or empty
            position = file.tell()
        return position


def documents(source: Source, path: Path, part: Part) -> Iterator[tuple[Place, Any]]:
    """The documents of a part: texts, or for chats JSON values that have the messages. Raises DataError."""
    if path.suffix.lower() == ".parquet":
        yield from _rows(source, path, part)
    elif source.kind == "text":
        yield from _texts(source, path, part)
    else:
        yield from _lines(source, path, part)


def _texts(source: Source, path: Path, part: Part) -> Iterator[tuple[Place, str]]:
    with path.open("rb") as file:
        file.seek(part.start)
        text = _decoded(file.read(part.stop - part.start), path, part.start)
    if source.split == "document":
        yield Place(path, "byte", part.start), text
        return
    for piece in _BLANK_LINES.split(text):
        yield Place(path, "byte", part.start), piece.strip("\r\n")


def _lines(source: Source, path: Path, part: Part) -> Iterator[tuple[Place, Any]]:
    with path.open("rb") as file:
        file.seek(part.start)
        while (offset := file.tell()) < part.stop and (line := file.readline()):
            place = Place(path, "line", offset)
            text = _decoded(line, path, offset)
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except ValueError as error:
                raise DataError(f"{place}: not JSON ({error}); a JSONL file has one object on each line") from error
            if not isinstance(record, dict):
                raise DataError(f'{place}: {_short(record)} is no JSON object; write {{"{source.field}": …}}')
            if source.field not in record:
                raise DataError(_without(place, source, sorted(map(str, record))))
            yield place, _value(place, source, record[source.field], record)


def _rows(source: Source, path: Path, part: Part) -> Iterator[tuple[Place, Any]]:
    import pyarrow

    table = _parquet(path, source.field)
    row = sum(table.metadata.row_group(group).num_rows for group in range(part.start))
    columns = [source.field] + (["tools"] if source.chats and "tools" in table.schema_arrow.names else [])
    try:
        batches = table.iter_batches(_PARQUET_BATCH, row_groups=list(range(part.start, part.stop)), columns=columns)
        for batch in batches:
            for record in batch.to_pylist():
                place = Place(path, "row", row)
                yield place, _value(place, source, record[source.field], record)
                row += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}, after row {row}: cannot be read ({error}); write the file again") from error


def _parquet(path: Path, field: str) -> Any:
    """An open Parquet file that has the column."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is no Parquet file: {error}") from error
    names = table.schema_arrow.names
    if field not in names:
        raise DataError(f"{path} has no column {field!r}; it has {', '.join(names)}. Say which with field = …")
    return table


def _value(place: Place, source: Source, value: Any, record: dict[str, Any]) -> Any:
    if source.chats:
        return {"messages": value, "tools": record.get("tools")}
    if not isinstance(value, str):
        hint = "; a list of messages is kind = 'chat'" if isinstance(value, list) else ""
        raise DataError(f"{place}: {source.field} is {_short(value)}, no text{hint}")
    return value


def _without(place: Place, source: Source, there: list[str]) -> str:
    has = f"it has {', '.join(there[:8])}" if there else "it has none at all"
    if source.kind == "jsonl" and "messages" in there:
        return f"{place}: no field {source.field!r}, but messages; use kind = 'chat'"
    return f"{place}: no field {source.field!r}; {has}. Say which with field = …"


def _decoded(data: bytes, path: Path, offset: int) -> str:
    try:
        return data.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        skipped = 3 if offset == 0 and data.startswith(b"\xef\xbb\xbf") else 0
        at = offset + skipped + error.start
        raise DataError(
            f"{path} is not UTF-8: byte {at} is 0x{data[error.start + skipped]:02x} ({error.reason}); "
            f"convert it, for example with iconv -f latin1 -t utf-8"
        ) from error


def _line(path: Path, offset: int) -> int:
    """The number of the line that begins at a byte, from 1. Only read when there is something to complain about."""
    count = 1
    with path.open("rb") as file:
        while offset > 0 and (block := file.read(min(offset, 2**20))):
            count += block.count(b"\n")
            offset -= len(block)
    return count


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"
