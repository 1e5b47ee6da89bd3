"""Create-only writes that know their own work again."""

from __future__ import annotations

from anypool.store.errors import ExistsError, NotFoundError, StoreError
from anypool.store.store import Store


def claim(store: Store, key: str, data: bytes) -> None:
    """`store.create`, and success also if the object holds exactly `data`: then an earlier try of ours made it.

    A connection can be lost after the store wrote and before it answered; the next try finds the object there. So
    `data` must hold something no other writer would write: a random number, or the holder of the lease it belongs to.
    Raises ExistsError when the object is another's, else what `create` raised.
    """
    try:
        store.create(key, data)
    except StoreError as error:
        try:
            found = store.get(key)
        except NotFoundError:
            raise error from None
        except StoreError:  # the first error says more
            raise error from None
        if found == data:
            return
        if isinstance(error, ExistsError):
            raise
        raise ExistsError(
            f"{store.url}: {key}: already exists, written by another, and is written only once",
            store=store.url,
            key=key,
        ) from error
