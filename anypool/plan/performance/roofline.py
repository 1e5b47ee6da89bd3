"""A training step as groups of operations, each with the least time that a chip's rates allow.

The sum of the groups, each times its weight, divided by a calibrated efficiency is the predicted time. Weights are
fixed, few, and the same for every chip, model and software:

- attention 1.7: fused attention kernels reach about 60% of the rate of large products (the backward pass recomputes
  scores and spends its time between matrix and vector units);
- sharded parameters 0.7 and exchange of experts 0.8: what is left of communication when compilers overlap it.

They were chosen once on all calibration rows and rounded, and are not fitted again when rows are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from anypool.chips import Chip, Fact
from anypool.plan.performance.errors import PerformanceError
from anypool.plan.performance.job import TrainJob
from anypool.plan.performance.shape import ModelShape

WEIGHTS = {
    "products": 1.0,
    "head": 1.0,
    "attention": 1.7,
    "activations": 1.0,
    "optimizer": 1.0,
    "sharded_parameters": 0.7,
    "experts_exchange": 0.8,
}
# What is read and written of the residual stream for one token in one layer, forward and back, in elements per unit of
# width: norms, rotations, gates, residual sums and their gradients. For each routed expert another 12: gather, scatter.
STREAM_PASSES = 60
EXPERT_PASSES = 12
ELEMENT_BYTES = 2
# f32 parameters and two moments read and written, the gradient read, the bf16 copy written.
OPTIMIZER_BYTES = 30
# f32 parameters and moments, bf16 copy and gradient.
STATE_BYTES = 16
# Part of the memory that a trainer fills.
FILLED = 0.9
# Rows and columns of a matrix unit; sizes are padded to it. v6e and TPU7x have 256 x 256, others 128 or tile so.
MATRIX_UNIT = {"v6e": 256, "tpu7x": 256}
DEFAULT_MATRIX_UNIT = 128
# Heads narrower than this leave part of a matrix unit idle.
FULL_HEAD = 128


@dataclass(frozen=True)
class StepTimes:
    """Least seconds of one step on one chip, by group of operations, not weighted. recomputed: share of the layers."""

    groups: dict[str, float]
    recomputed: float

    @property
    def weighted_seconds(self) -> float:
        """The sum that calibration divides by an efficiency."""
        return sum(WEIGHTS[name] * seconds for name, seconds in self.groups.items())

    @property
    def bound_seconds(self) -> float:
        """No step is faster: computing, moving and exchanging perfectly overlapped."""
        g = self.groups
        memory = g["activations"] + g["optimizer"]
        return max(g["products"] + g["head"] + g["attention"], memory, g["sharded_parameters"] + g["experts_exchange"])

    @property
    def largest(self) -> str:
        """The group that takes longest, weighted."""
        return max(self.groups, key=lambda name: WEIGHTS[name] * self.groups[name])


def step_times(job: TrainJob) -> StepTimes:
    """The groups of one training step. Raises PerformanceError where a rate of the chip is not known."""
    shape, chip, tokens = job.shape, job.chip, job.tokens_per_chip
    memory = needed(chip, chip.hbm_bytes_per_second, "memory.bandwidth")
    low, bf16 = job.peak_flops(job.dtype), job.peak_flops("bf16")
    again = recomputed_share(job)
    # A recomputed layer runs forward once more: a third of forward and back.
    work = 1 + again / 3
    stream = shape.layers * STREAM_PASSES + shape.expert_layers * shape.experts_per_token * EXPERT_PASSES
    attention = 3 * shape.attention_flops(shape.keys_seen(job.sequence_length))
    groups = {
        "products": tokens * 6 * shape.product_parameters * padding(shape, chip) * work / low,
        "head": tokens * 6 * shape.head_parameters / bf16,
        "attention": tokens * attention * max(1.0, FULL_HEAD / shape.head_dim) * work / bf16,
        "activations": tokens * stream * shape.width * ELEMENT_BYTES / memory,
        "optimizer": OPTIMIZER_BYTES * shape.total_parameters / job.chips / memory,
        "sharded_parameters": _sharded_parameters(job),
        "experts_exchange": _experts_exchange(job),
    }
    return StepTimes(groups, again)


def recomputed_share(job: TrainJob) -> float:
    """Share of the layers that run forward twice, because what they would keep does not fit in memory.

    Kept are 4 widths and 3 feed-forward widths a token and layer, or one width where the layer is recomputed.
    """
    shape = job.shape
    room = FILLED * needed(job.chip, job.chip.hbm_bytes, "memory.capacity")
    room -= STATE_BYTES * shape.total_parameters / job.chips
    tokens = min(job.tokens_per_chip, job.sequence_length * job.devices)
    wide = shape.product_parameters / shape.layers / (3 * shape.width)
    whole = shape.layers * ELEMENT_BYTES * (4 * shape.width + 3 * wide) * tokens
    least = shape.layers * ELEMENT_BYTES * shape.width * tokens
    return min(1.0, max(0.0, (whole - max(room, 0.0)) / (whole - least)))


def padding(shape: ModelShape, chip: Chip) -> float:
    """By how much products grow when widths are padded to the matrix unit."""
    unit = MATRIX_UNIT.get(chip.name, DEFAULT_MATRIX_UNIT)
    inner = shape.expert_width or shape.feed_forward or unit
    return _padded(shape.width, unit) * _padded(inner, unit)


def _padded(size: int, unit: int) -> float:
    return -(-size // unit) * unit / size


def _sharded_parameters(job: TrainJob) -> float:
    """Gathered forward and back and reduced, 2 bytes each; routed experts stay where they are."""
    shape = job.shape
    held = shape.shared_parameters + shape.head_parameters * (1 if shape.tied else 2)
    if job.chips == 1:
        return 0.0
    size = 3 * ELEMENT_BYTES * held
    up, domain = scale_up(job.chip)
    if job.chips <= domain:
        return size / up
    # Each chip of a domain fetches its part from beyond, and hands it round.
    return max(size / up, size / (scale_out(job.chip) * domain))


def _experts_exchange(job: TrainJob) -> float:
    """To the experts and back, forward and again backward.

    Experts are spread over as many chips as their state needs, with as much again for everything else; what of that
    lies beyond the fast network goes through the slow one.
    """
    shape = job.shape
    if not shape.is_mixture or job.chips == 1:
        return 0.0
    room = needed(job.chip, job.chip.hbm_bytes, "memory.capacity")
    spread = min(job.chips, 1.5 * STATE_BYTES * shape.total_parameters / room)
    up, domain = scale_up(job.chip)
    beyond = max(0.0, 1 - domain / spread) if spread > 0 else 0.0
    size = job.tokens_per_chip * shape.expert_layers * shape.experts_per_token * shape.width * ELEMENT_BYTES * 4
    return size * ((1 - beyond) / up + (beyond / scale_out(job.chip) if beyond else 0.0))


def scale_up(chip: Chip) -> tuple[float, float]:
    """Bytes a second one way out of one chip to others of its domain, and chips of a domain."""
    rate = needed(chip, chip.scale_up_bytes_per_second_one_way, "scale_up.bandwidth")
    return rate, needed(chip, chip.scale_up_chips, "scale_up.chips")


def scale_out(chip: Chip) -> float:
    """Bytes a second one way beyond the domain, a chip's share.

    AMD's chips publish none, since it depends on the server's network cards; a tenth of the fast network is taken then,
    which is about what the servers of NVIDIA's chips have.
    """
    if chip.scale_out_bytes_per_second_one_way is not None:
        return chip.scale_out_bytes_per_second_one_way.value
    return scale_up(chip)[0] / 10


def needed(chip: Chip, fact: Fact | None, field: str) -> float:
    """A number that a prediction cannot do without. Raises PerformanceError."""
    if fact is None:
        raise PerformanceError(f"chip = {chip.name!r}: its {field} is not known, so its speed cannot be predicted")
    return fact.value
