"""Memory first: whether a training job fits its chips at all, and how it would be divided.

The figures are `anypool.check.memory.predict`'s. A dense model is asked about as it is. A mixture of experts is asked
about as the dense model that one token sees, and the state of what that model lacks is added, divided over all devices.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

from anypool.chips import Chip, load_chip
from anypool.plan.performance.errors import DoesNotFitError, PerformanceError
from anypool.plan.performance.job import TrainJob
from anypool.plan.performance.roofline import STATE_BYTES
from anypool.plan.performance.shape import ModelShape

GIB = 2**30
WIDEST_TENSOR = 8
WIDEST_SEQUENCE = 16
# What a smaller number of chips is looked for among, when a job does not fit.
MOST_CHIPS_SEARCHED = 65_536


@dataclass(frozen=True)
class Memory:
    """Of one device, in bytes. mesh: devices along each axis; rows: sequences of a step that one copy holds at once."""

    needed_bytes: int
    usable_bytes: int
    parts: dict[str, int]
    mesh: dict[str, int]
    micro_batches: int


def usable_bytes(chip: Chip) -> int:
    """Of one device. Raises PerformanceError where it is not known."""
    if chip.usable_hbm_bytes_per_device is not None:
        return int(chip.usable_hbm_bytes_per_device.value)
    if chip.hbm_bytes is None:
        raise PerformanceError(f"chip = {chip.name!r}: its memory is not known, so nothing can be said to fit")
    devices = int(chip.devices_per_chip.value) if chip.devices_per_chip else 1
    return int(chip.hbm_bytes.value / devices)


def fit(job: TrainJob) -> Memory:
    """The division that needs least memory, of those that are tried.

    Raises DoesNotFitError, with the fewest chips that would do, if none fits.
    """
    best = _best(job)
    if best.needed_bytes <= best.usable_bytes:
        return best
    fewest = fewest_chips(job, beyond=job.chips)
    how = f"; {fewest} chips would hold it" if fewest else ""
    raise DoesNotFitError(
        f"chips = {job.chips}: {job.shape.name} needs {best.needed_bytes / GIB:.1f} GiB on each device, and a device "
        f"of a {job.chip.name} has {best.usable_bytes / GIB:.1f} GiB{how}",
        fewest,
    )


def _best(job: TrainJob) -> Memory:
    usable = usable_bytes(job.chip)
    tried: list[Memory] = []
    # Where the state alone is too much, no division helps: one shows by how much.
    hopeless = STATE_BYTES * job.shape.total_parameters / (job.chips * job.devices) > usable
    for mesh, micro_batches, batch in _divisions(job)[: 1 if hopeless else None]:
        items = (tuple(mesh.items()), micro_batches, batch)
        parts = _parts(_key(job.shape), job.chip.name, job.sequence_length, *items)
        tried.append(Memory(sum(parts.values()), usable, parts, mesh, micro_batches))
        if tried[-1].needed_bytes <= usable:
            return tried[-1]
    return min(tried, key=lambda memory: memory.needed_bytes)


def _divisions(job: TrainJob) -> list[tuple[dict[str, int], int, int]]:
    """Meshes, micro-batches and batches to try, simplest first: all state divided over all devices."""
    devices = job.chips * job.devices
    found = []
    for tensor, sequence in sorted(
        ((t, s) for t in _powers(WIDEST_TENSOR) for s in _powers(WIDEST_SEQUENCE)), key=math.prod
    ):
        wide = tensor * sequence
        if devices % wide or job.sequence_length % sequence or job.shape.heads % tensor or job.shape.kv_heads % tensor:
            continue
        fsdp = devices // wide
        mesh = {"data": 1, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
        if job.global_batch is None:
            found.append((mesh, 1, fsdp))
            continue
        if job.global_batch < fsdp:
            continue  # some devices would have no row
        rows = job.global_batch // fsdp
        found += [(mesh, parts, rows * fsdp) for parts in sorted({1, rows}) if rows % parts == 0]
    if not found:
        # Fewer rows than devices: rows are divided as far as the sequence allows, and the state over everything.
        found.append(({"data": 1, "fsdp": devices, "sequence": 1, "tensor": 1}, 1, max(job.global_batch or 1, 1)))
    return found


def _powers(most: int) -> list[int]:
    return [2**n for n in range(most.bit_length())]


def _key(shape: ModelShape) -> ModelShape:
    """What memory depends on: names and sources make no difference."""
    return replace(shape, name="", source="", aliases=())


@functools.lru_cache(maxsize=4096)
def _parts(
    shape: ModelShape, chip: str, length: int, mesh_items: tuple[tuple[str, int], ...], micro_batches: int, batch: int
) -> dict[str, int]:
    from anypool.check import Question, predict

    mesh = dict(mesh_items)
    target = f"{chip}:{load_chip(chip).topology.example}"
    config = _skeleton(shape, length)
    question = Question(config, target, "train", mesh, 1, batch, length, "bfloat16", micro_batches=micro_batches)
    parts = predict(question)
    missing = shape.total_parameters - _skeleton_parameters(shape, config)
    # Gradients of micro-batches are summed in f32 as well.
    state = (STATE_BYTES + (4 if micro_batches > 1 else 0)) * missing / math.prod(mesh.values())
    if abs(state) >= 1:
        parts["experts"] = round(state)
    return parts


def _skeleton(shape: ModelShape, length: int) -> dict[str, Any]:
    """The `config.json` of a dense model with the activations of this shape."""
    wide = shape.shared_parameters + shape.routed_parameters - shape.layers * shape.attention_parameters
    inner = shape.feed_forward if not shape.is_mixture and shape.matrices == 3 and shape.feed_forward else 0
    inner = inner or max(256, round(wide / shape.layers / (3 * shape.width) / 256) * 256)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.values + shape.values % 2,
        "max_position_embeddings": length,
        "tie_word_embeddings": shape.tied,
    }


def _skeleton_parameters(shape: ModelShape, config: dict[str, Any]) -> int:
    attention = shape.width * int(config["head_dim"]) * 2 * (shape.heads + shape.kv_heads)
    layer = attention + 3 * shape.width * int(config["intermediate_size"])
    return shape.layers * layer + shape.head_parameters * (1 if shape.tied else 2)


def fewest_chips(job: TrainJob, beyond: int = 0) -> int | None:
    """Fewest chips, more than `beyond`, that hold the job, among a host's times powers of two; None if none do."""
    step = int(job.chip.chips_per_host.value) if job.chip.chips_per_host else 1
    least = STATE_BYTES * job.shape.total_parameters / (usable_bytes(job.chip) * job.devices)
    chips = max(step, 1)
    while chips <= MOST_CHIPS_SEARCHED:
        if chips > beyond and chips >= least:
            # The batch grows with the chips, or some of them would have no row.
            batch = None if job.global_batch is None else max(1, job.global_batch * chips // job.chips)
            found = _best(replace(job, chips=chips, global_batch=batch))
            if found.needed_bytes <= found.usable_bytes:
                return chips
        chips *= 2
    return None
