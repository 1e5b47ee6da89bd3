"""The store: named objects that appear whole or not at all, the same on a disk and in a bucket."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import obstore
from obstore import exceptions

from anypool.store.errors import NotFoundError, StoreError, StoreKeyError, translate
from anypool.store.places import Place, open_place
from anypool.store.ranges import REQUEST_BYTES, Span, read_ranges
from anypool.store.sending import PART_BYTES, Buffer, Uploaded, send

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_SEGMENT = re.compile(r"[A-Za-z0-9._=+@,\-]+")
_OBSTORE_ERRORS = (exceptions.BaseError, OSError, NotImplementedError)


@dataclass(frozen=True)
class Entry:
    """One object of a listing: its key relative to the store listed, bytes, and unix seconds of its last write."""

    key: str
    size: int
    modified: float


class Store:
    """Objects under keys such as `runs/a/run.toml`. Made by `Store.open`; every method may be called from any thread.

    Keys are segments of letters, digits and `. _ - = + @ ,` joined by `/`; anything else raises StoreKeyError
    (a ValueError). What the store does not do raises a StoreError; see `anypool.store.errors`.

    After os.fork the child must not use a store of its parent: start processes with "spawn".
    """

    def __init__(self, place: Place, prefix: str = "") -> None:
        self._place, self._prefix = place, prefix

    @classmethod
    def open(cls, url: str) -> Store:
        """The store at file:///folder, a plain path, memory://NAME, s3://bucket/prefix, gs://… or az://….

        Nothing is written: a folder is made by the first write. Credentials and options of buckets come from the
        environment (AWS_*, GOOGLE_*, AZURE_*). Raises StoreUrlError (a ValueError) for anything else.
        """
        return cls(open_place(url))

    @property
    def url(self) -> str:
        """The address, without a slash at the end; a store below a prefix has the prefix in it."""
        return f"{self._place.url}/{self._prefix}" if self._prefix else self._place.url

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def at(self, prefix: str) -> Store:
        """The store below a prefix: its keys are relative to it. `at("")` is this store."""
        prefix = prefix.strip("/")
        return Store(self._place, self._path(prefix) if prefix else self._prefix)

    def get(self, key: str) -> bytes:
        """All bytes of an object. Raises NotFoundError."""
        with self._reading(key) as (native, path):
            found = obstore.get(native, path)
            if found.meta["size"] <= REQUEST_BYTES:
                return found.bytes().to_bytes()
        return b"".join(self.stream(key))

    def stream(self, key: str, part_bytes: int = PART_BYTES) -> Iterator[bytes]:
        """The bytes of an object in parts, all of one version of it: StoreError if it is replaced meanwhile."""
        with self._reading(key) as (native, path):
            meta = obstore.head(native, path)
        for start in range(0, meta["size"], part_bytes):
            with self._reading(key) as (native, path):
                stop = min(start + part_bytes, meta["size"])
                found = obstore.get(native, path, options={"if_match": meta["e_tag"], "range": (start, stop)})
                part = found.bytes().to_bytes()
            if len(part) != stop - start:
                raise self._short(key, start, stop - start, meta["size"])
            yield part

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly `length` bytes from byte `start`. Raises NotFoundError, StoreError if the object is shorter."""
        return self.get_ranges(key, [(start, length)])[0]

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (start, length), read in parallel; near ones share a request. Raises as `get_range`."""
        for start, length in ranges:
            if start < 0 or length < 0:
                raise ValueError(f"range ({start}, {length}) of {key!r}: start and length must be 0 or more")

        def read(span: Span) -> bytes:
            try:
                with self._reading(key) as (native, path):
                    return obstore.get_range(native, path, start=span[0], end=span[1]).to_bytes()
            except NotFoundError:
                raise
            except StoreError:
                if span[0] >= self.size(key):  # told below, with the range that was asked for
                    return b""
                raise

        answer = read_ranges(read, ranges)
        for (start, length), part in zip(ranges, answer, strict=True):
            if len(part) != length:
                raise self._short(key, start, length, self.size(key))
        return answer

    def size(self, key: str) -> int:
        """How many bytes an object has. Raises NotFoundError."""
        with self._reading(key) as (native, path):
            return obstore.head(native, path)["size"]

    def exists(self, key: str) -> bool:
        """Whether there is an object under this key."""
        try:
            self.size(key)
        except NotFoundError:
            return False
        return True

    def put(self, key: str, data: Buffer) -> None:
        """Write an object, over any that is there. A reader sees the old bytes or the new ones, never a mixture."""
        with self._writing(key) as (native, path):
            obstore.put(native, path, bytes(data), mode="overwrite", chunk_size=PART_BYTES)

    def create(self, key: str, data: Buffer) -> None:
        """Write an object only if there is none; of several at once exactly one succeeds. Raises ExistsError.

        For small objects: it goes in one request. After a lost connection the object may be there although this raised
        StoreGoneError, and ExistsError may speak of this call's own first try. `claim` in this room tells them apart.
        """
        with self._writing(key) as (native, path):
            obstore.put(native, path, bytes(data), mode="create")

    def upload(self, key: str, chunks: Iterable[Buffer]) -> Uploaded:
        """Write an object of any size from chunks, hashed while they are sent; it appears whole, at the end, or never.

        What `chunks` raises ends the upload and is raised here; it runs in this thread and may use stores. A chunk is
        bytes or any contiguous array. Its maker may reuse it once the next is asked for, unless it is read-only: then
        it must keep its bytes until this returns.
        """
        with self._writing(key) as (native, path):
            pass
        uploaded, failure = send(native, path, chunks)  # out of `with`: an OSError of `chunks` is not the store's
        with self._writing(key):
            if failure is not None:
                raise failure
        return uploaded

    def copy_from(self, other: Store, key: str) -> Uploaded:
        """Copy the object under `key` of another store to the same key here, part by part. Raises NotFoundError."""
        return self.upload(key, other.stream(key))

    def folders(self, prefix: str = "") -> list[str]:
        """The folders right below a folder, sorted; like `list` relative to this store: `folders("a")` gives `["a/b"]`.

        On a disk a folder counts that holds nothing but what a killed writer left; `sweep` removes that.
        """
        with self._calling(prefix, writing=False) as native:
            if native is None:
                return []
            found = obstore.list_with_delimiter(native, self._folder(prefix))["common_prefixes"]
        return sorted(self._relative(path.rstrip("/")) for path in found)

    def delete(self, *keys: str) -> None:
        """Delete objects. One that is not there is no error."""
        paths = [self._path(key) for key in keys]
        with self._calling(", ".join(keys), writing=False) as native:
            if native is None or not paths:
                return
            try:
                obstore.delete(native, paths)
            except FileNotFoundError:  # one was not there: which others were deleted is unknown
                for path in paths:
                    try:
                        obstore.delete(native, path)
                    except FileNotFoundError:
                        continue

    def sweep(self, older_than_seconds: float = 24 * 3600.0) -> list[str]:
        """Delete staging files that killed writers left in a file:// store; gives their paths below the store's root.

        A file that was written to within `older_than_seconds` is left: its writer may live. In buckets a lifecycle rule
        (abort incomplete multipart uploads) does this, and nothing is done here.
        """
        return self._place.sweep(self._prefix, older_than_seconds)

    def list(self, prefix: str = "") -> list[Entry]:
        """Every object below a folder, however deep, sorted by key; keys are relative to this store, not to `prefix`.

        `prefix` is whole segments: "runs/a" finds runs/a/x and not runs/ab/x. Nothing there is an empty list.
        """
        with self._calling(prefix, writing=False) as native:
            if native is None:
                return []
            found = obstore.list(native, self._folder(prefix)).collect()
        entries = [
            Entry(self._relative(meta["path"]), meta["size"], meta["last_modified"].timestamp()) for meta in found
        ]
        return sorted(entries, key=lambda entry: entry.key)

    def _path(self, key: str) -> str:
        if not isinstance(key, str) or not key:
            raise StoreKeyError(f"key {key!r} names no object; write segments joined by '/', such as runs/a/run.toml")
        for segment in key.split("/"):
            if not _SEGMENT.fullmatch(segment) or segment in (".", ".."):
                raise StoreKeyError(
                    f"key {key!r}: segment {segment!r} is not allowed; use letters, digits and . _ - = + @ , "
                    "with single slashes between"
                )
        return f"{self._prefix}/{key}" if self._prefix else key

    def _folder(self, prefix: str) -> str | None:
        prefix = prefix.rstrip("/")
        return (self._path(prefix) if prefix else self._prefix) or None

    def _relative(self, path: str) -> str:
        return path.removeprefix(f"{self._prefix}/") if self._prefix else path

    def _short(self, key: str, start: int, length: int, size: int) -> StoreError:
        return StoreError(
            f"{self.url}: {key}: bytes {start} to {start + length} were asked for, but the object has {size}; it "
            "is not what its reader takes it for",
            store=self.url,
            key=key,
        )

    @contextmanager
    def _calling(self, key: str, *, writing: bool) -> Iterator[ObjectStore | None]:
        try:
            yield self._place.native(writing=writing)
        except _OBSTORE_ERRORS as error:
            raise translate(error, store=self.url, key=key, writing=writing) from error

    @contextmanager
    def _reading(self, key: str) -> Iterator[tuple[ObjectStore, str]]:
        path = self._path(key)
        with self._calling(key, writing=False) as native:
            if native is None:
                raise NotFoundError(
                    f"{self.url}: {key}: no such object; the store holds nothing yet", store=self.url, key=key
                )
            yield native, path

    @contextmanager
    def _writing(self, key: str) -> Iterator[tuple[ObjectStore, str]]:
        path = self._path(key)
        with self._calling(key, writing=True) as native:
            assert native is not None
            yield native, path
