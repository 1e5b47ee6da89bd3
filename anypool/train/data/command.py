"""`anypool data`: prepares texts, and shows what a model would learn from them."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from anypool.progress import Reporter, bars, resolve_shown
from anypool.train.data import python_docs
from anypool.train.data.errors import DataError
from anypool.train.data.prepare import Prepared, home_dir, prepare
from anypool.train.data.source import Source, kind_of
from anypool.train.data.tokens import TextTokenizer


def prepare_command(
    path: str,
    *,
    model: str,
    sequence_length: int,
    kind: str = "",
    field: str = "",
    split: str = "document",
    learn: str = "",
    eval_fraction: float = 0.0,
    home: Path | None = None,
    workers: int | None = None,
    format: str = "table",
) -> int:
    """Prepares a source and prints what came out; returns the exit code.

    path: of the texts; "" for a kind that is made here. kind: "" guesses it from the names of the files. model: whose
    tokenizer is used, anything `anypool.models.resolve` takes, or a directory with a tokenizer. Raises DataError,
    ModelError.
    """
    source = Source(kind or kind_of(path), path, field=field, split=split, learn=learn)
    console = Console(stderr=True)
    with bars(console) as shown:
        tokenizer = Path(model).expanduser()
        if not (tokenizer / "tokenizer.json").is_file():
            tokenizer = resolve_shown(model, shown)
        prepared = prepare(
            source,
            tokenizer,
            home or home_dir(),
            sequence_length=sequence_length,
            eval_fraction=eval_fraction,
            workers=workers,
            progress=Reporter(shown, source.name),
        )
    if format == "json":
        sys.stdout.write(_as_json(prepared) + "\n")
    else:
        out = Console()
        _show(prepared, out)
        out.print(f"\nLook at it: anypool data inspect {prepared.folder}", soft_wrap=True, highlight=False)
    return 0


def inspect_command(folder: Path, *, rows: int = 2, side: str = "train", format: str = "table") -> int:
    """Prints what is known of prepared data and shows its first rows as text; returns the exit code. Raises DataError.

    rows: how many to show. side: "train" or "eval".
    """
    prepared = Prepared.open(folder)
    if format == "json":
        sys.stdout.write(_as_json(prepared) + "\n")
        return 0
    console = Console()
    _show(prepared, console)
    store = prepared.train if side == "train" else prepared.eval
    if store is None:
        raise DataError(f"{folder} has nothing held out; prepare it with an eval_fraction above 0")
    tokenizer = TextTokenizer.load(folder / "tokenizer")
    for number, shown in zip(range(rows), store.in_order(1), strict=False):
        console.print(f"\n[bold]row {number} of {side}[/bold]")
        for segment in range(1, int(shown.segments_RT.max()) + 1):
            chosen = shown.segments_RT[0] == segment
            console.print(f"[dim]── document {segment}, {int(chosen.sum())} tokens[/dim]")
            text = _marked(tokenizer, shown.tokens_RT[0, chosen], shown.learned_RT[0, chosen], console.is_terminal)
            console.print(text, soft_wrap=True)
    if prepared.manifest.options.learn == "answers":
        how = "green" if console.is_terminal else "in ⟦ ⟧"
        console.print(f"\nWhat is {how} is learned; the rest is only read.")
    return 0


def example_chat_command(path: Path) -> int:
    """Writes chats about Python's standard library as JSONL, something to train on without a network; the exit code."""
    if not path.parent.is_dir():
        raise DataError(f"{path}: there is no folder {path.parent}; make it first")
    count = python_docs.write_lines(path, ({"messages": messages} for messages in python_docs.conversations()))
    sys.stdout.write(f"{count:,} conversations in {path}\n")
    return 0


def _as_json(prepared: Prepared) -> str:
    known = msgspec.to_builtins(prepared.manifest)
    return json.dumps({"folder": str(prepared.folder), "packing_efficiency": prepared.manifest.efficiency()} | known)


def _show(prepared: Prepared, console: Console) -> None:
    manifest, options, counts = prepared.manifest, prepared.manifest.options, prepared.manifest.counts
    table = Table("", "train", "held out", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in ("documents", "rows", "tokens", "learned"):
        table.add_row(name, f"{getattr(manifest.train, name):,}", f"{getattr(manifest.eval, name):,}")
    console.print(
        f"{options.kind}, rows of {options.sequence_length:,} tokens, learning {options.learn}", highlight=False
    )
    console.print(table)
    notes = [f"{manifest.efficiency():.1%} of all positions have a token"]
    for count, what in (
        (counts.empty, "empty documents were left out"),
        (counts.cut, "documents are longer than a row and were divided"),
        (counts.shortened, f"chats are longer than a row; their last {counts.dropped:,} tokens were dropped"),
    ):
        if count:
            notes.append(f"{count:,} {what}")
    notes.append(f"{manifest.vocab_size:,} tokens in the vocabulary, of which {manifest.eot_id} ends a document")
    notes.append(f"tokenizer {manifest.tokenizer[:12]}")
    for note in notes:
        console.print(note, highlight=False)

    console.print("\ntokens of a document")
    for line in _histogram(counts.lengths):
        console.print(line, highlight=False)
    files = Table("file", "bytes", "blake3", box=None, pad_edge=False)
    files.columns[1].justify = "right"
    for file in manifest.files[:10]:
        files.add_row(file.name, f"{file.size:,}", file.blake3[:12])
    console.print()
    console.print(files)
    if len(manifest.files) > 10:
        console.print(f"and {len(manifest.files) - 10:,} more files, in {prepared.folder / 'manifest.json'}")


def _histogram(lengths: list[int]) -> Iterator[str]:
    most = max(lengths, default=0)
    first = next((index for index, count in enumerate(lengths) if count), len(lengths))
    for index in range(first, len(lengths)):
        low, high = 2 ** (index - 1) + 1 if index else 1, 2**index
        yield f"{low:>9,} - {high:<9,} {lengths[index]:>9,} {'█' * round(40 * lengths[index] / most)}"


def _marked(tokenizer: TextTokenizer, tokens_P: np.ndarray, learned_P: np.ndarray, colour: bool) -> Text:
    """The text of a document, special tokens and all, with what is learned in green or else in brackets."""
    shown = Text()
    edges = [0, *(np.flatnonzero(np.diff(learned_P)) + 1).tolist(), len(tokens_P)]
    everything = bool(learned_P.all())
    for start, stop in itertools.pairwise(edges):
        text = tokenizer.model.decode(tokens_P[start:stop].tolist(), skip_special=False)
        if everything or not learned_P[start]:
            shown.append(text, style="" if everything or not colour else "dim")
        else:
            shown.append(text if colour else f"⟦{text}⟧", style="green")
    return shown
