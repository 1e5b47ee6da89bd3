"""A state from a checkpoint, on any number of devices and hosts.

Every host reads what its devices need. Arrays of one stack and arrays layer by layer come from the same files, because
files know layers only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal

import jax
import numpy as np
import numpy.typing as npt
from blake3 import blake3

from anypool.models.params import Spec
from anypool.train.checkpoint import names
from anypool.train.checkpoint.contents import Contents, Progress, Slice, check_hash
from anypool.train.checkpoint.errors import ArchitectureError, CheckpointError, MissingTensorError
from anypool.train.checkpoint.names import Region
from anypool.train.checkpoint.plan import MASTER, WEIGHTS, region_of
from anypool.train.checkpoint.ranges import Block, Blocks, needed, read, windows
from anypool.train.checkpoint.shards import Stored

Array = npt.NDArray[Any]
Verify = Literal["full", "read"]
VERIFY: tuple[Verify, ...] = ("full", "read")

FILES_AT_ONCE = 4
REQUESTS_AT_ONCE = 16


@dataclass(frozen=True)
class Wanted:
    """One array of the state that is to be made. abstract: with shape, dtype and sharding."""

    section: str
    spec: Spec
    abstract: Any

    def tensors(self) -> list[tuple[int | None, Spec]]:
        """Its layers, or itself."""
        return list(enumerate(self.spec.members)) or [(None, self.spec)]


def read_arrays(
    contents: Contents, wanted: Sequence[Wanted], verify: Verify = "full", progress: Progress | None = None
) -> list[Any]:
    """The arrays, in the order of `wanted`, with their shardings. The host needs the memory of its part of all of them.

    verify: "full" reads every file that holds anything needed from its first byte to its last and compares its hash
    with the manifest's, so that what comes out is what was written. "read" reads only the bytes needed and compares the
    files' sizes; a flipped bit goes unseen.

    Raises MissingTensorError, ArchitectureError for a shape that differs, CorruptObjectError, CheckpointError.
    """
    if verify not in VERIFY:
        raise CheckpointError(f"verify is {verify!r}; there are {', '.join(VERIFY)}")
    homes = [_Home(one, contents) for one in wanted]
    try:
        files = contents.files_of(name for home in homes for name in home.names.values())
        headers = contents.headers(files)
        blocks: dict[str, Blocks] = {file: Blocks() for file in files}
        for home in homes:
            home.plan(contents, headers, blocks)
    except CheckpointError:
        if verify == "full":  # a flipped bit in a header looks like all sorts of things
            read_files(contents, {file: [] for file in contents.files_of(contents.by_tensor)}, verify, None)
        raise
    read_files(contents, {file: blocks[file].sorted() for file in files}, verify, progress)
    made = []
    for home in homes:
        made.append(home.array())
        home.held.clear()
    return made


def read_files(contents: Contents, blocks: dict[str, list[Block]], verify: Verify, progress: Progress | None) -> None:
    """Fill the blocks of every file, and compare hashes."""
    ranges = {}
    for file, wanted in blocks.items():
        size = contents.manifest.objects[file].size
        ranges[file] = windows(0, size) if verify == "full" else needed(wanted)
    total = sum(length for windows in ranges.values() for _, length in windows)
    done, lock = 0, Lock()

    def count(length: int) -> None:
        nonlocal done
        with lock:
            done += length
            if progress is not None:
                progress(done, total)

    def one(file: str, requests: Executor) -> None:
        hasher = blake3(max_threads=blake3.AUTO) if verify == "full" else None
        waiting = blocks[file]
        first = 0
        for start, data in read(contents.store, file, ranges[file], requests):
            if hasher is not None:
                hasher.update(data)
            while first < len(waiting) and waiting[first].stop <= start:
                first += 1
            for block in waiting[first:]:
                if block.start >= start + len(data):
                    break
                block.put(start, memoryview(data))
            count(len(data))
        if hasher is not None:
            check_hash(contents.store, file, contents.manifest.objects[file].blake3, hasher.hexdigest())

    # The requests have threads of their own: those that wait for them must not take their place.
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as requests, ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        for future in [pool.submit(one, file, requests) for file in blocks]:
            future.result()


class _Home:
    """Where the values of one wanted array are put together: one host array for each distinct part."""

    def __init__(self, wanted: Wanted, contents: Contents) -> None:
        self.wanted = wanted
        self.names = {member: _stored_name(wanted, spec, contents) for member, spec in wanted.tensors()}
        abstract = wanted.abstract
        indices = abstract.sharding.addressable_devices_indices_map(tuple(abstract.shape))
        self.regions: set[Region] = {region_of(index, abstract.shape) for index in indices.values()}
        self.held: dict[Region, Array] = {}

    def plan(self, contents: Contents, headers: dict[str, dict[str, Stored]], blocks: dict[str, Blocks]) -> None:
        """Say to every file's blocks what this array takes from it."""
        abstract = self.wanted.abstract
        slices = {}
        for member, spec in self.wanted.tensors():
            slices[member] = contents.slices(self.names[member], headers)
            _check_shape(self.names[member], spec, slices[member], contents)
        for region in self.regions:
            held = self.held[region] = np.empty([stop - start for start, stop in region], np.dtype(abstract.dtype))
            if not self.wanted.spec.members:
                _take(self.names[None], region, held, slices[None], blocks, contents)
                continue
            (first, last), rest = region[0], region[1:]
            for layer in range(first, last):
                _take(self.names[layer], rest, held[layer - first], slices[layer], blocks, contents)

    def array(self) -> Any:
        abstract = self.wanted.abstract
        shape = tuple(abstract.shape)
        return jax.make_array_from_callback(
            shape, abstract.sharding, lambda index: self.held[region_of(index, shape)], dtype=abstract.dtype
        )


def _stored_name(wanted: Wanted, spec: Spec, contents: Contents) -> str:
    """What files call a tensor. Raises MissingTensorError."""
    name = f"{MASTER if wanted.section == WEIGHTS else wanted.section}.{spec.name}"
    if name not in contents.by_tensor and wanted.section == WEIGHTS:
        name = spec.name  # there are master weights only where the weights themselves have less precision
    if name not in contents.by_tensor:
        hint = (
            "is it a checkpoint of another model?"
            if wanted.section == WEIGHTS
            else "it was written with another optimizer; set the optimizer it had, or start from its weights alone"
        )
        raise MissingTensorError(f"{contents.store.url} has no tensor {name}; {hint}")
    return name


def _check_shape(name: str, spec: Spec, slices: Sequence[Slice], contents: Contents) -> None:
    """Whether what is stored is a tensor of this shape, or slices of one."""
    shape = spec.shape
    for one in slices:
        inside = len(one.region) == len(shape) and all(b <= n for (_, b), n in zip(one.region, shape, strict=True))
        own = tuple(stop - start for start, stop in one.region)
        alone = len(slices) > 1 or one.region == names.whole(shape)
        if not (inside and alone and own == one.stored.shape):
            found = [stop for _, stop in one.region]
            raise ArchitectureError(
                f"{contents.store.url}: {name} has shape {found}, and this model's is {list(shape)}; "
                "use the config.json that is in the checkpoint"
            )


def _take(
    name: str, region: Region, held: Array, slices: Sequence[Slice], blocks: dict[str, Blocks], contents: Contents
) -> None:
    """`held` takes the part `region` of a tensor from all slices that have some of it."""
    missing = math.prod(stop - start for start, stop in region)
    for one in slices:
        both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(region, one.region, strict=True))
        if any(start >= stop for start, stop in both):
            continue
        box = tuple((a - c, b - c) for (a, b), (c, _) in zip(both, one.region, strict=True))
        target = held[tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(both, region, strict=True))]
        blocks[one.stored.file].add(one.stored, box, target)
        missing -= target.size
    if missing:
        raise MissingTensorError(
            f"{contents.store.url}: the slices of {name} lack {missing} of the values of {_written(region)}; "
            "use another checkpoint"
        )


def _written(region: Region) -> str:
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in region) + "]"
