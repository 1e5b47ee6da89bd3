"""From an address to the obstore object that does the work."""

from __future__ import annotations

import os
import re
import stat
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote, urlsplit

import obstore
from obstore import exceptions
from obstore.store import LocalStore, MemoryStore

from anypool.store.errors import StoreGoneError, StoreUrlError, first_line, translate

if TYPE_CHECKING:
    from obstore.store import ObjectStore, RetryConfig

FORMS = "file:///folder, a plain path, memory://NAME, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix"
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.\-]*):/")
_MEMORY_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._\-]*$")

# Connection errors and 5xx answers are tried again with growing pauses, about a minute in all: a store that is away for
# longer is told as gone, so that a lease holder notices before others give it up for dead many times over.
RETRIES: RetryConfig = {
    "max_retries": 8,
    "retry_timeout": timedelta(seconds=60),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=10), "base": 2},
}

_memories: dict[str, MemoryStore] = {}
_memories_lock = threading.Lock()


class Place(Protocol):
    """Where objects are. `native` gives the obstore object, or None: there is nothing to read here yet."""

    url: str

    def native(self, *, writing: bool) -> ObjectStore | None: ...

    def sweep(self, prefix: str, older_than_seconds: float) -> list[str]: ...


class Folder:
    """A folder of the file system. It is made by the first write; once seen, its absence means the store is gone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = f"file://{path}"
        self._store: LocalStore | None = None
        self._lock = threading.Lock()
        with suppress(OSError):  # told by the first use, as it would be if it came later
            for part in (path, *path.parents):
                if part.exists():
                    if not part.is_dir():
                        raise StoreUrlError(f"store {str(path)!r}: {str(part)!r} is a file; name a folder")
                    break
            self.native(writing=False)

    def native(self, *, writing: bool) -> ObjectStore | None:
        # obstore would silently make a vanished root again, on whatever disk is below an unmounted one.
        with self._lock:
            try:
                if self._is_there():
                    # automatic_cleanup: a folder whose last object is deleted is no folder, as in a bucket.
                    self._store = self._store or LocalStore(self.path, automatic_cleanup=True)
                    return self._store
                if self._store is not None:
                    raise StoreGoneError(f"{self.url}: the folder vanished; is its disk still mounted?", store=self.url)
                if not writing:
                    return None
                self.path.mkdir(parents=True, exist_ok=True)
                self._store = LocalStore(self.path, automatic_cleanup=True)
                return self._store
            except (OSError, exceptions.BaseError) as error:
                raise translate(error, store=self.url, key="", writing=True) from error

    def _is_there(self) -> bool:
        # Path.is_dir() says False also where it may not look.
        try:
            return stat.S_ISDIR(self.path.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def sweep(self, prefix: str, older_than_seconds: float) -> list[str]:
        """Delete what killed writers left behind: obstore stages a write to KEY in a file named KEY#N beside it."""
        if self.native(writing=False) is None:
            return []
        oldest = time.time() - older_than_seconds
        swept = []
        for folder, _, files in os.walk(self.path / prefix):
            for name in files:
                path = Path(folder, name)
                if not re.search(r"#\d+$", name):
                    continue
                try:
                    if path.stat().st_mtime <= oldest:
                        path.unlink()
                        swept.append(path.relative_to(self.path).as_posix())
                except FileNotFoundError:  # its writer ended just now
                    continue
                except OSError as error:
                    raise translate(error, store=self.url, key=name, writing=True) from error
        return sorted(swept)


class Remote:
    """A bucket, or this process' memory: reachable as long as it answers."""

    def __init__(self, url: str, store: ObjectStore) -> None:
        self.url, self._store = url, store

    def native(self, *, writing: bool) -> ObjectStore | None:
        return self._store

    def sweep(self, prefix: str, older_than_seconds: float) -> list[str]:
        """Nothing to do: unfinished multipart uploads are invisible, and a rule of the bucket deletes them."""
        return []


def open_place(url: str) -> Place:
    """The place an address names. Raises StoreUrlError with the forms there are."""
    if not isinstance(url, str) or not url.strip() or "\0" in url:
        raise StoreUrlError(f"store {url!r} names nothing; write {FORMS}")
    scheme = found.group(1).lower() if (found := _SCHEME.match(url)) else ""
    if not scheme:
        try:
            path = Path(url).expanduser()
        except RuntimeError as error:  # ~nobody
            raise StoreUrlError(f"store {url!r}: {error}; write the whole path") from error
        return Folder(Path(os.path.abspath(path)))  # noqa: PTH100 - resolve() would follow symlinks
    parts = urlsplit(url)
    if scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise StoreUrlError(f"store {url!r} names a host; write file:///folder with three slashes")
        # `#` and `?` are ordinary characters of a path.
        path = Path(unquote(re.sub(r"^file:(//(localhost)?)?", "", url, flags=re.IGNORECASE)))
        return Folder(Path(os.path.abspath(path)))  # noqa: PTH100 - as above
    if parts.query or parts.fragment:
        raise StoreUrlError(f"store {url!r} has a query or fragment; options come from the environment, leave them out")
    if scheme == "memory":
        name = (parts.netloc + parts.path).rstrip("/")
        if not _MEMORY_NAME.match(name):
            raise StoreUrlError(f"store {url!r} needs one name of letters, digits, '.', '_', '-': memory://NAME")
        with _memories_lock:
            return Remote(f"memory://{name}", _memories.setdefault(name, MemoryStore()))
    if scheme not in ("s3", "gs", "az"):
        raise StoreUrlError(f"store {url!r} starts with {scheme}:, which is no store; write {FORMS}")
    if not parts.netloc:
        raise StoreUrlError(f"store {url!r} names no bucket; write {scheme}://bucket/prefix")
    if parts.username or parts.password:
        raise StoreUrlError(f"store {scheme}://… holds credentials; they come from the environment, leave them out")
    url = url.rstrip("/")
    try:
        # No client options: giving any would throw away those of the environment (AWS_ALLOW_HTTP, proxies).
        return Remote(url, obstore.store.from_url(url, retry_config=RETRIES))
    except (exceptions.BaseError, ValueError, OSError) as error:
        raise StoreUrlError(
            f"store {url!r} cannot be opened: {first_line(error)}; check the address and the credentials' environment "
            "variables"
        ) from error
