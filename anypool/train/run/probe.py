"""What the step after a checkpoint gave, for the gate of whoever takes over: known only once that step is done."""

from __future__ import annotations

import threading
from typing import Any

from anypool.train.run.gate import Recorded


class Probe:
    """The loop says which checkpoint wants a record and what each step gave; the saver's thread waits for it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._wanted: dict[int, Recorded | None] = {}
        self._closed = False

    def expect(self, committed: int) -> None:
        """A checkpoint after `committed` steps is being made: the next step's result belongs to it."""
        with self._changed:
            self._wanted[committed] = None

    def answer(self, number: int, recorded: Recorded) -> None:
        """What step `number` gave, counted from 1."""
        with self._changed:
            if number - 1 in self._wanted:
                self._wanted[number - 1] = recorded
                self._changed.notify_all()

    def wait(self, committed: int) -> dict[str, Any] | None:
        """The record for a checkpoint, once it is there; None if the loop ended without that step."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._wanted.get(committed) is not None)
            recorded = self._wanted.pop(committed, None)
        return None if recorded is None else recorded.as_json()

    def close(self) -> None:
        """No further step will be made: whoever waits goes on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
