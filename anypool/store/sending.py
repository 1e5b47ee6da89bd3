"""Sending an object of unknown size in parts, hashed on the way.

obstore pulls parts from inside its own runtime, where no store may be used and from where an error of the maker comes
back as one of obstore's. So obstore works in a thread of its own, and the caller's chunks are made in the caller's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import obstore
from blake3 import blake3

if TYPE_CHECKING:
    from obstore.store import ObjectStore

Buffer = bytes | bytearray | memoryview

# A request has 30 seconds (obstore's default), so large objects move in pieces of this size. S3 allows 10,000 parts.
PART_BYTES = 8 * 1024 * 1024
_PARALLEL_PARTS = 4


@dataclass(frozen=True)
class Uploaded:
    """What was sent: bytes, and their BLAKE3 in hexadecimal."""

    size: int
    blake3: str


class _Abandoned(Exception):
    """Tells obstore that no more will come, and that what it has is to be thrown away."""


class _Handoff:
    """One part at a time from the thread that makes them (`give`, `close`) to the one that sends them (iteration)."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._part: Buffer | None = None
        self._closed = self._abandoned = self._ended = False

    def give(self, part: Buffer) -> bool:
        """Wait for room and hand the part over; False when the sender has ended and wants no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._part is None or self._ended)
            self._part = part
            self._changed.notify_all()
            return not self._ended

    def close(self, *, abandon: bool) -> None:
        with self._changed:
            self._closed, self._abandoned = True, abandon
            self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Buffer]:
        return self

    def __next__(self) -> Buffer:
        with self._changed:
            self._changed.wait_for(lambda: self._part is not None or self._closed)
            if self._abandoned:
                raise _Abandoned
            if self._part is None:
                raise StopIteration
            part, self._part = self._part, None
            self._changed.notify_all()
            return part


def send(native: ObjectStore, path: str, chunks: Iterable[Buffer]) -> tuple[Uploaded, BaseException | None]:
    """Send all chunks to `path`. Gives what was sent and what obstore raised, if it did; `chunks` raises as it is.

    Nothing appears at `path` unless everything was sent: the parts of an upload that ended early are deleted.
    """
    handoff = _Handoff()
    failed: list[BaseException] = []

    def sender() -> None:
        try:
            obstore.put(native, path, handoff, chunk_size=PART_BYTES, max_concurrency=_PARALLEL_PARTS)
        except BaseException as error:
            failed.append(error)
        finally:
            handoff.end()

    thread = threading.Thread(target=sender, name=f"upload {path}", daemon=True)
    thread.start()
    hasher = blake3()
    size = 0
    complete = False
    try:
        for part in _parts(chunks):
            hasher.update(part)
            size += len(part)
            if not handoff.give(part):
                break
        complete = True
    finally:
        handoff.close(abandon=not complete)
        thread.join()
    return Uploaded(size, hasher.hexdigest()), failed[0] if failed else None


def _parts(chunks: Iterable[Buffer]) -> Iterator[Buffer]:
    for chunk in chunks:
        view = memoryview(chunk)
        if view.nbytes == 0:  # which cannot be cast
            continue
        view = view.cast("B")
        for start in range(0, len(view), PART_BYTES):
            part = view[start : start + PART_BYTES]
            # obstore keeps what it is given until it is sent: bytes that may change before have to be copied.
            yield part if part.readonly else bytes(part)
