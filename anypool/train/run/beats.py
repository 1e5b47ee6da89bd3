"""A trainer's signs of life, and how it learns that the run is another's by now."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from anypool.store import Lease, LeaseLostError, Leases, StoreError


class Beats:
    """Writes the lease's heartbeat every `seconds`, in a thread of its own. known: gives what goes into it.

    lost: called, once, in that thread, when a higher lease exists, or when the store could not be reached for
    `lease_seconds`: by then another may hold the run, and this trainer can not know.
    """

    def __init__(
        self,
        leases: Leases,
        lease: Lease,
        seconds: float,
        lease_seconds: float,
        lost: Callable[[str], None],
        known: Callable[[], dict[str, Any]],
    ) -> None:
        self._leases, self._lease, self._seconds, self._limit, self._lost = leases, lease, seconds, lease_seconds, lost
        self._known = known
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """The last heartbeat has been written when this returns."""
        self._ended.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        reached = time.monotonic()
        while True:
            last = self._ended.is_set()
            try:
                self._leases.beat(self._lease, self._known())
                reached = time.monotonic()
            except LeaseLostError as error:
                self._lost(str(error))
                return
            except StoreError as error:
                if time.monotonic() - reached > self._limit:
                    self._lost(f"no heartbeat could be written for {self._limit:.0f} s: {error}")
                    return
            if last:
                return
            self._ended.wait(self._seconds)
