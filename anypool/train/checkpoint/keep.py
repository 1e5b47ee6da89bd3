"""Which checkpoints stay, and how the others go.

A folder is deleted manifest first, so that one that is half gone does not count as a checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from anypool.store import Store
from anypool.train.checkpoint import names
from anypool.train.checkpoint.chain import Folders
from anypool.train.checkpoint.errors import CheckpointError
from anypool.train.checkpoint.names import Place

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Policy:
    """How checkpoints are written, and which stay.

    keep_last: so many of the newest; None keeps all. keep_every: those whose step it divides stay for good; None: none.
    dtype: of the weights. With bfloat16 the f32 master weights are kept beside the optimizer's moments.
    max_shard_bytes: of a file with tensors; one tensor alone may be larger.
    """

    keep_last: int | None = 3
    keep_every: int | None = None
    dtype: str = "float32"
    max_shard_bytes: int = 4 * 1024**3

    def __post_init__(self) -> None:
        for name in ("keep_last", "keep_every", "max_shard_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CheckpointError(f"{name} is {value}; a whole number of at least 1 is expected")
        if self.dtype not in DTYPES:
            raise CheckpointError(f"dtype of checkpoints is {self.dtype!r}; there are {', '.join(DTYPES)}")

    def kept(self, chain: Sequence[Place]) -> set[Place]:
        """Of a chain, newest first, what stays. The newest always does."""
        if self.keep_last is None:
            return set(chain)
        every = self.keep_every
        return {place for i, place in enumerate(chain) if i < self.keep_last or (every and place.step % every == 0)}


def superfluous(
    policy: Policy, folders: Folders, chain: Sequence[Place], own: Place, used: Collection[Place]
) -> list[Place]:
    """What the holder of a run may delete, just after it committed `own`; oldest first.

    Of the chain what the policy does not keep; of dead epochs what was begun and not committed, or committed too late;
    of its own what was begun before `own`. used: stays in any case.
    """
    kept = policy.kept(chain) | set(used) | {own}
    dead = {place for place in folders.committed | folders.begun if place.epoch < own.epoch}
    earlier = {place for place in folders.begun | set(chain) if place.epoch == own.epoch and place.step < own.step}
    return sorted((dead | earlier) - kept)


def delete_folder(store: Store, place: Place) -> None:
    """Delete a checkpoint, its manifest first."""
    below = store.at(place.folder)
    below.delete(names.MANIFEST)
    below.delete(*(entry.key for entry in below.list()))
