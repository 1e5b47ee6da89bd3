"""A second copy of a run's checkpoints, in another store, made beside the training.

The newest checkpoint is copied; one that is still waiting when a newer one is committed is left out. The records of
leases go with it, so that the run can be taken over from there when the first store is lost. From then on nothing is
copied into it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from contextlib import suppress
from threading import Condition, Thread

from anypool.store import ExistsError, Leases, NotFoundError, Store, StoreError, mirror
from anypool.train.checkpoint.chain import Folders
from anypool.train.checkpoint.errors import CheckpointError
from anypool.train.checkpoint.keep import delete_folder
from anypool.train.checkpoint.names import Place

_RECORD = re.compile(r"leases/\d+(\.base|\.released)?\.json")
_LEASE = re.compile(r"leases/\d+\.json")


class SecondCopy:
    """Copies what it is offered, in a thread of its own. report: called with what went wrong, in words."""

    def __init__(self, store: Store, target: Store, report: Callable[[str], None]) -> None:
        self._store, self._target, self._report = store, target, report
        self._changed = Condition()
        self._next: tuple[Place, frozenset[Place]] | None = None
        self.copying: Place | None = None
        self._closed = False
        self._thread = Thread(target=self._run, name="second copy", daemon=True)
        self._thread.start()

    def offer(self, place: Place, kept: Collection[Place]) -> None:
        """Copy a committed checkpoint as soon as the one before is done. kept: which may stay in the second store."""
        with self._changed:
            self._next = place, frozenset(kept)
            self._changed.notify_all()

    def used(self) -> set[Place]:
        """What is being copied or waits for it."""
        with self._changed:
            return {place for place in (self.copying, self._next and self._next[0]) if place}

    def wait(self) -> None:
        """Until what was offered is copied, or has failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._next is None and self.copying is None)

    def close(self) -> None:
        self.wait()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next is not None or self._closed)
                if self._next is None:
                    return
                (self.copying, kept), self._next = self._next, None
                place = self.copying
            try:
                copy(self._store, self._target, place, kept)
            except (StoreError, CheckpointError) as error:
                self._report(f"{place.folder} was not copied to {self._target.url}: {error}")
            except Exception as error:  # the training goes on, whatever it was
                self._report(f"{place.folder} was not copied to {self._target.url}: {type(error).__name__}: {error}")
            finally:
                with self._changed:
                    self.copying = None
                    self._changed.notify_all()


def copy(store: Store, target: Store, place: Place, kept: Collection[Place]) -> None:
    """Copy one checkpoint with what is needed to go on from it, then delete what is not among `kept`.

    Raises CheckpointError if the run was taken over in the target, else what the stores raise.
    """
    _copy_records(store, target)
    mirror(store, target, place.folder)
    folders = Folders.of(target)
    for old in sorted((folders.committed | folders.begun) - set(kept) - {place}):
        if old.epoch <= place.epoch:
            delete_folder(target, old)


def _copy_records(store: Store, target: Store) -> None:
    ours, theirs = Leases(store).current(), Leases(target).current()
    if theirs is not None and (ours is None or theirs.number > ours.number):
        raise _taken_over(target)
    for entry in store.list("leases"):
        if _RECORD.fullmatch(entry.key):
            data = store.get(entry.key)
            try:
                target.create(entry.key, data)
            except ExistsError as error:
                if _LEASE.fullmatch(entry.key) and target.get(entry.key) != data:
                    raise _taken_over(target) from error
    with suppress(ExistsError, NotFoundError):
        target.create("run.toml", store.get("run.toml"))


def _taken_over(target: Store) -> CheckpointError:
    return CheckpointError(
        f"{target.url} holds leases that this run's store has not: the run goes on from there; "
        "stop one of the two, or copy to another place"
    )
