"""Reading a lowered module: its operations with the line of user code each came from, and how often loops run.

A thin layer over MLIR's Python bindings, which come with jaxlib; nothing else in this room touches them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from jaxlib.mlir import ir  # type: ignore[import-untyped, unused-ignore]

Operation = Any
"""jaxlib.mlir.ir.Operation; the bindings carry no usable types."""

_FRAME = re.compile(r'"([^"]+)"\("((?:[^"\\]|\\.)+)":(\d+)(?::\d+)?')
_LIBRARY = re.compile(r"[/\\](?:site|dist)-packages[/\\]")


@dataclass(frozen=True)
class Where:
    """A line of Python: file, line number and the function it is in."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Visit:
    """An operation as met on a walk: `calls` are the frames of the calls that lead to it, innermost first."""

    op: Operation
    inside: tuple[Operation, ...]
    calls: tuple[Where, ...]

    @property
    def frames(self) -> tuple[Where, ...]:
        """The lines of user code it came from, innermost first."""
        return frames(self.op) + self.calls


def frames(op: Operation) -> tuple[Where, ...]:
    """Python frames in an operation's location, innermost first; those of JAX itself are not among them."""
    return _frames(str(op.location))


@cache
def _frames(location: str) -> tuple[Where, ...]:
    found = (Where(file, int(line), function) for function, file, line in _FRAME.findall(location) if file[0] != "<")
    return tuple(dict.fromkeys(found))


def user_line(where: tuple[Where, ...]) -> Where | None:
    """The innermost frame in code that is not an installed library; the innermost of all if there is none."""
    return next((frame for frame in where if not _LIBRARY.search(frame.file)), where[0] if where else None)


def functions(module: Any) -> dict[str, Operation]:
    """The module's functions by name."""
    found = {}
    for op in module.body.operations:
        if op.operation.name == "func.func":
            found[ir.StringAttr(op.operation.attributes["sym_name"]).value] = op.operation
    return found


def walk(module: Any) -> Iterator[Visit]:
    """Every operation of a module once, in order of definition; a function's body as seen from its first caller."""
    by_name = functions(module)
    seen: set[str] = set()

    def body(op: Operation, parents: tuple[Operation, ...], calls: tuple[Where, ...]) -> Iterator[Visit]:
        for region in op.regions:
            for block in region.blocks:
                for child in block.operations:
                    operation = child.operation
                    yield Visit(operation, parents, calls)
                    called = callee(operation)
                    if called is not None and called in by_name and called not in seen:
                        seen.add(called)
                        yield from body(by_name[called], (*parents, operation), frames(operation) + calls)
                    yield from body(operation, (*parents, operation), calls)

    order = ["main", *by_name]
    for name in order:
        if name in by_name and name not in seen:
            seen.add(name)
            yield from body(by_name[name], (), ())


def callee(op: Operation) -> str | None:
    """The name of the function an operation calls, if it is a call."""
    if op.name not in ("func.call", "call"):
        return None
    return str(ir.FlatSymbolRefAttr(op.attributes["callee"]).value)


def attribute(op: Operation, name: str) -> Any:
    """An attribute or None."""
    return op.attributes[name] if name in op.attributes else None  # noqa: SIM401 - these have no get


def integers(value: Any) -> list[int]:
    """The numbers of an integer array attribute; none for an attribute that is not there."""
    return [] if value is None else [int(number) for number in re.findall(r"-?\d+", str(value).partition(":")[2])]


def element(value: Any) -> str:
    """Element type of a value, as MLIR writes it: f32, bf16, i64, complex<f32>; empty for a value that has none."""
    found = re.match(r"tensor<(?:[\d?]+x)*(.+?)(?:, .*)?>$", str(value.type))
    return found.group(1) if found else ""


def is_integer(kind: str) -> bool:
    """True for element types that are whole numbers, booleans included."""
    return re.fullmatch(r"[su]?i\d+", kind) is not None


def shape(value: Any) -> tuple[int, ...]:
    """Sizes of a value of static shape; () for a scalar and for what is no tensor."""
    found = re.match(r"tensor<((?:\d+x)*)[^x]*", str(value.type))
    return tuple(int(size) for size in found.group(1).split("x")[:-1]) if found else ()


def defining(value: Any) -> Operation | None:
    """The operation that made a value; None for an argument of a block."""
    owner = value.owner
    if isinstance(owner, ir.Block):
        return None
    return getattr(owner, "operation", owner)


def constant(value: Any) -> int | None:
    """A value's number if it is known when compiling: an integer constant, perhaps reshaped or converted."""
    op = defining(value)
    while op is not None and op.name in ("stablehlo.convert", "stablehlo.reshape", "stablehlo.broadcast_in_dim"):
        op = defining(op.operands[0])
    if op is None or op.name != "stablehlo.constant":
        return None
    found = re.match(r"dense<(-?\d+|true|false)>", str(op.attributes["value"]))
    if not found:
        return None
    text = found.group(1)
    return int(text) if text not in ("true", "false") else int(text == "true")


def trip_count(loop: Operation) -> int | None:
    """How often a `stablehlo.while` runs, if that is a constant: a counter, a bound and a step that are.

    This is what `lax.scan` and `lax.fori_loop` with fixed bounds lower to.
    """
    condition, body = (region.blocks[0] for region in loop.regions)
    test = defining(_returned(condition)[0])
    if test is None or test.name != "stablehlo.compare":
        return None
    direction = re.search(r"comparison_direction (\w+)", str(test.attributes["comparison_direction"]))
    counter, bound = test.operands
    index = _argument(condition, counter)
    limit = _known(loop, condition, bound, body)
    if index is None or limit is None or direction is None:
        return None
    start = constant(loop.operands[index])
    update = defining(_returned(body)[index])
    if start is None or update is None or update.name not in ("stablehlo.add", "stablehlo.subtract"):
        return None
    step = next((constant(value) for value in update.operands if _argument(body, value) != index), None)
    if not step or all(_argument(body, value) != index for value in update.operands):
        return None
    distance = {"LT": limit - start, "LE": limit - start + 1, "GT": start - limit, "GE": start - limit + 1}
    span = distance.get(direction.group(1))
    if span is None:
        return None
    forward = (update.name == "stablehlo.add") == (direction.group(1) in ("LT", "LE"))
    stride = step if forward else -step
    return None if stride <= 0 else max(0, -(-span // stride))


def _returned(block: Any) -> list[Any]:
    return list(list(block.operations)[-1].operation.operands)


def _argument(block: Any, value: Any) -> int | None:
    """Which argument of `block` a value is."""
    return next((i for i, argument in enumerate(block.arguments) if argument == value), None)


def _known(loop: Operation, condition: Any, value: Any, body: Any) -> int | None:
    """A bound that is a constant in the condition, or one handed round the loop unchanged."""
    index = _argument(condition, value)
    if index is None:
        return constant(value)
    if _argument(body, _returned(body)[index]) != index:
        return None
    return constant(loop.operands[index])
