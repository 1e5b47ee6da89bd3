"""A committed checkpoint that is being read: its small files, and where every tensor is.

Small files (indexes, run.json, config.json) are always read whole and compared with the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from blake3 import blake3

from anypool.store import CorruptObjectError, Manifest, Store
from anypool.train.checkpoint import names, shards
from anypool.train.checkpoint.errors import CheckpointError
from anypool.train.checkpoint.names import Region
from anypool.train.checkpoint.shards import Stored

FIRST_READ_BYTES = 256 * 1024  # holds the header of most files


@dataclass(frozen=True)
class Slice:
    """A tensor, or a part of it, in a file."""

    region: Region
    stored: Stored


@dataclass(frozen=True)
class Contents:
    """store: the folder of the checkpoint. by_tensor: entries and files by the tensor's name, from the indexes."""

    store: Store
    manifest: Manifest
    by_tensor: dict[str, list[tuple[str, str]]]

    @classmethod
    def open(cls, store: Store, manifest: Manifest) -> Contents:
        """Raises CorruptObjectError if an object is missing, has another size, or an index another hash."""
        _check_sizes(store, manifest)
        by_tensor: dict[str, list[tuple[str, str]]] = {}
        for index in (names.MODEL_INDEX, names.OPTIMIZER_INDEX):
            if index in manifest.objects:
                for entry, file in json.loads(small_file(store, manifest, index))["weight_map"].items():
                    by_tensor.setdefault(names.parse_entry(entry)[0], []).append((entry, file))
        contents = cls(store, manifest, by_tensor)
        if names.ADAPTER in manifest.objects:
            for entry in contents.headers([names.ADAPTER])[names.ADAPTER]:
                by_tensor[entry] = [(entry, names.ADAPTER)]
        return contents

    def files_of(self, tensors: Iterable[str]) -> list[str]:
        """The files that have them, sorted."""
        return sorted({file for name in tensors for _, file in self.by_tensor.get(name, ())})

    def headers(self, files: Sequence[str]) -> dict[str, dict[str, Stored]]:
        """What each file has. Raises CheckpointError for one that is damaged."""
        with ThreadPoolExecutor(8) as pool:
            return dict(zip(files, pool.map(self._header, files), strict=True))

    def slices(self, tensor: str, headers: dict[str, dict[str, Stored]]) -> list[Slice]:
        """All parts of a tensor. Raises CheckpointError if an index names an entry that its file has not."""
        found = []
        for entry, file in self.by_tensor.get(tensor, ()):
            if entry not in headers[file]:
                raise CheckpointError(f"{self.store.url}: {file} has no {entry}, which the index places there")
            stored = headers[file][entry]
            region = names.parse_entry(entry)[1] or names.whole(stored.shape)
            found.append(Slice(region, stored))
        return found

    def _header(self, file: str) -> dict[str, Stored]:
        size = self.manifest.objects[file].size
        start = self.store.get_range(file, 0, min(size, FIRST_READ_BYTES))
        where = f"{self.store.url}/{file}"
        length = shards.header_length(start, where, size)
        text = start[8 : 8 + length]
        if len(text) < length:
            text += self.store.get_range(file, 8 + len(text), length - len(text))
        return {name: Stored(file, item.dtype, item.shape, item.start) for name, item in
                shards.parse_header(text, where, size).items()}  # fmt: skip


def small_file(store: Store, manifest: Manifest, name: str) -> bytes:
    """An object's bytes, which are what the manifest says. Raises CorruptObjectError."""
    data = store.get(name)
    check_hash(store, name, manifest.objects[name].blake3, blake3(data).hexdigest())
    return data


def small_json(store: Store, manifest: Manifest, name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(small_file(store, manifest, name))
    return value


def check_hash(store: Store, name: str, expected: str, found: str) -> None:
    if found != expected:
        raise _corrupt(store, name, f"its BLAKE3 is {found}, and {expected} was written", expected, found)


def _check_sizes(store: Store, manifest: Manifest) -> None:
    sizes = {entry.key: entry.size for entry in store.list()}
    for name, record in manifest.objects.items():
        if name not in sizes:
            raise _corrupt(store, name, "it is missing", record.blake3, None)
        if sizes[name] != record.size:
            what = f"it has {sizes[name]} bytes, and {record.size} were written"
            raise _corrupt(store, name, what, record.blake3, None)


def _corrupt(store: Store, name: str, what: str, expected: str, found: str | None) -> CorruptObjectError:
    return CorruptObjectError(
        f"{store.url}/{name} is damaged: {what}; restore another checkpoint, or a copy of this one",
        store=store.url,
        key=name,
        expected=expected,
        found=found,
    )


Progress = Callable[[int, int], None]
"""(bytes done, bytes in all)."""
