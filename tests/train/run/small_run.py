"""A run so small that a test can train it in its own process, on one device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from anypool.progress import bars
from anypool.store import Holder, Leases, Store
from anypool.train.run import directory
from anypool.train.run.command import prepare
from anypool.train.run.epoch import Epoch
from anypool.train.run.file import RunFile, parse_run
from anypool.train.run.launch import Assignment

TEXT = """
[run]
name = "small"
store = "./store"
steps = {steps}
copy_to = "./second"

[model]
{model}

[data]
sequence_length = 32
eval_fraction = 0.2

[[data.source]]
kind = "text"
path = "./words.txt"
split = "blank-line"

[batch]
rows = 4

[optimizer]
learning_rate = {learning_rate}

[checkpoint]
every_steps = 4

[evaluate]
every_steps = 6
batches = 2

{more}

[[pool]]
name = "here"
layers = "scan"
usd_per_chip_hour = 3.6
"""

NEW_MODEL = """vocab_size = 300

[model.config]
model_type = "llama"
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2
max_position_embeddings = 64
"""


class SmallRun:
    """A run in `folder`. `train` is one epoch of it; `said` has what that trainer said."""

    def __init__(
        self, folder: Path, *, model: str = NEW_MODEL, learning_rate: float = 1e-2, more: str = "", steps: int = 12
    ) -> None:
        words = "\n\n".join(f"The number {n} comes after the number {n - 1}." for n in range(1, 400))
        (folder / "words.txt").write_text(words)
        text = TEXT.format(model=model, learning_rate=learning_rate, more=more, steps=steps)
        self.file: RunFile = parse_run(text, file="run.toml", folder=folder)
        self.store: Store = directory.store_of(self.file)
        self.said: list[dict[str, Any]] = []
        with bars(Console(quiet=True)) as shown:
            prepare(self.file, self.store, shown)

    def train(self, wanted: Callable[[], int] = lambda: 0, fence: bool = False) -> int:
        """The exit code of one epoch."""
        holder = Holder(pool="here", host="test", pid=1, id=str(len(self.said)))
        lease = Leases(self.store, ttl_seconds=self.file.watch.lease_seconds).take(holder, fence=fence)
        told = Assignment(
            store=self.store.url,
            pool="here",
            lease=lease.number,
            holder=dataclasses.asdict(holder),
            since=lease.since,
            usd_before=0.0,
            trace=True,
        )
        self.said = []
        return Epoch(told, lambda event, **facts: self.said.append({"event": event, **facts}), wanted).run()

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.said if event["event"] == name]
