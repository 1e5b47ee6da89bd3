"""Lines that become objects in a store, a part at a time, and that outlive a store which is away for a while."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field

from anypool.store import Store

LINES_A_PART = 500


@dataclass
class _Part:
    number: int
    lines: list[bytes] = field(default_factory=list)
    written: int = 0


class Journal:
    """Lines under `<folder>/part-00000.jsonl` and so on. Safe to use from several threads.

    The last part is open: it is written again as a whole whenever it grew, which every store can do atomically. A part
    leaves memory once it is full and written. `lines_a_part` bounds what is written again and what a reader fetches.
    """

    def __init__(self, store: Store, folder: str, lines_a_part: int = LINES_A_PART) -> None:
        self._store, self._folder, self._size = store, folder, lines_a_part
        self._parts: deque[_Part] = deque([_Part(0)])
        self._changing = threading.Lock()
        self._writing = threading.Lock()

    def append(self, line: bytes) -> None:
        """Keeps a line, with its newline, to be written by the next `write`."""
        with self._changing:
            if len(self._parts[-1].lines) >= self._size:
                self._parts.append(_Part(self._parts[-1].number + 1))
            self._parts[-1].lines.append(line)

    def write(self) -> None:
        """Brings everything into the store. Raises what the store raises; the lines are kept, and written next time."""
        with self._writing:
            with self._changing:
                parts = [(part, len(part.lines)) for part in self._parts]
            for part, length in parts:
                if length > part.written:
                    self._store.put(f"{self._folder}/part-{part.number:05d}.jsonl", b"".join(part.lines[:length]))
                    part.written = length
            with self._changing:
                while len(self._parts) > 1 and self._parts[0].written == len(self._parts[0].lines):
                    self._parts.popleft()

    @property
    def unwritten(self) -> int:
        """Lines that are not in the store yet."""
        with self._changing:
            return sum(len(part.lines) - part.written for part in self._parts)
