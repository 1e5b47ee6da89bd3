"""One unit of work: some parts of files become a shard of rows to train on and one of rows held out.

A unit depends on nothing but its parts, so units can be made by any number of processes, in any order, and again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from blake3 import blake3

from anypool.train.data import chat, manifest, reading
from anypool.train.data.errors import DataError
from anypool.train.data.manifest import Counts, Options, UnitResult
from anypool.train.data.packing import best_fit
from anypool.train.data.rows import Shard, encode
from anypool.train.data.source import Source
from anypool.train.data.tokens import TextTokenizer

BATCH_CHARACTERS = 2**20
"""How much text is tokenised at once."""


class Job(msgspec.Struct, frozen=True):
    """All units of one preparation, as its folder's job.json has them. units: of each (file, start, stop) of its
    parts.
    """

    options: Options
    files: list[str]
    units: list[list[tuple[int, int, int]]]

    def source(self) -> Source:
        kind = {"python-docs": "jsonl", "python-chat": "chat"}.get(self.options.kind, self.options.kind)
        o = self.options
        return Source(kind, path=self.files[0], field="" if kind == "text" else o.field, split=o.split, learn=o.learn)


class Pieces:
    """Tokens of documents that are to be packed, none longer than a row."""

    def __init__(self) -> None:
        self.tokens: list[np.ndarray] = []
        self.learned: list[np.ndarray | None] = []
        self.documents = 0


class Maker:
    """Makes the units of a job, one after the other."""

    def __init__(self, folder: Path) -> None:
        """folder: has job.json and the tokenizer's files."""
        self._folder = folder
        self._job = msgspec.json.decode((folder / "job.json").read_bytes(), type=Job)
        self._source = self._job.source()
        self._tokenizer = TextTokenizer.load(folder / "tokenizer")

    def make(self, number: int) -> UnitResult:
        """Writes the unit's shards, then its record, and returns that. Raises DataError."""
        options, counts = self._job.options, Counts()
        sides = {"train": Pieces(), "eval": Pieces()}
        lengths = np.zeros(64, int)
        for held, tokens, learned in self._documents(number, counts):
            lengths[int(len(tokens) - 1).bit_length()] += 1
            side = sides["eval" if held else "train"]
            before = len(side.tokens)
            self._divide(side, tokens, learned, counts)
            side.documents += len(side.tokens) > before
        counts.lengths = np.trim_zeros(lengths, "b").tolist()
        made = {
            name: self._write(f"{name}-{number:05d}", side, options.sequence_length) for name, side in sides.items()
        }
        result = UnitResult(made["train"], made["eval"], counts)
        manifest.publish(self._folder / record_name(number), result)
        return result

    def _documents(self, number: int, counts: Counts) -> Iterator[tuple[bool, np.ndarray, np.ndarray | None]]:
        """(held out, tokens, learned) of every document."""
        waiting: list[tuple[bool, str, chat.Conversation | None]] = []
        size = 0
        for file, start, stop in self._job.units[number]:
            path = Path(self._job.files[file])
            for place, value in reading.documents(self._source, path, reading.Part(file, start, stop)):
                conversation = chat.render(self._tokenizer.model, place, value) if self._source.chats else None
                text = value if conversation is None else conversation.text
                if not text.strip():
                    counts.empty += 1
                    continue
                waiting.append((self._held_out(place, text), text, conversation))
                size += len(text)
                if size >= BATCH_CHARACTERS:
                    yield from self._tokenised(waiting)
                    waiting, size = [], 0
        yield from self._tokenised(waiting)

    def _held_out(self, place: object, text: str) -> bool:
        """By the text itself: where a document stands, and what stands beside it, changes nothing, and its copies go
        with it.
        """
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{place}: character {error.start} is half of a surrogate pair, which is no text"
            ) from error
        fraction = self._job.options.eval_fraction
        return fraction > 0 and int.from_bytes(blake3(data).digest(8), "little") < fraction * 2**64

    def _tokenised(
        self, waiting: list[tuple[bool, str, chat.Conversation | None]]
    ) -> Iterator[tuple[bool, np.ndarray, np.ndarray | None]]:
        texts = [text for _, text, _ in waiting]
        if not self._source.chats:
            for (held, _, _), tokens in zip(waiting, self._tokenizer.texts(texts), strict=True):
                yield held, tokens, None
            return
        encodings = self._tokenizer.core.encode_batch(texts, add_special_tokens=False)
        for (held, _, conversation), encoding in zip(waiting, encodings, strict=True):
            ids = encoding.ids
            learned = None
            if self._source.learn == "answers" and conversation is not None:
                learned = chat.learned(conversation, ids, encoding.offsets, self._tokenizer.endings)
            yield held, np.asarray(ids, self._tokenizer.token_type), learned

    def _divide(self, side: Pieces, tokens: np.ndarray, learned: np.ndarray | None, counts: Counts) -> None:
        """Add a document, in pieces if it is longer than a row.

        The end of a chat is dropped instead: an answer without its question teaches to answer without being asked.
        """
        length = self._job.options.sequence_length
        if len(tokens) <= length:
            pieces = [slice(0, len(tokens))]
        elif learned is None:
            counts.cut += 1
            pieces = [slice(start, min(start + length, len(tokens))) for start in range(0, len(tokens), length)]
        else:
            counts.shortened += 1
            counts.dropped += len(tokens) - length
            pieces = [slice(0, length)]
        for piece in pieces:
            if learned is not None and not learned[piece][1:].any():
                continue
            side.tokens.append(tokens[piece])
            side.learned.append(None if learned is None else learned[piece])

    def _write(self, name: str, pieces: Pieces, length: int) -> manifest.Part:
        part = manifest.Part(documents=pieces.documents)
        packed = best_fit([len(tokens) for tokens in pieces.tokens], length)
        if not packed:
            return part
        path = self._folder / f"{name}.array_record"
        # The process's number: another one may be at the same unit, on a file system without locks.
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        writer = ArrayRecordWriter(str(unfinished), "group_size:1,zstd:1")
        try:
            for row in packed:
                tokens_P = np.concatenate([pieces.tokens[index] for index in row])
                masks = [mask for index in row if (mask := pieces.learned[index]) is not None]
                learned_P = np.concatenate(masks) if masks else None
                lengths = [len(pieces.tokens[index]) for index in row]
                writer.write(encode(tokens_P, lengths, learned_P))
                part.tokens += len(tokens_P)
                part.learned += sum(int(mask[1:].sum()) for mask in masks) if masks else len(tokens_P) - len(row)
            writer.close()
        except RuntimeError as error:  # what array-record raises when the disk is full
            unfinished.unlink(missing_ok=True)
            raise DataError(
                f"{path} cannot be written ({error}); what was finished is kept: ask again once that is mended"
            ) from error
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
        part.rows = len(packed)
        part.shards = [Shard(path.name, len(packed), path.stat().st_size)]
        return part


def record_name(number: int) -> str:
    return f"unit-{number:05d}.json"


def finished(folder: Path, number: int) -> UnitResult | None:
    """What a unit became, if it was finished and its files are there."""
    try:
        result: Any = msgspec.json.decode((folder / record_name(number)).read_bytes(), type=UnitResult)
        shards = [*result.train.shards, *result.eval.shards]
        whole = all((folder / shard.file).stat().st_size == shard.size for shard in shards)
    except (OSError, msgspec.DecodeError):
        return None
    return result if whole else None
