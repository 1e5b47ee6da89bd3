"""Objects in a folder or a bucket: create-only writes, leases and manifests, the same on every back end.

- `Store.open(url)`: get, put, create, upload, list of one store; `Entry`, `Uploaded` are what it gives;
- `StoreUrlError`, `StoreKeyError`: a caller's mistakes (ValueError);
- `StoreError` and below it `NotFoundError`, `ExistsError`, `StoreFullError`, `StoreReadOnlyError`, `StoreGoneError`.

README.md says what each guarantee rests on.
"""

from anypool.store.errors import (
    ExistsError,
    NotFoundError,
    StoreError,
    StoreFullError,
    StoreGoneError,
    StoreKeyError,
    StoreReadOnlyError,
    StoreUrlError,
)
from anypool.store.sending import Uploaded
from anypool.store.store import Entry, Store

__all__ = [
    "Entry",
    "ExistsError",
    "NotFoundError",
    "Store",
    "StoreError",
    "StoreFullError",
    "StoreGoneError",
    "StoreKeyError",
    "StoreReadOnlyError",
    "StoreUrlError",
    "Uploaded",
]
