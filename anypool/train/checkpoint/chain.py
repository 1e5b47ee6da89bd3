"""Which checkpoints are the run's.

A trainer whose lease was taken over may write on for a while, and may even commit. So a checkpoint counts only if it is
of the chain: the current epoch's own, then the one that epoch started from, then those of that one's epoch up to it,
and so on back. What another epoch starts from is recorded once, so no commit that comes later can get in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from anypool.store import Leases, NotFoundError, Store
from anypool.train.checkpoint import names
from anypool.train.checkpoint.errors import CheckpointError
from anypool.train.checkpoint.names import Place


@dataclass(frozen=True)
class Folders:
    """The folders of checkpoints that a store holds."""

    committed: frozenset[Place]
    begun: frozenset[Place]

    @classmethod
    def of(cls, store: Store) -> Folders:
        committed: set[Place] = set()
        begun: set[Place] = set()
        for entry in store.list(names.CHECKPOINTS):
            folder, _, name = entry.key.removeprefix(names.CHECKPOINTS).partition("/")
            place = Place.parse(folder)
            if place is not None and names.CHECKPOINTS + folder == place.folder:
                (committed if name == names.MANIFEST else begun).add(place)
        return cls(frozenset(committed), frozenset(begun - committed))


def chain(committed: Iterable[Place], epoch: int, base: Callable[[int], Place | None]) -> list[Place]:
    """The committed checkpoints of epoch `epoch`'s chain, newest first.

    base: what an epoch started from, None if from nothing. Raises NotFoundError for one that did not say (yet): it has
    committed nothing, and goes on from where the epoch before it is.
    """
    known = set(committed)
    found: list[Place] = []
    limit: int | None = None
    while epoch > 0:
        own = [place for place in known if place.epoch == epoch and (limit is None or place.step <= limit)]
        found += sorted(own, reverse=True)
        try:
            started = base(epoch)
        except NotFoundError:
            if own or limit is not None:  # it did begin, so its record was lost, and what came before is unknown
                break
            epoch -= 1
            continue
        if started is None:
            break
        if started.epoch >= epoch:
            raise CheckpointError(
                f"epoch {epoch} is recorded to have started from {started.folder}, which is not of an earlier epoch; "
                "the records in leases/ were changed by hand: mend them"
            )
        epoch, limit = started.epoch, started.step
    return found


def current_epoch(leases: Leases) -> int:
    """The highest lease's number; 0 for a run that nobody took."""
    lease = leases.current()
    return 0 if lease is None else lease.number


def base_of(leases: Leases, epoch: int) -> Place | None:
    """What an epoch started from; None if from nothing. Raises NotFoundError if it did not say."""
    folder = leases.base(epoch)
    if folder is None:
        return None
    place = Place.parse(folder)
    if place is None:
        raise CheckpointError(
            f"{leases.store.url}: epoch {epoch} is recorded to have started from {folder!r}, which is no folder of a "
            "checkpoint, step-00001200-e3; the record was changed by hand: mend it"
        )
    return place
