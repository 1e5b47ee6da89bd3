"""Objects in a folder or a bucket: create-only writes, leases and manifests, the same on every back end.

- `Store.open(url)`: get, put, create, upload, list of one store; `Entry`, `Uploaded` are what it gives;
- `Leases`: who holds a run; `Lease`, `Holder`, `Heartbeat`;
- `Manifest`, `ObjectRecord` with `commit`, `load` and `verify`: what makes a folder's objects one thing;
- `mirror`: a folder's second copy in another store; `Mirrored` says what it did;
- `claim`: `create` that knows its own work again after a lost answer;
- `StoreUrlError`, `StoreKeyError`: a caller's mistakes (ValueError);
- `StoreError` and below it `NotFoundError`, `ExistsError`, `StoreFullError`, `StoreReadOnlyError`, `StoreGoneError`,
  `LeaseHeldError`, `LeaseLostError`, `CorruptObjectError`.

README.md says what each guarantee rests on.
"""

from anypool.store.claim import claim
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
from anypool.store.leases import Heartbeat, Holder, Lease, LeaseHeldError, LeaseLostError, Leases
from anypool.store.manifest import CorruptObjectError, Manifest, ObjectRecord, commit, load, verify
from anypool.store.mirror import Mirrored, mirror
from anypool.store.sending import Uploaded
from anypool.store.store import Entry, Store

__all__ = [
    "CorruptObjectError",
    "Entry",
    "ExistsError",
    "Heartbeat",
    "Holder",
    "Lease",
    "LeaseHeldError",
    "LeaseLostError",
    "Leases",
    "Manifest",
    "Mirrored",
    "NotFoundError",
    "ObjectRecord",
    "Store",
    "StoreError",
    "StoreFullError",
    "StoreGoneError",
    "StoreKeyError",
    "StoreReadOnlyError",
    "StoreUrlError",
    "Uploaded",
    "claim",
    "commit",
    "load",
    "mirror",
    "verify",
]
