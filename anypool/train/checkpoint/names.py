"""How things are called: the folder of a checkpoint, its files, and the tensors in them.

    checkpoints/step-00001200-e3/
        config.json, generation_config.json, tokenizer files      as they came with the model
        model-00001-of-00002.safetensors …                        weights, in Hugging Face's names
        model.safetensors.index.json                              which file has which
        optimizer-00001-of-00004.safetensors …                    moments, and master weights if the weights are bf16
        optimizer.safetensors.index.json
        run.json                                                  step, epoch, and what the trainer knows
        manifest.json                                             every object with size and hash, written last

A tensor of the optimizer is called `mu.NAME`, `nu.NAME` or `master.NAME`, NAME being the weight's. Where no host holds
all of it, it is stored in slices, `mu.NAME#0:16,32:64`: from start to stop along each axis.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from anypool.train.checkpoint.errors import CheckpointError

CHECKPOINTS = "checkpoints/"
MANIFEST = "manifest.json"
RUN = "run.json"
OPTIMIZER_INDEX = "optimizer.safetensors.index.json"
MODEL_INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"

_FOLDER = re.compile(r"(?:.*/)?step-(\d{8,})-e(\d+)/?")
_ENTRY = re.compile(r"([^#]+)(?:#(\d+:\d+(?:,\d+:\d+)*))?")

Region = tuple[tuple[int, int], ...]
"""(start, stop) along each axis."""


@dataclass(frozen=True, order=True)
class Place:
    """Where in the history of a run a checkpoint stands; sorted by epoch, then by step."""

    epoch: int
    step: int

    @property
    def folder(self) -> str:
        """Its folder, in the store of the run."""
        return f"{CHECKPOINTS}step-{self.step:08d}-e{self.epoch}"

    @classmethod
    def parse(cls, folder: str) -> Place | None:
        """Of a folder, with or without what stands before its name; None for names of other things."""
        found = _FOLDER.fullmatch(folder)
        return cls(epoch=int(found[2]), step=int(found[1])) if found else None


def entry_name(name: str, shape: tuple[int, ...], region: Region) -> str:
    """What a tensor, or the part of it that a region is, is called in a file."""
    if region == whole(shape):
        return name
    return f"{name}#{','.join(f'{start}:{stop}' for start, stop in region)}"


def parse_entry(entry: str) -> tuple[str, Region | None]:
    """The tensor's name, and the region; None if it is whole. Raises CheckpointError."""
    found = _ENTRY.fullmatch(entry)
    if found is None:
        raise CheckpointError(
            f"{entry!r} is no name of a tensor or of a slice, NAME#start:stop,…; was the file edited?"
        )
    if found[2] is None:
        return found[1], None
    return found[1], tuple((int(a), int(b)) for a, b in (axis.split(":") for axis in found[2].split(",")))


def whole(shape: tuple[int, ...]) -> Region:
    return tuple((0, size) for size in shape)


def shard_name(stem: str, number: int, count: int) -> str:
    """`number` counts from 1."""
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def part_name(host: int) -> str:
    """What a host reports while a checkpoint is being written."""
    return f"part-{host:05d}.json"
