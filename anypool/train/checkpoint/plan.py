"""Who writes what: every tensor of a state gets a file, and every file a host.

A pure function of what is declared and of how the arrays are divided, so that every host computes the same plan and
none has to ask another. A host writes what it holds. Only weights, which others read as whole tensors, are brought to
one host if none holds all of one; the optimizer's tensors are then stored in slices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np

from anypool.models.params import Spec
from anypool.train.checkpoint import names, shards
from anypool.train.checkpoint.names import Region

WEIGHTS, MASTER, MU, NU = "model", "master", "mu", "nu"


@dataclass(frozen=True)
class Leaf:
    """One array of the state: a tensor, or a stack of them.

    section: WEIGHTS, MU or NU. holders: for every distinct part of the array, the hosts that have it, sorted.
    """

    section: str
    spec: Spec
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    holders: Mapping[Region, tuple[int, ...]]

    @classmethod
    def of(cls, section: str, spec: Spec, array: Any) -> Leaf:
        """array: anything with shape, dtype and sharding."""
        found: dict[Region, set[int]] = {}
        for device, index in array.sharding.devices_indices_map(tuple(array.shape)).items():
            found.setdefault(region_of(index, array.shape), set()).add(device.process_index)
        holders = {region: tuple(sorted(hosts)) for region, hosts in found.items()}
        return cls(section, spec, tuple(array.shape), np.dtype(array.dtype), holders)

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that files know: of a stack, one for each layer."""
        if not self.spec.members:
            yield Tensor(self.spec.name, self.shape, None, self.holders)
        for i, member in enumerate(self.spec.members):
            holders = {rest: hosts for (layers, *rest_), hosts in self.holders.items() for rest in [tuple(rest_)]
                       if layers[0] <= i < layers[1]}  # fmt: skip
            yield Tensor(member.name, self.shape[1:], i, holders)


@dataclass(frozen=True)
class Tensor:
    """member: its layer in the stack that it is part of."""

    name: str
    shape: tuple[int, ...]
    member: int | None
    holders: Mapping[Region, tuple[int, ...]]

    @cached_property
    def complete(self) -> tuple[int, ...]:
        """The hosts that have every part of it."""
        return tuple(sorted(set.intersection(*(set(hosts) for hosts in self.holders.values()))))


@dataclass(frozen=True)
class Entry:
    """One tensor, or slice of one, in a file.

    leaf, member: the array of the state, by its place in the list of leaves, and the layer in it. region: which part of
    the tensor. parts: the pieces that it is put together from; none if it is gathered from all hosts.
    """

    name: str
    dtype: np.dtype[Any]
    leaf: int
    member: int | None
    region: Region
    parts: tuple[Region, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.region)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class File:
    """A safetensors file, and the host that writes it."""

    name: str
    host: int
    entries: tuple[Entry, ...]

    @cached_property
    def header(self) -> bytes:
        return shards.header((entry.name, entry.dtype, entry.shape) for entry in self.entries)

    @property
    def size(self) -> int:
        return len(self.header) + sum(entry.num_bytes for entry in self.entries)


@dataclass(frozen=True)
class Plan:
    """All files with tensors, those of the weights first. Other files are host 0's."""

    weights: tuple[File, ...]
    optimizer: tuple[File, ...]

    @property
    def files(self) -> tuple[File, ...]:
        return self.weights + self.optimizer

    def indexes(self) -> dict[str, dict[str, Any]]:
        """The files that say where a tensor is, in Hugging Face's form.

        The weights have one even if they are one file: vLLM and SGLang load what it names, and every *.safetensors
        that they find, the optimizer's too, where there is none.
        """
        found = {names.OPTIMIZER_INDEX: _index(self.optimizer)}
        if [file.name for file in self.weights] != [names.ADAPTER]:  # which has no index
            found[names.MODEL_INDEX] = _index(self.weights)
        return found


def make_plan(
    leaves: Sequence[Leaf], hosts: int, dtype: np.dtype[Any], max_shard_bytes: int, adapter: bool = False
) -> Plan:
    """The files of a state.

    dtype: of the weights; where the state's own is another, it is kept beside the moments as the master weights.
    adapter: the weights are an adapter's, which PEFT reads from one file.
    """
    loads = [0] * hosts
    weights: list[list[Entry]] = [[] for _ in range(hosts)]
    optimizer: list[list[Entry]] = [[] for _ in range(hosts)]

    def add(to: list[list[Entry]], candidates: Iterable[int], entry: Entry) -> None:
        host = min(candidates, key=lambda host: (loads[host], host))
        loads[host] += entry.num_bytes
        to[host].append(entry)

    for i, leaf in enumerate(leaves):
        for tensor in leaf.tensors():
            everything = names.whole(tensor.shape)
            if leaf.section == WEIGHTS:
                parts = tuple(tensor.holders) if tensor.complete else ()
                entry = Entry(tensor.name, dtype, i, tensor.member, everything, parts)
                # An adapter is one file, and one host writes it: if it has not all of it, it gathers.
                if adapter:
                    held = 0 in tensor.complete
                    entry = Entry(tensor.name, dtype, i, tensor.member, everything, parts if held else ())
                add(weights, [0] if adapter else tensor.complete or range(hosts), entry)
                if dtype == leaf.dtype:
                    continue
            section = MASTER if leaf.section == WEIGHTS else leaf.section
            if tensor.complete:
                name = f"{section}.{tensor.name}"
                parts = tuple(tensor.holders)
                add(optimizer, tensor.complete, Entry(name, leaf.dtype, i, tensor.member, everything, parts))
                continue
            for region, holders in sorted(tensor.holders.items()):
                name = names.entry_name(f"{section}.{tensor.name}", tensor.shape, region)
                add(optimizer, holders, Entry(name, leaf.dtype, i, tensor.member, region, (region,)))
    if adapter:
        written: tuple[File, ...] = (File(names.ADAPTER, 0, tuple(weights[0])),)
    else:
        written = _files("model", weights, max_shard_bytes)
    return Plan(written, _files("optimizer", optimizer, max_shard_bytes))


def sections(state: Any, specs: Any) -> Iterator[tuple[str, Spec, Any]]:
    """(section, spec, array) for every array of a state, parameters first.

    specs: a tree of `Spec` like that of the parameters. Where a moment's tree has None there is no array.
    """
    for section, tree in ((WEIGHTS, state.params), (MU, state.moments.mu), (NU, state.moments.nu)):
        pairs = beside(specs, _Pair, tree)
        yield from ((section, pair.spec, pair.array) for pair in jax.tree.leaves(pairs) if pair.array is not None)


def beside(specs: Any, function: Callable[[Spec, Any], Any], tree: Any) -> Any:
    """A tree like `specs`, of function(spec, what stands in its place in `tree`), which may be None."""
    return jax.tree.map(function, specs, tree, is_leaf=lambda leaf: isinstance(leaf, Spec))


@dataclass(frozen=True)
class _Pair:
    spec: Spec
    array: Any


def region_of(index: Any, shape: Sequence[int]) -> Region:
    """What JAX calls an index (a tuple of slices), with its bounds written out."""
    return tuple(axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True))


def _files(stem: str, by_host: Sequence[Sequence[Entry]], max_shard_bytes: int) -> tuple[File, ...]:
    chunks = [(host, chunk) for host, entries in enumerate(by_host) for chunk in _chunks(entries, max_shard_bytes)]
    count = len(chunks)
    return tuple(File(names.shard_name(stem, i + 1, count), host, chunk) for i, (host, chunk) in enumerate(chunks))


def _chunks(entries: Sequence[Entry], limit: int) -> Iterator[tuple[Entry, ...]]:
    """Runs of entries of at most `limit` bytes, or of one entry."""
    chunk: list[Entry] = []
    size = 0
    for entry in entries:
        if chunk and size + entry.num_bytes > limit:
            yield tuple(chunk)
            chunk, size = [], 0
        chunk.append(entry)
        size += entry.num_bytes
    if chunk:
        yield tuple(chunk)


def _index(files: Sequence[File]) -> dict[str, Any]:
    total = sum(entry.num_bytes for file in files for entry in file.entries)
    return {
        "metadata": {"total_size": total},
        "weight_map": {entry.name: file.name for file in files for entry in file.entries},
    }
