"""A target: a chip and a topology to compile for, written `v5e:2x4`, `v5p:8x8x8`, `h100:8`, `trn2:16`, `cpu:4`.

A topology counts chips, never cores or devices: `tpu7x:4x4x4` is 64 chips and 128 JAX devices, and what Google calls
`v5p-128` is `v5p:4x4x4`, 64 chips.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from anypool.chips.chip import Chip, chip_names, load_chip
from anypool.chips.errors import TargetError, UnknownChipError, nearest
from anypool.chips.topology import Shape, write

_EXAMPLES = "such as v5e:2x4, h100:8, trn2:16 or cpu:4"


@dataclass(frozen=True)
class Target:
    """A chip and how many of it, in which arrangement. `str()` gives it back as text."""

    chip: Chip
    topology: Shape

    @classmethod
    def parse(cls, text: str) -> Target:
        """The target that `text` names. Raises TargetError: what is wrong, and what exists."""
        name, colon, topology = text.strip().lower().partition(":")
        try:
            chip = load_chip(name)
        except UnknownChipError:
            raise TargetError(_unknown(text, name, topology)) from None
        if not colon or not topology:
            raise TargetError(f"target {text!r} names no topology: write {chip.name}:{chip.topology.example}")
        try:
            return cls(chip, chip.topology.parse(topology))
        except TargetError as error:
            raise TargetError(f"target {text!r}: {error}") from None

    @property
    def chips(self) -> int:
        """How many chips."""
        return math.prod(self.topology)

    @property
    def devices(self) -> int | None:
        """How many JAX devices, None where it is not known how many a chip has."""
        per_chip = self.chip.devices_per_chip
        return None if per_chip is None else self.chips * int(per_chip.value)

    @property
    def hosts(self) -> int | None:
        """How many hosts hold these chips, None where it is not known how many a host has."""
        per_host = self.chip.chips_per_host
        return None if per_host is None else -(-self.chips // int(per_host.value))

    def __str__(self) -> str:
        return f"{self.chip.name}:{write(self.topology)}"


def parse_targets(text: str) -> tuple[Target, ...]:
    """Targets with commas between them. Raises TargetError for the first that is wrong, or if one stands twice."""
    targets: list[Target] = []
    for part in text.split(","):
        if not part.strip():
            raise TargetError(f"targets {text!r}: there is nothing between two commas: name targets {_EXAMPLES}")
        target = Target.parse(part)
        if target in targets:
            raise TargetError(f"targets {text!r}: {target} stands twice: name each once")
        targets.append(target)
    return tuple(targets)


def _unknown(text: str, name: str, topology: str) -> str:
    """What to say of a name that is no chip: it may be one of the vendor's names for a slice."""
    if vendor_name := re.fullmatch(r"(.+?)-([1-9][0-9]*)", name):
        try:
            chip = load_chip(vendor_name[1])
        except UnknownChipError:
            chip = None
        if chip is not None and chip.topology.name_counts:
            return _vendor_name(text, chip, int(vendor_name[2]))
    hint = nearest(name, chip_names())
    if hint and topology:
        found = load_chip(hint.split("'")[1])
        if found.topology.exists(tuple(int(axis) for axis in re.findall(r"[1-9][0-9]{0,6}", topology))):
            hint = f"; did you mean '{found.name}:{topology}'?"
    hint = hint or f": write targets {_EXAMPLES}; `anypool chips` lists them"
    return f"target {text!r}: there is no chip {name!r}{hint}"


def _vendor_name(text: str, chip: Chip, number: int) -> str:
    cores = chip.topology.name_counts == "cores"
    count = number // 2 if cores else number
    what = f"counts TensorCores: it is {count} chips" if cores else f"is {count} chips"
    shape = chip.topology.near(count)
    assert shape is not None, f"{chip.name} has no topology"
    return f"target {text!r} is Google's name and {what}: write {chip.name}:{write(shape)}"
