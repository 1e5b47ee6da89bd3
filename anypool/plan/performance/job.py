"""One training job to be predicted: plain data, and how chips are counted."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from anypool.chips import Chip, UnknownChipError, load_chip
from anypool.plan.performance.errors import PerformanceError
from anypool.plan.performance.shape import ModelShape

DTYPES = ("bf16", "fp8", "int8", "fp4", "mxfp8", "mxfp4")
# Other words for them, and which rate holds for one that a chip has none listed for: blocks with scales of their own
# run at the rate of the plain format.
DTYPE_ALIASES = {"bfloat16": "bf16", "nvfp4": "fp4", "fp8-mx": "mxfp8", "fp8_mx": "mxfp8"}
SAME_RATE = {"mxfp8": "fp8", "mxfp4": "fp4", "fp8": "mxfp8", "fp4": "mxfp4"}
STACKS = ("maxtext", "megatron-bridge", "torchtitan", "neuronx", "meta", "anypool")
"""Software that rows were measured with, as this room names it. Another name is accepted, and nothing known of it."""
MOST_CHIPS = 1_000_000
# One sequence of this length on every device: what a row without a batch is taken to have.
ASSUMED_TOKENS_PER_DEVICE = 8192


@dataclass(frozen=True)
class TrainJob:
    """A model, chips and how it is trained.

    chips: physical chips. dtype: of the layers' products; attention and the output projection run in bf16.
    global_batch: sequences of one step, None if not said. stack: the software.
    """

    shape: ModelShape
    chip: Chip
    chips: int
    dtype: str
    sequence_length: int
    stack: str
    global_batch: int | None = None

    def __post_init__(self) -> None:
        """Raises PerformanceError."""
        if not 1 <= self.chips <= MOST_CHIPS:
            raise PerformanceError(f"chips = {self.chips}: must be 1 to {MOST_CHIPS:,}")
        if not 1 <= self.sequence_length <= 16 * 2**20:
            raise PerformanceError(f"seq = {self.sequence_length}: must be 1 to {16 * 2**20:,} tokens")
        if self.global_batch is not None and not 1 <= self.global_batch <= 10**7:
            raise PerformanceError(f"global_batch = {self.global_batch}: must be 1 to 10,000,000 sequences")
        self.peak_flops(self.dtype)

    def peak_flops(self, dtype: str) -> float:
        """Dense operations a second of one chip. Raises PerformanceError where the chip has none or none is known."""
        fact = self.chip.peak_flops.get(dtype) or self.chip.peak_flops.get(SAME_RATE.get(dtype, dtype))
        if fact is not None:
            return fact.value
        known = ", ".join(self.chip.peak_flops) or "none"
        if dtype in self.chip.lacks_dtypes:
            raise PerformanceError(f"dtype = {dtype!r}: a {self.chip.name} has no such products; it has {known}")
        raise PerformanceError(f"dtype = {dtype!r}: no rate of a {self.chip.name} is known for it; known: {known}")

    @property
    def devices(self) -> int:
        """Devices of one chip; one where it is not known."""
        return int(self.chip.devices_per_chip.value) if self.chip.devices_per_chip else 1

    @property
    def tokens_per_chip(self) -> float:
        """Tokens that one chip computes in one step; assumed where no batch is given."""
        if self.global_batch is None:
            return float(ASSUMED_TOKENS_PER_DEVICE * self.devices)
        return self.global_batch * self.sequence_length / self.chips

    @property
    def precision(self) -> str:
        """ "bf16" or "low"."""
        return "bf16" if self.dtype == "bf16" else "low"


def read_chips(chip: str, chips: str) -> tuple[Chip, int]:
    """A chip and how many, from two texts: ("h100", "64"), ("v5p", "4x4x4"), ("v5p-128", ""), ("v5p", "v5p-128").

    Google's v4-N and v5p-N count TensorCores, two a chip. Raises PerformanceError or UnknownChipError.
    """
    found, named = _named(chip)
    text = chips.strip().lower()
    if not text:
        if named is None:
            raise PerformanceError("chips = '': say how many, such as 64, or name them as the vendor does, v5p-128")
        return found, named
    if re.fullmatch(r"\d{1,9}(x\d{1,9})*", text):
        count = math.prod(int(axis) for axis in text.split("x"))
    else:
        other, number = _named_count(chips)
        if other.name != found.name:
            raise PerformanceError(f"chips = {chips!r}: names a {other.name}, and chip is {found.name}: correct one")
        count = number
    if named is not None and named != count:
        raise PerformanceError(f"chips = {chips!r}: {chip} is {named} chips: correct one, or leave chips empty")
    if not 1 <= count <= MOST_CHIPS:
        raise PerformanceError(f"chips = {chips!r}: must be 1 to {MOST_CHIPS:,}")
    return found, count


def _named(chip: str) -> tuple[Chip, int | None]:
    try:
        return load_chip(chip), None
    except UnknownChipError:
        match = re.fullmatch(r"(.+?)[-:](\d{1,9}(?:x\d{1,9})*)", chip.strip().lower())
        if not match:
            raise
        try:
            load_chip(match[1])
        except UnknownChipError:
            raise load_error(chip) from None
        return _named_count(chip)


def load_error(chip: str) -> UnknownChipError:
    """The error for a name that is no chip's."""
    try:
        load_chip(chip)
    except UnknownChipError as error:
        return error
    raise AssertionError(f"{chip} is a chip")


def _named_count(text: str) -> tuple[Chip, int]:
    match = re.fullmatch(r"(.+?)([-:])(\d{1,9}(?:x\d{1,9})*)", text.strip().lower())
    if not match:
        raise PerformanceError(f"chips = {text!r}: must be a number such as 64, a shape such as 4x4x4, or v5p-128")
    chip = load_chip(match[1])
    count = math.prod(int(axis) for axis in match[3].split("x"))
    if match[2] == "-" and chip.topology.name_counts == "cores":
        if count % 2:
            raise PerformanceError(f"chips = {text!r}: {chip.name}-N counts TensorCores, two a chip: N must be even")
        count //= 2
    if not 1 <= count <= MOST_CHIPS:
        raise PerformanceError(f"chips = {text!r}: must be 1 to {MOST_CHIPS:,}")
    return chip, count
