"""The bytes of a safetensors file: a header as others write it, and what a header says.

Eight bytes with the header's length, the header (JSON: name, type, shape, range of bytes), then the tensors, row by row
and little-endian. Source: the format's description in the README of huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from anypool.train.checkpoint.errors import CheckpointError

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER_BYTES = 100_000_000  # the reference implementation's limit


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. start: of its first byte, from the file's start."""

    file: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape) * self.dtype.itemsize


def header(tensors: Iterable[tuple[str, np.dtype[Any], Sequence[int]]]) -> bytes:
    """What stands before the tensors: (name, type, shape) in their order."""
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    total = 0
    for name, dtype, shape in tensors:
        size = math.prod(shape) * dtype.itemsize
        described[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [total, total + size]}
        total += size
    encoded = json.dumps(described, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of 8
    if len(encoded) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"a file of {len(described) - 1} tensors has a header of {len(encoded)} bytes, and the format allows "
            f"{MAX_HEADER_BYTES}; lower max_shard_bytes"
        )
    return len(encoded).to_bytes(8, "little") + encoded


def header_length(start: bytes, file: str, size: int) -> int:
    """Bytes of the header, from the file's first eight. Raises CheckpointError for what is no safetensors file."""
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
        raise CheckpointError(f"{file} is no safetensors file, or was cut short: {size} bytes; use another checkpoint")
    return length


def parse_header(text: bytes, file: str, size: int) -> dict[str, Stored]:
    """Every tensor of a file of `size` bytes. Raises CheckpointError if they do not fit into it."""
    described: Mapping[str, Any]
    found = {}
    try:
        described = json.loads(text)
        for name, item in described.items():
            if name == "__metadata__":
                continue
            begin, end = item["data_offsets"]
            stored = Stored(file, DTYPES[item["dtype"]], tuple(map(int, item["shape"])), 8 + len(text) + int(begin))
            if stored.start < 0 or stored.stop != 8 + len(text) + end or stored.stop > size:
                raise ValueError(f"{name} does not fit")
            found[name] = stored
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is damaged: its header makes no sense ({error}); use another checkpoint"
        ) from error
    return found
