"""Manifests: what makes the objects of a folder one thing that exists, and proves them unchanged.

`manifest.json` is written last and once: every object of the folder with its size and BLAKE3. Without it the folder is
something that was begun.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

import msgspec
from blake3 import blake3

from anypool.store.claim import claim
from anypool.store.errors import NotFoundError, StoreError
from anypool.store.store import Store

NAME = "manifest.json"

# Called with the bytes done so far and the bytes there are, from any thread, one call at a time.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ObjectRecord:
    """An object as it was written: bytes, and BLAKE3 in hexadecimal."""

    size: int
    blake3: str


@dataclass(frozen=True)
class Manifest:
    """The objects of a folder, by their keys relative to it, and whatever else its writer wants known (JSON)."""

    objects: dict[str, ObjectRecord]
    known: dict[str, Any] = field(default_factory=dict)


class CorruptObjectError(StoreError):
    """An object is not what its manifest says. `expected` and `found` are BLAKE3 hashes; `found` is None if missing."""

    def __init__(self, message: str, *, store: str, key: str, expected: str | None, found: str | None) -> None:
        super().__init__(message, store=store, key=key)
        self.expected, self.found = expected, found


@dataclass(frozen=True)
class _File:
    objects: dict[str, ObjectRecord]
    known: dict[str, Any]
    nonce: str  # by it a writer knows its own manifest again, should the answer to its write be lost


def commit(store: Store, folder: str, manifest: Manifest) -> None:
    """Write `folder/manifest.json`, once. Raises ExistsError if the folder is committed already."""
    below = store.at(folder)
    if NAME in manifest.objects:
        raise ValueError(f"manifest of {folder!r} lists {NAME!r}, which cannot hold its own hash; leave it out")
    data = msgspec.json.encode(_File(dict(sorted(manifest.objects.items())), manifest.known, secrets.token_hex(16)))
    claim(below, NAME, msgspec.json.format(data, indent=1))


def load(store: Store, folder: str) -> Manifest:
    """The manifest of a committed folder. Raises NotFoundError if it was not committed."""
    below = store.at(folder)
    try:
        data = below.get(NAME)
    except NotFoundError as error:
        raise NotFoundError(
            f"{below.url}: not committed: it has no {NAME}; what it holds was begun and not ended",
            store=below.url,
            key=NAME,
        ) from error
    return parse(data, below)


def parse(data: bytes, store: Store) -> Manifest:
    """The manifest in `data`, read from `store`. Raises CorruptObjectError if it is none."""
    try:
        file = msgspec.json.decode(data, type=_File)
    except msgspec.MsgspecError as error:
        raise CorruptObjectError(
            f"{store.url}: {NAME} is damaged or no manifest ({error}); use another copy",
            store=store.url,
            key=NAME,
            expected=None,
            found=blake3(data).hexdigest(),
        ) from error
    return Manifest(file.objects, file.known)


def verify(
    store: Store, folder: str, manifest: Manifest, *, workers: int = 4, progress: Progress | None = None
) -> None:
    """Read every object and compare size and hash, `workers` objects at once.

    Raises CorruptObjectError for the first that is missing, longer, shorter or changed. Objects the manifest does not
    name are not looked at.
    """
    below = store.at(folder)
    total = sum(record.size for record in manifest.objects.values())
    done = Counter(total, progress)
    with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
        checks = [pool.submit(_check, below, key, record, done) for key, record in manifest.objects.items()]
        try:
            for check in as_completed(checks):
                check.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class Counter:
    """Bytes done, from several threads, told to a `Progress`."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress, self._lock = 0, total, progress, threading.Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self._done += size
            if self._progress:
                self._progress(self._done, self._total)


def hash_of(store: Store, key: str, done: Counter | None = None) -> ObjectRecord:
    """Size and BLAKE3 of an object as it is now. Raises NotFoundError."""
    hasher, size = blake3(), 0
    for part in store.stream(key):
        hasher.update(part)
        size += len(part)
        if done:
            done.add(len(part))
    return ObjectRecord(size, hasher.hexdigest())


def _check(store: Store, key: str, record: ObjectRecord, done: Counter) -> None:
    try:
        found = hash_of(store, key, done)
    except NotFoundError as error:
        raise corrupt(store, key, record, None) from error
    if found != record:
        raise corrupt(store, key, record, found)


def corrupt(store: Store, key: str, record: ObjectRecord, found: ObjectRecord | None) -> CorruptObjectError:
    """The error for an object that is not what its record says; `found` None: it is missing."""
    now = f"is {found.size} bytes with BLAKE3 {found.blake3}" if found else "is missing"
    return CorruptObjectError(
        f"{store.url}: {key} {now}; its manifest says {record.size} bytes with BLAKE3 {record.blake3}; "
        "use another copy",
        store=store.url,
        key=key,
        expected=record.blake3,
        found=found.blake3 if found else None,
    )
