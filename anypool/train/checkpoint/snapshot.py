"""The copy of a state on the host, which is all of a save that a training step waits for.

The step gives its state's memory away, so whatever is to be written is copied before the next one starts. Each host
copies what it will write and no more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from threading import Lock
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import NamedSharding, PartitionSpec

from anypool.train.checkpoint.errors import CheckpointError
from anypool.train.checkpoint.plan import Entry, File, Leaf, Plan, region_of

Array = npt.NDArray[Any]
Key = tuple[int, int | None, Any]
"""A piece of the state: leaf, layer in it, region of the tensor. For a gathered one, None instead of the region."""

CHUNK_BYTES = 8 * 1024 * 1024


@dataclass
class Snapshot:
    """What a host holds of a state until it is written. Pieces are forgotten once all files that need them are done."""

    files: tuple[File, ...]
    pieces: dict[Key, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._uses = Counter(key for file in self.files for entry in file.entries for key in keys_of(entry))
        self._lock = Lock()

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(file.size for file in self.files)

    def chunks(self, file: File) -> Iterator[memoryview]:
        """The bytes of a file. May be asked for again until `done(file)`."""
        yield memoryview(file.header)
        for entry in file.entries:
            # Bytes of a read-only view are sent without another copy of them.
            flat = self.value(entry).reshape(-1).view(np.uint8).data.toreadonly()
            for start in range(0, len(flat), CHUNK_BYTES):
                yield flat[start : start + CHUNK_BYTES]

    def value(self, entry: Entry) -> Array:
        """The entry's values in its own type, row by row in memory."""
        pieces = [self.pieces[key] for key in keys_of(entry)]
        if len(pieces) == 1:
            return np.ascontiguousarray(pieces[0], entry.dtype)
        put_together = np.empty(entry.shape, entry.dtype)
        for part, piece in zip(entry.parts, pieces, strict=True):
            put_together[tuple(slice(*axis) for axis in part)] = piece
        return put_together

    def done(self, file: File) -> None:
        """Forget what no other file needs."""
        with self._lock:
            for entry in file.entries:
                for key in keys_of(entry):
                    self._uses[key] -= 1
                    if not self._uses[key]:
                        del self.pieces[key]


def keys_of(entry: Entry) -> list[Key]:
    return [(entry.leaf, entry.member, part) for part in entry.parts] or [(entry.leaf, entry.member, None)]


def snapshot(leaves: Sequence[Leaf], arrays: Sequence[Any], plan: Plan, host: int) -> Snapshot:
    """Copy what `host`, this process, is to write. With several hosts, all have to call this at the same step.

    Returns when the copies are complete. Weights that no host holds whole are gathered one after the other, in their
    stored type, which takes the memory of one of them on every device.

    Raises CheckpointError for arrays that cannot be gathered.
    """
    taken = Snapshot(tuple(file for file in plan.files if file.host == host))
    wanted = {key for file in taken.files for entry in file.entries for key in keys_of(entry)}
    copies = []
    for i, (leaf, array) in enumerate(zip(leaves, arrays, strict=True)):
        local = {region_of(shard.index, leaf.shape): shard.data for shard in array.addressable_shards}
        for region, data in local.items():
            copies += _copies(i, leaf, region, data, wanted)
    for _, data in copies:
        data.copy_to_host_async()
    for keys, data in copies:
        copied = _host_copy(data)
        for key, layer in keys:
            taken.pieces[key] = copied if layer is None else copied[layer]
    for file in plan.files:
        for entry in file.entries:
            if not entry.parts:
                gathered = _gather(arrays[entry.leaf], entry)
                if file.host == host:
                    taken.pieces[entry.leaf, entry.member, None] = _host_copy(gathered.addressable_data(0))
                jax.block_until_ready(gathered)  # else a fast host would ask for all of them at once
    return taken


def _copies(
    i: int, leaf: Leaf, region: Any, data: Any, wanted: set[Key]
) -> list[tuple[list[tuple[Key, int | None]], Any]]:
    """What is to be copied of one shard: ([(piece, its layer in the copy)], array on the device)."""
    if not leaf.spec.members:
        return [([((i, None, region), None)], data)] if (i, None, region) in wanted else []
    (first, last), rest = region[0], region[1:]
    layers = [layer for layer in range(first, last) if (i, layer, rest) in wanted]
    if len(layers) == last - first:
        return [([((i, layer, rest), layer - first) for layer in layers], data)]
    # Other hosts write the other layers.
    return [([((i, layer, rest), None)], data[layer - first]) for layer in layers]


def _host_copy(data: Any) -> Array:
    copied = np.asarray(data)
    if next(iter(data.devices())).platform == "cpu":
        copied = np.array(copied)  # the first is a view of memory that the next step writes to
    return copied


def _gather(array: Any, entry: Entry) -> Any:
    """The whole of one tensor, on every device."""
    if not isinstance(array.sharding, NamedSharding):
        raise CheckpointError(
            f"{entry.name} is divided over hosts by a {type(array.sharding).__name__}, which cannot be gathered; "
            "place the state on a mesh"
        )
    layer = None if entry.member is None else np.int32(entry.member)
    return _gathering(array.sharding.mesh, entry.dtype)(array, layer)


@cache
def _gathering(mesh: Any, dtype: Any) -> Any:
    def whole(array: Any, layer: Any) -> Any:
        if layer is not None:
            array = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)
        return array.astype(dtype)

    return jax.jit(whole, out_shardings=NamedSharding(mesh, PartitionSpec()))
