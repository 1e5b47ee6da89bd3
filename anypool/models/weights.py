"""Tensors on disk: one or several safetensors files, read through a memory map, and the writer of one file.

The format is 8 bytes with the length of a JSON header, the header (name -> dtype, shape, byte range), the
bytes. Reading is done here and not by the `safetensors` package because a map costs no copy and no memory
until a tensor is used, and because a file that was cut short is to be named before anything is computed from
it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from anypool.models.errors import WeightsError

Array = npt.NDArray[Any]

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

# The limit of the reference implementation; a larger number means that this is no safetensors file.
_MAX_HEADER_BYTES = 100_000_000

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class _Entry:
    file: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file


class Checkpoint(Mapping[str, Array]):
    """The tensors of a Hugging Face directory by name; each access maps the file and copies nothing."""

    def __init__(self, directory: Path, entries: Mapping[str, _Entry]) -> None:
        self.directory = directory
        self._entries = dict(entries)

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Read the headers of `model.safetensors`, or of the shards that the index names.

        Raises WeightsError for a directory without safetensors, for missing shards and for damaged files.
        """
        index = directory / _INDEX
        if index.is_file():
            return cls(directory, _read_shards(directory, index))
        single = directory / "model.safetensors"
        if single.is_file():
            return cls(directory, _read_header(single))
        others = sorted(p.name for p in directory.glob("*.bin")) + sorted(p.name for p in directory.glob("*.pth"))
        found = f"; it holds {others[0]}, which must be converted to safetensors first" if others else ""
        raise WeightsError(f"{directory} has neither model.safetensors nor {_INDEX}{found}")

    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._entry(name).dtype

    def num_bytes(self) -> int:
        """The size of all tensors as stored."""
        return sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in self._entries.values())

    def check(self, expected: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
        """Compare with the shapes that a model needs; returns the names it does not need.

        Raises WeightsError naming the tensors that are missing or have another shape (the first few of each).
        """
        missing = [name for name in expected if name not in self._entries]
        if missing:
            raise WeightsError(
                f"{self.directory} lacks {_some(missing)}; config.json asks for {len(expected)} tensors. "
                "Do the weights belong to this config.json?"
            )
        wrong = [
            f"{name} has shape {self.shape(name)}, config.json implies {tuple(shape)}"
            for name, shape in expected.items()
            if self.shape(name) != tuple(shape)
        ]
        if wrong:
            raise WeightsError(f"{self.directory}: {_some(wrong)}")
        return tuple(name for name in self._entries if name not in expected)

    def __getitem__(self, name: str) -> Array:
        entry = self._entry(name)
        if not math.prod(entry.shape):
            return np.zeros(entry.shape, entry.dtype)
        raw = np.memmap(
            entry.file,
            dtype=np.uint8,
            mode="r",
            offset=entry.offset,
            shape=(math.prod(entry.shape) * entry.dtype.itemsize,),
        )
        return raw.view(entry.dtype).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise WeightsError(f"{self.directory} has no tensor {name}") from None


@dataclass(frozen=True)
class Pending:
    """A tensor to be written: its values are made only when its turn comes."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    make: Callable[[], Array]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path, tensors: Sequence[Pending], progress: Callable[[int, int], None] | None = None
) -> None:
    """Write one safetensors file, holding one tensor in memory at a time, and flush it to the disk.

    progress(done_bytes, total_bytes) is called after each tensor.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    total = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [total, total + tensor.num_bytes],
        }
        total += tensor.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of 8
    done = 0
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            values = np.asarray(tensor.make(), order="C")
            assert values.dtype == tensor.dtype and values.shape == tensor.shape, tensor.name
            file.write(values.reshape(-1).view(np.uint8).data)
            done += tensor.num_bytes
            if progress is not None:
                progress(done, total)
        file.flush()
        os.fsync(file.fileno())


def _read_shards(directory: Path, index: Path) -> dict[str, _Entry]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        items = [(str(name), str(file)) for name, file in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is no index of safetensors files: {error!r}") from error
    files = sorted({file for _, file in items})
    absent = [file for file in files if not (directory / file).is_file()]
    if absent:
        raise WeightsError(
            f"{directory} lacks {_some(absent)} of {len(files)} weight files named in {_INDEX}; fetch the model again"
        )
    shards = {file: _read_header(directory / file) for file in files}
    entries = {}
    for name, file in items:
        if name not in shards[file]:
            raise WeightsError(f"{directory / file} has no tensor {name}, which {_INDEX} places there")
        entries[name] = shards[file][name]
    return entries


def _read_header(path: Path) -> dict[str, _Entry]:
    size = path.stat().st_size
    damaged = f"{path} is cut short or damaged"
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start.startswith(b"version "):
            raise WeightsError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its repository")
        if len(start) < 8 or length > _MAX_HEADER_BYTES or 8 + length > size:
            raise WeightsError(f"{damaged}: {size} bytes are too few for its header; fetch it again")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            described = {name: _describe(item) for name, item in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{damaged}: its header is no description of tensors ({error})") from error
    entries = {}
    needed = 8 + length
    for name, (dtype_name, shape, begin, end) in described.items():
        dtype = _DTYPES.get(dtype_name)
        if dtype is None:
            raise WeightsError(f"{path}: {name} is of type {dtype_name}; supported: {', '.join(_DTYPES)}")
        if begin < 0 or any(n < 0 for n in shape) or end - begin != math.prod(shape) * dtype.itemsize:
            raise WeightsError(f"{damaged}: {name} of shape {shape} and type {dtype_name} has {end - begin} bytes")
        needed = max(needed, 8 + length + end)
        entries[name] = _Entry(path, dtype, shape, 8 + length + begin)
    if needed > size:
        raise WeightsError(f"{damaged}: it has {size} of {needed} bytes; fetch it again")
    return entries


def _describe(item: Mapping[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    begin, end = item["data_offsets"]
    return str(item["dtype"]), tuple(int(size) for size in item["shape"]), int(begin), int(end)


def _some(items: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
