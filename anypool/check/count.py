"""Floating-point operations of a program, counted from what it lowers to, with every loop's body times its trips.

A compiler's own cost analysis counts the body of a loop once, which for a model scanned over 80 layers is off by 80.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from anypool.check import stablehlo
from anypool.check.stablehlo import shape


@dataclass(frozen=True)
class Count:
    """flops: of all matrix products and convolutions, a multiply and an add counted as two; recomputation is in it.

    unknown_loops: loops whose trip count is not a constant; their bodies are counted once.
    """

    flops: int
    unknown_loops: int


def count(module: Any) -> Count:
    """Counts a StableHLO module before partitioning: the work of all devices together."""
    by_name = stablehlo.functions(module)
    unknown = 0

    @cache
    def function(name: str) -> int:
        return body(by_name[name]) if name in by_name else 0

    def body(op: Any) -> int:
        return sum(
            operation(child.operation) for region in op.regions for block in region.blocks for child in block.operations
        )

    def operation(op: Any) -> int:
        nonlocal unknown
        called = stablehlo.callee(op)
        if called is not None:
            return function(called)
        if op.name == "stablehlo.dot_general":
            return product_flops(op)
        if op.name == "stablehlo.convolution":
            return convolution_flops(op)
        if op.name == "stablehlo.while":
            trips = stablehlo.trip_count(op)
            if trips is None:
                unknown += 1
            return (1 if trips is None else trips) * body(op)
        if op.name == "stablehlo.case":
            return max(
                (sum(operation(c.operation) for c in region.blocks[0].operations) for region in op.regions), default=0
            )
        return body(op) if len(op.regions) else 0

    total = function("main")
    return Count(total, unknown)


def product_flops(op: Any) -> int:
    """Of a `stablehlo.dot_general`: 2 x every element of the result x the contracted sizes."""
    numbers = str(op.attributes["dot_dimension_numbers"])
    left = numbers.partition("lhs_contracting_dimensions = [")[2].partition("]")[0]
    sizes = shape(op.operands[0])
    contracted = math.prod(sizes[int(axis)] for axis in left.split(",") if axis.strip())
    return 2 * math.prod(shape(op.results[0])) * contracted


def convolution_flops(op: Any) -> int:
    """Of a `stablehlo.convolution`: 2 x every element of the result x the kernel's elements that make one of it."""
    numbers = str(op.attributes["dimension_numbers"])
    kernel = numbers.partition("x[")[2].partition("]")[0].split(",")
    sizes = shape(op.operands[1])
    outputs = next(size for axis, size in zip(kernel, sizes, strict=True) if axis.strip() == "o")
    return 2 * math.prod(shape(op.results[0])) * math.prod(sizes) // outputs


def product_dtypes(module: Any) -> set[str]:
    """Element types that matrix products read."""
    products = (visit.op for visit in stablehlo.walk(module) if visit.op.name == "stablehlo.dot_general")
    return {stablehlo.element(value) for op in products for value in op.operands}
