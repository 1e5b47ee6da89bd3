"""The least time a step can take on a chip, and what bounds it: arithmetic, memory or network.

It assumes that all three overlap and that each reaches its peak, which none does; it orders choices and finds mistakes
of a factor. Peaks come from the chip's file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anypool.check.question import Question
from anypool.chips import Chip

_KIND = {"bfloat16": "bf16", "float32": "f32"}


@dataclass(frozen=True)
class Bound:
    """Seconds each part takes at its peak; None where a number of the chip is missing."""

    compute: float | None
    memory: float | None
    network: float | None

    @property
    def seconds(self) -> float | None:
        """The longest part; None if arithmetic or memory is not known."""
        if self.compute is None or self.memory is None:
            return None
        return max(self.compute, self.memory, self.network or 0.0)

    @property
    def by(self) -> str | None:
        """Which part is the longest."""
        if self.seconds is None:
            return None
        parts = {"compute": self.compute, "memory": self.memory, "network": self.network or 0.0}
        return max(parts, key=lambda name: parts[name] or 0.0)


def bound(question: Question, flops: int, hbm_bytes: int | None, collectives: Sequence[dict[str, Any]]) -> Bound:
    """The bound of one step.

    Args:
        flops: of one program over all its devices. hbm_bytes: moved by one device.
        collectives: as `check.hlo.Collective`, with `tier`.
    """
    chip = question.chips.chip
    per_chip = int(chip.devices_per_chip.value) if chip.devices_per_chip else 1
    copies = question.mesh.get("data", 1) if question.job != "train" else 1
    peak = chip.peak_flops.get(_KIND.get(question.dtype, question.dtype))
    compute = flops * copies / (question.devices * peak.value / per_chip) if peak else None
    bandwidth = chip.hbm_bytes_per_second
    memory = hbm_bytes / (bandwidth.value / per_chip) if bandwidth and hbm_bytes is not None else None
    return Bound(compute, memory, _network(chip, per_chip, collectives))


def tier(chip: Chip, groups: Sequence[Sequence[int]]) -> str:
    """Which network a collective crosses: "scale-up" if all its groups lie within one domain, else "scale-out"."""
    if chip.scale_up_chips is None:
        return "unknown"
    per_chip = int(chip.devices_per_chip.value) if chip.devices_per_chip else 1
    domain = int(chip.scale_up_chips.value) * per_chip
    within = all(len({device // domain for device in group}) == 1 for group in groups)
    return "scale-up" if within else "scale-out"


def _network(chip: Chip, per_chip: int, collectives: Sequence[dict[str, Any]]) -> float | None:
    rates = {
        "scale-up": chip.scale_up_bytes_per_second_one_way,
        "scale-out": chip.scale_out_bytes_per_second_one_way,
    }
    seconds = 0.0
    for collective in collectives:
        rate = rates.get(collective["tier"])
        if rate is None:
            return None
        seconds += collective["bytes"] / (rate.value / per_chip)
    return seconds
