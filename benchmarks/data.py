"""How fast texts become rows, and how fast rows are read.

    python benchmarks/data.py [--mib N] [--length T] [--processes 1,2] [--format json]

Texts are the documentation of Python's standard library, with a number in front of every sentence so that no two are
the same; chats are questions about it. SmolLM2's tokenizer. Rows are read in the order of training, 64 to a step, from
files that the system has in memory.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from anypool.measure.report import circumstances
from anypool.models import resolve
from anypool.train.data import Mixture, Prepared, Reader, Source, prepare, python_docs

ROWS = 64
STEPS = 50


def repeated(path: Path, size: int, chats: bool) -> Path:
    """JSONL of about `size` bytes."""
    conversations = list(python_docs.conversations()) if chats else []
    documents = [] if chats else list(python_docs.documents())

    def records() -> Iterator[dict[str, Any]]:
        written = number = 0
        while written < size:
            if chats:
                one = conversations[number % len(conversations)]
                messages = [message | {"content": f"{number} {message['content']}"} for message in one]
                written += sum(len(message["content"]) for message in messages)
                yield {"messages": messages}
            else:
                text = documents[number % len(documents)].replace(". ", f". {number} ")
                written += len(text)
                yield {"text": text}
            number += 1

    python_docs.write_lines(path, records())
    return path


def preparing(
    source: Source, tokenizer: Path, home: Path, length: int, processes: int
) -> tuple[Prepared, dict[str, Any]]:
    """Prepares a source anew and asks for it again."""
    start = time.perf_counter()
    prepared = prepare(source, tokenizer, home, sequence_length=length, workers=processes)
    made = time.perf_counter()
    prepare(source, tokenizer, home, sequence_length=length, workers=processes)
    again = time.perf_counter() - made
    tokens = prepared.manifest.train.tokens
    return prepared, {
        "source": source.kind,
        "processes": processes,
        "mib": round(prepared.manifest.files[0].size / 2**20, 1),
        "million_tokens": round(tokens / 1e6, 2),
        "seconds": round(made - start, 2),
        "tokens_per_second": round(tokens / (made - start)),
        "again_seconds": round(again, 2),
        "packing_efficiency": round(prepared.manifest.efficiency(), 4),
    }


def reading(prepared: Prepared, length: int) -> list[dict[str, Any]]:
    """Reads steps of rows in three ways."""
    mixture = Mixture([(prepared.train, 1.0)], seed=0, rows=ROWS)

    def rate(what: str, seconds: float) -> dict[str, Any]:
        rows = ROWS * STEPS / seconds
        return {"what": what, "rows_per_second": round(rows), "tokens_per_second": round(rows * length)}

    start = time.perf_counter()
    for step in range(STEPS):
        mixture.samples(range(step * ROWS, (step + 1) * ROWS))
    chosen = time.perf_counter()
    for step in range(STEPS):
        mixture.rows_at(step)
    read = time.perf_counter()
    with Reader(mixture) as reader:
        for _ in range(STEPS):
            next(reader)
    ahead = time.perf_counter()
    return [
        rate("choose, without reading", chosen - start),
        rate("rows_at", read - chosen),
        rate("Reader, two steps ahead", ahead - read),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=16, help="of texts; of chats a quarter of it")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    options = parser.parse_args()
    known = circumstances("tokenizers", "array-record")
    tokenizer = resolve("smollm2-135m-instruct")
    prepared_rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        texts = Source("jsonl", str(repeated(home / "texts.jsonl", options.mib * 2**20, False)))
        chats = Source("chat", str(repeated(home / "chats.jsonl", options.mib * 2**20 // 4, True)))
        for processes in map(int, options.processes.split(",")):
            for source in (chats, texts):
                prepared, row = preparing(source, tokenizer, home / str(processes), options.length, processes)
                prepared_rows.append(row)
        read_rows = reading(prepared, options.length)
    if options.format == "json":
        print(json.dumps({"prepare": prepared_rows, "read": read_rows} | known, indent=2))
        return
    for rows in (prepared_rows, read_rows):
        table = Table(*rows[0])
        for row in rows:
            table.add_row(*(f"{value:,}" if isinstance(value, int | float) else value for value in row.values()))
        Console().print(table)


if __name__ == "__main__":
    main()
