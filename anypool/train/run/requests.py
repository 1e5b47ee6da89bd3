"""What people ask of a run that another process controls, through its store: so far, to move to another pool."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence

from anypool.store import NotFoundError, Store

FOLDER = "requests/"


def ask_to_move(store: Store, pool: str) -> str:
    """Asks whoever controls the run to move it to `pool`; returns the request's key. It is gone once taken."""
    key = f"{FOLDER}{uuid.uuid4().hex}.json"
    store.create(key, json.dumps({"move_to": pool}).encode())
    return key


def take(store: Store, pools: Sequence[str]) -> str | None:
    """The pool of the newest request, and no request is left; None if there is none, or none for one of `pools`."""
    wanted = None
    for entry in sorted(store.list(FOLDER), key=lambda entry: entry.modified):
        try:
            asked = json.loads(store.get(entry.key))
        except (NotFoundError, ValueError):
            asked = None
        store.delete(entry.key)
        if isinstance(asked, dict) and asked.get("move_to") in pools:
            wanted = asked["move_to"]
    return wanted


def is_waiting(store: Store, key: str) -> bool:
    """Whether nobody has taken the request yet."""
    return store.exists(key)
