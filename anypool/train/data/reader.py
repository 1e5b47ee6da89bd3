"""Rows read before they are needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol

from anypool.train.data.rows import Rows


class HasRows(Protocol):
    def rows_at(self, step: int, part: slice | None = None) -> Rows: ...


class Reader:
    """Yields (step, rows) for `first_step` and every step after it, reading `ahead` steps in the background."""

    def __init__(self, mixture: HasRows, first_step: int = 0, part: slice | None = None, ahead: int = 2) -> None:
        """part: which rows of a step this host needs. ahead: at least 1, each in a thread of its own."""
        self._mixture, self._part = mixture, part
        self._threads = ThreadPoolExecutor(ahead, thread_name_prefix="rows")
        self._step = first_step
        self._coming: deque[Future[Rows]] = deque()
        for _ in range(ahead):
            self._read_one_more()

    def _read_one_more(self) -> None:
        step = self._step + len(self._coming)
        self._coming.append(self._threads.submit(self._mixture.rows_at, step, self._part))

    def __iter__(self) -> Iterator[tuple[int, Rows]]:
        return self

    def __next__(self) -> tuple[int, Rows]:
        """Waits for the next step's rows. Raises what reading them raised, and StopIteration once closed."""
        if not self._coming:
            raise StopIteration
        rows = self._coming[0].result()
        self._coming.popleft()
        step, self._step = self._step, self._step + 1
        self._read_one_more()
        return step, rows

    def close(self) -> None:
        """Ends the threads; returns once they have."""
        self._coming.clear()
        self._threads.shutdown(cancel_futures=True)

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
