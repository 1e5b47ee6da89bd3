"""A small run that a drill can do something to: its controller in a thread, and everything that was seen of it."""

from __future__ import annotations

import os
import pydoc_data.topics
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from anypool.progress import bars
from anypool.train.checkpoint import Checkpoints
from anypool.train.report import read_run
from anypool.train.run import directory
from anypool.train.run.command import prepare
from anypool.train.run.controller import Controller
from anypool.train.run.file import RunFile, load_run

PATIENCE_SECONDS = 600.0
EVERY_STEPS = 5

RUN = """
[run]
name = "{name}"
store = "./store"
steps = {steps}
seed = {seed}

[model]
vocab_size = 512

[model.config]
model_type = "llama"
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 64
tie_word_embeddings = true

[data]
sequence_length = 64
eval_fraction = 0.0

[[data.source]]
kind = "text"
path = "./topics.txt"
split = "blank-line"

[batch]
rows = 8

[optimizer]
learning_rate = 3e-3
warmup_steps = 4

[checkpoint]
every_steps = {every}
keep_last = 4

[watch]
heartbeat_seconds = 0.2
lease_seconds = {lease_seconds}
{watch}
"""

POOLS = {
    "a": 'topology = "4"\nmesh = "fsdp=2,tensor=2"\n',
    "b": 'topology = "2"\nmesh = "fsdp=2"\n',
    "c": 'topology = "4"\nmesh = "fsdp=2,tensor=2"\n',
    "h": 'topology = "2"\nhosts = 2\nmesh = "fsdp=2"\n',
}
"""Pools of this machine. c is another pool of a's shape; h is two hosts with a device each."""


class DrillError(ValueError):
    """A drill that did not go as a drill must: nothing is known of what it was to show."""


class DrillRun:
    """One run. `start` lets it go, `wait` waits for something it says, `finish` for its end."""

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        steps: int,
        seed: int,
        pools: Iterable[str],
        throttle: float,
        lease_seconds: float = 60.0,
        watch: str = "",
    ) -> None:
        """throttle: seconds that trainers pause after each step. pools: names of POOLS, in the order of preference.

        watch: more lines of the run file's [watch].
        """
        topics = folder / "topics.txt"
        if not topics.is_file():
            topics.write_text("\n\n".join(pydoc_data.topics.topics.values()), encoding="utf-8")
        text = RUN.format(
            name=name, steps=steps, seed=seed, every=EVERY_STEPS, lease_seconds=lease_seconds, watch=watch
        )
        text += "".join(f'\n[[pool]]\nname = "{pool}"\nchip = "cpu"\n{POOLS[pool]}' for pool in pools)
        path = folder / f"{name}.toml"
        path.write_text(text, encoding="utf-8")
        self.file: RunFile = load_run(path)
        self.store = directory.store_of(self.file)
        self.seen: list[dict[str, Any]] = []
        self.logged: list[str] = []
        self.throttle = throttle
        self.controller = Controller(
            self.file, self.store, self._saw, self.logged.append, trace=True, throttle_seconds=throttle
        )
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._raised: BaseException | None = None
        self._how = ""
        self._looked = 0

    def prepare(self) -> None:
        """Everything before the first trainer."""
        from rich.console import Console

        with bars(Console(quiet=True)) as shown:
            prepare(self.file, self.store, shown)

    def start(self, first: str | None = None, fence: bool = False) -> None:
        """Starts the controller."""
        self.prepare()

        def control() -> None:
            try:
                self._how = self.controller.run(first, fence)
            except BaseException as error:
                self._raised = error
            with self._changed:
                self._changed.notify_all()

        self._thread = threading.Thread(target=control, name=f"controller of {self.file.name}", daemon=True)
        self._thread.start()

    def wait(self, event: str, when: Callable[[dict[str, Any]], bool] = lambda event: True) -> dict[str, Any]:
        """The next event of this name for which `when` holds, from those not waited for yet on. Raises DrillError."""
        end = time.monotonic() + PATIENCE_SECONDS
        with self._changed:
            while True:
                while self._looked < len(self.seen):
                    found = self.seen[self._looked]
                    self._looked += 1
                    if found["event"] == event and when(found):
                        return found
                if self._thread is None or not self._thread.is_alive():
                    raise DrillError(f"run {self.file.name}: it ended before {event!r}: {self._raised or self._how}")
                if not self._changed.wait(max(0.0, min(1.0, end - time.monotonic()))) and time.monotonic() > end:
                    raise DrillError(f"run {self.file.name}: no {event!r} in {PATIENCE_SECONDS:.0f} s")

    def kill(self) -> float:
        """SIGKILL for the trainer; when."""
        assert self.controller.trainer is not None, "somebody said something a moment ago"
        at = time.monotonic()
        os.kill(self.controller.trainer.pid, signal.SIGKILL)
        return at

    def finish(self) -> None:
        """Waits for the last step. Raises what the controller raised, DrillError if it does not end."""
        assert self._thread is not None
        self._thread.join(PATIENCE_SECONDS)
        if self._thread.is_alive():
            self.stop()
            raise DrillError(f"run {self.file.name}: not finished after {PATIENCE_SECONDS:.0f} s")
        if self._raised is not None:
            raise self._raised
        if self._how != "finished":
            raise DrillError(f"run {self.file.name}: ended as {self._how!r}")

    def stop(self) -> None:
        """Ends everything at once; for when the drill itself fails."""
        self.controller.asked.stop = 2
        if self._thread is not None:
            self._thread.join(30)

    def losses(self) -> dict[int, float]:
        """Loss of every step, of the epoch whose result counts."""
        return dict(read_run(self.store).curve("loss"))

    def samples(self) -> dict[int, list[tuple[Any, ...]]]:
        """The samples of every step, of the last epoch that did it."""
        return {e["step"]: [tuple(one) for one in e["ids"]] for e in list(self.seen) if e["event"] == "step"}

    def weights(self) -> dict[str, bytes]:
        """Every file with tensors of the last commit."""
        last = Checkpoints(self.store, None).latest()
        assert last is not None, "a finished run has committed"
        below = self.store.at(last.folder)
        return {entry.key: below.get(entry.key) for entry in below.list() if entry.key.endswith(".safetensors")}

    def _saw(self, event: dict[str, Any]) -> None:
        with self._changed:
            self.seen.append(event)
            self._changed.notify_all()
