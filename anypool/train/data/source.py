"""What a run learns from, as a user names it, and which files that means."""

from __future__ import annotations

import dataclasses
import difflib
import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anypool.train.data.errors import DataError

ENDINGS = {
    "text": (".txt", ".md"),
    "jsonl": (".jsonl", ".ndjson"),
    "parquet": (".parquet",),
    "chat": (".jsonl", ".ndjson", ".parquet"),
}
"""How the names of a kind's files end."""

MADE = ("python-docs", "python-chat")
"""Kinds that are made on this machine, from the documentation of Python's standard library; they have no path."""

KINDS = (*ENDINGS, *MADE)
SPLITS = ("document", "blank-line")
LEARN = ("all", "answers")


@dataclass(frozen=True)
class Source:
    """Documents of one kind.

    kind: one of KINDS. path: a file, a folder (all files of the kind in it and below it) or a pattern such as
    `corpus/*.txt`. field: of a JSON object or a Parquet table, that has the text or the messages; "" is `text`, for
    chats `messages`. split: of a text file, whether it is one document or one for each part between blank lines.
    learn: "all" tokens or only the assistant's "answers"; "" is answers for chats and all for the rest. weight: its
    share of the rows, against the other sources of the run. name: in sample ids and tables; "" makes one from the
    path.

    Raises DataError for what makes no sense.
    """

    kind: str
    path: str = ""
    field: str = ""
    split: str = "document"
    learn: str = ""
    weight: float = 1.0
    name: str = ""

    def __post_init__(self) -> None:
        chats = self.kind in ("chat", "python-chat")
        for name, value, choices in (
            ("kind", self.kind, KINDS),
            ("split", self.split, SPLITS),
            ("learn", self.learn or "all", LEARN),
        ):
            if value not in choices:
                close = difflib.get_close_matches(str(value), choices, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise DataError(f"{name} = {value!r}{hint}: must be one of {', '.join(choices)}")
        if self.kind in MADE and self.path:
            raise DataError(
                f"path = {self.path!r}: kind {self.kind!r} is made on this machine and has no path; remove it"
            )
        if self.kind not in MADE and not self.path:
            raise DataError(
                f"path: kind {self.kind!r} needs the path of a file or folder, or a pattern such as 'data/*'"
            )
        if self.kind != "text" and self.split != "document":
            raise DataError(
                f"split = {self.split!r}: only kind 'text' is split; in kind {self.kind!r} a record is a document"
            )
        if self.kind in ("text", *MADE) and self.field not in ("", "messages" if chats else "text"):
            raise DataError(f"field = {self.field!r}: kind {self.kind!r} has no fields to choose from; remove it")
        if self.learn == "answers" and not chats:
            raise DataError(
                f"learn = 'answers': kind {self.kind!r} has no answers; use learn = 'all', or kind = 'chat'"
            )
        if not 0 < self.weight < float("inf"):
            raise DataError(f"weight = {self.weight!r}: must be a number above 0")
        object.__setattr__(self, "field", self.field or ("messages" if chats else "text"))
        object.__setattr__(self, "learn", self.learn or ("answers" if chats else "all"))
        object.__setattr__(self, "name", self.name or _name(self.path) or self.kind)

    @property
    def chats(self) -> bool:
        return self.kind in ("chat", "python-chat")


def named(sources: Sequence[Source]) -> list[Source]:
    """The same sources under names that differ: of those that share one, the second is `name-2` and so on."""
    taken: set[str] = set()
    result = []
    for source in sources:
        number, name = 1, source.name
        while name in taken:
            number += 1
            name = f"{source.name}-{number}"
        taken.add(name)
        result.append(dataclasses.replace(source, name=name))
    return result


def _name(path: str) -> str:
    """The last part of a path that is no pattern, without its ending."""
    plain = [part for part in Path(path).parts if not glob.has_magic(part) and part not in ("/", ".", "..", "~")]
    return Path(plain[-1]).stem if plain else ""


def kind_of(path: str) -> str:
    """The kind that the ending of a file's name, or of those in a folder, stands for. Raises DataError."""
    by_ending = {ending: kind for kind in ("text", "jsonl", "parquet") for ending in ENDINGS[kind]}
    place = Path(path).expanduser()
    names = [file.name for file in place.rglob("*") if file.is_file()] if place.is_dir() else [place.name]
    kinds = {by_ending[ending] for name in names if (ending := Path(name).suffix.lower()) in by_ending}
    if len(kinds) == 1:
        return kinds.pop()
    if not kinds:
        if not glob.has_magic(path) and not place.exists():
            raise _missing(place)
        raise DataError(
            f"{path}: names ending in {', '.join(by_ending)} are known; say which kind it is: {', '.join(ENDINGS)}"
        )
    raise DataError(f"{path} holds files of several kinds ({', '.join(sorted(kinds))}); say which kind to read")


def files_of(kind: str, path: str) -> list[Path]:
    """The files of a kind at a path, sorted by name. Raises DataError if there are none."""
    endings = ENDINGS[kind]
    wanted = f"kind {kind!r} reads names ending in {' or '.join(endings)}"
    place = Path(path).expanduser()
    if place.is_file():
        if place.suffix.lower() not in endings:
            raise DataError(f"{place}: {wanted}; rename it, or use another kind")
        if not place.stat().st_size:
            raise DataError(f"{place} is empty; remove it, or write it first")
        return [place]
    if place.is_dir():
        inside = [
            file for file in place.rglob("*") if not any(p.startswith(".") for p in file.relative_to(place).parts)
        ]
    elif glob.has_magic(path):
        anchor = Path(place.anchor or ".")
        inside = list(anchor.glob(str(place.relative_to(place.anchor))))
    else:
        raise _missing(place)
    found = sorted(file for file in inside if file.is_file() and file.suffix.lower() in endings)
    if not found:
        others = sorted({file.suffix or file.name for file in inside if file.is_file()})
        hint = f"; it has {', '.join(others[:5])}" if others else ""
        raise DataError(f"{path} has no file to read: {wanted}{hint}")
    filled = [file for file in found if file.stat().st_size]
    if not filled:
        raise DataError(f"{path}: every file is empty ({', '.join(file.name for file in found[:5])})")
    return filled


def _missing(place: Path) -> DataError:
    """There is nothing at a path: say how far it exists, and what is called nearly so there."""
    if not place.parent.is_dir():
        exists = next(parent for parent in place.parents if parent.is_dir())
        return DataError(
            f"there is no file or folder {place}: {os.fspath(exists)} has no {place.relative_to(exists).parts[0]}"
        )
    close = difflib.get_close_matches(place.name, [one.name for one in place.parent.iterdir()], n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return DataError(f"there is no file or folder {place}{hint}")
