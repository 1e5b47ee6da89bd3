"""Whether the numbers of one chip agree with each other.

Public tables go wrong in the same few ways: sparse rates taken for dense ones, GB taken for GiB, the memory of a whole
instance taken for one chip's, both directions of a link taken for one. Each leaves a trace in another number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anypool.chips.errors import ChipFileError
from anypool.chips.facts import Fact

# Dense rates grow by 2 with each halving of the operands. More than this over bf16 is a sparse rate.
LARGEST_RATIO_TO_BF16 = {"f32": 1.0, "tf32": 1.05, "f16": 1.05, "fp8": 2.1, "int8": 2.1, "mxfp8": 4.2}
GIB_OVER_GB = 2**30 / 1e9


def check_numbers(
    peak_flops: Mapping[str, Fact], numbers: Mapping[str, Fact | None], data: Mapping[str, Any], file: str
) -> None:
    """Compares the numbers of one chip with each other. Raises ChipFileError, naming file, field, value and fix."""
    _check_rates(peak_flops, file)
    _check_rates_of_cores(peak_flops, data.get("compiler", {}).get("device", {}), file)
    _check_memory(numbers, file)
    _check_links(numbers, file)
    if (numbers["power.watts"] is None) != ("power_basis" not in data.get("power", {})):
        raise ChipFileError(f"{file}: power: watts and power_basis go together: add the one that is missing")


def _check_rates(peak_flops: Mapping[str, Fact], file: str) -> None:
    bf16 = peak_flops.get("bf16")
    if bf16 is None:
        return
    for dtype, limit in LARGEST_RATIO_TO_BF16.items():
        fact = peak_flops.get(dtype)
        if fact is not None and fact.value > limit * bf16.value:
            raise ChipFileError(
                f"{file}: flops.{dtype} = {fact.published}: more than {limit:g} times bf16 ({bf16.published}), as only "
                "a sparse rate is: write the dense one, or leave it out"
            )


def _check_rates_of_cores(peak_flops: Mapping[str, Fact], device: Mapping[str, Any], file: str) -> None:
    """Against what the cores can do, where the target description says it."""
    keys = ("core_count", "matrix_ops_per_clock_per_core_bf16", "matrix_clock_rate_ghz")
    bf16 = peak_flops.get("bf16")
    if bf16 is None or any(key not in device for key in keys):
        return
    cores, ops, gigahertz = (float(device[key]) for key in keys)
    possible = cores * ops * gigahertz * 1e9 * 2  # a multiplication and an addition
    if bf16.value > 1.15 * possible:
        raise ChipFileError(
            f"{file}: flops.bf16 = {bf16.published}: the cores reach {possible / 1e12:.0f} TFLOP/s at most, so this is "
            "a sparse rate: write the dense one"
        )


def _check_memory(numbers: Mapping[str, Fact | None], file: str) -> None:
    capacity, usable = numbers["memory.capacity"], numbers["memory.usable_per_device"]
    devices = numbers["layout.devices_per_chip"]
    if capacity is None or usable is None or devices is None:
        return
    all_usable = usable.value * devices.value
    where = f"{file}: memory.capacity = {capacity.published}"
    less = f"{where}: less than the {usable.published} its devices may use:"
    if capacity.value < all_usable:
        if capacity.value * GIB_OVER_GB >= all_usable:
            raise ChipFileError(f"{less} the unit is GiB, not GB")
        raise ChipFileError(f"{less} correct one of the two")
    if capacity.value > 1.15 * all_usable:
        raise ChipFileError(
            f"{where}: {capacity.value / all_usable:.1f} times what its devices may use ({usable.published} each): "
            "write the memory of one chip, not of a board or an instance"
        )


def _check_links(numbers: Mapping[str, Fact | None], file: str) -> None:
    total, link = numbers["scale_up.bandwidth"], numbers["scale_up.link"]
    if total is None or link is None:
        return
    links = total.value / link.value
    if abs(links - round(links)) > 0.05 or round(links) < 1:
        raise ChipFileError(
            f"{file}: scale_up.bandwidth = {total.published}: is {links:.2f} links of {link.published}: "
            "write both one way, and the first over all links"
        )
