"""Reading what a compiler made: bytes moved to and from memory, and what crosses the network, with loops times trips.

Works on the text of an optimised HLO module, which every XLA compiler prints; shapes in it are those of one device.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_FREE = frozenset({
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while", "conditional", "call",
    "opt-barrier", "partition-id", "replica-id", "iota", "async-start", "async-update", "async-done", "add-dependency",
    "domain",
})  # fmt: skip
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Instruction:
    """One line of a computation. `kind` is its type as printed, `rest` what follows the operands.

    operands: names of values; of a parameter its number, of a constant its value.
    """

    name: str
    kind: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @cached_property
    def arrays(self) -> list[int]:
        """Bytes of each array of the result that lies in device memory."""
        return list(array_bytes(self.kind))

    @property
    def bytes(self) -> int:
        return sum(self.arrays)

    def attribute(self, name: str) -> str | None:
        """The computation or word that an attribute names."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found.group(1) if found else None


@dataclass(frozen=True)
class Computation:
    name: str
    instructions: dict[str, Instruction]

    @cached_property
    def root(self) -> Instruction:
        return next(item for item in self.instructions.values() if item.root)

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions that read each value."""
        found: dict[str, list[Instruction]] = {}
        for item in self.instructions.values():
            for operand in dict.fromkeys(item.operands):
                found.setdefault(operand, []).append(item)
        return found

    @cached_property
    def parameters(self) -> list[str]:
        """Names of the parameters, in order of their numbers."""
        numbered = [
            (int(item.operands[0]), item.name) for item in self.instructions.values() if item.opcode == "parameter"
        ]
        return [name for _, name in sorted(numbered)]


@dataclass(frozen=True)
class Collective:
    """One kind of traffic of one program: all collectives of a kind over the same groups.

    count: how many run in a step. bytes: what each device sends in a step, in all. axes: mesh axes the groups span,
    () if they are none. groups: the devices of each group, as positions in the mesh.
    """

    kind: str
    axes: tuple[str, ...]
    group_size: int
    count: int
    bytes: int
    groups: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Program:
    """What a compiled program does in one step on one device.

    hbm_bytes: read from and written to device memory. unknown_loops: loops whose trips are not known, counted once.
    custom_calls: how often each runs in a step, by target.
    """

    hbm_bytes: int
    collectives: tuple[Collective, ...]
    unknown_loops: int
    custom_calls: Mapping[str, int]


def array_bytes(kind: str) -> Iterator[int]:
    """Bytes of each array in a printed type; 0 for those the compiler keeps in on-chip memory."""
    for dtype, sizes, layout in _ARRAY.findall(kind):
        space = re.search(r"S\((\d+)\)", layout)
        if space and space.group(1) != "0":
            yield 0
            continue
        count = math.prod(int(size.lstrip("<=")) for size in sizes.split(",") if size)
        yield count * bits(dtype) // 8


def bits(dtype: str) -> int:
    """Width of an element type: bf16, f8e4m3fn, s32, pred, c64."""
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.match(r"(?:bf|[fsuc])(\d+)", dtype)
    return int(found.group(1)) if found else 0


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a printed module by name, and the name of the entry."""
    computations: dict[str, Computation] = {}
    entry, name = "", None
    current: dict[str, Instruction] = {}
    # What a kernel says of itself is printed with line breaks in it: such lines begin with a quote, or two braces.
    for line in re.sub(r'\n(?="|\}[},])', " ", text).splitlines():
        if name is None:
            opened = re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$", line.rstrip())
            if opened and not line.startswith(("HloModule", " ")):
                name, current = opened.group(2), {}
                entry = name if opened.group(1) else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, current)
            name = None
        else:
            item = _instruction(line.strip())
            if item is not None:
                current[item.name] = item
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"(ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    start = found.end()
    end = _closing(line, start) if line[start] == "(" else _type_end(line, start)
    called = re.match(r"\s*([\w\-]+)\(", line[end:])
    if not called:
        return None
    first = end + called.end()
    last = _closing(line, first - 1)
    inside = line[first : last - 1]
    literal = called.group(1) in ("parameter", "constant")
    operands = (inside,) if literal else tuple(_NAME.findall(inside))
    return Instruction(found.group(2), line[start:end], called.group(1), operands, line[last:], bool(found.group(1)))


def _closing(line: str, start: int) -> int:
    """Position after the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(line)):
        depth += (line[position] == "(") - (line[position] == ")")
        if depth == 0:
            return position + 1
    return len(line)


def _type_end(line: str, start: int) -> int:
    """Position after an array's type: no space inside but in a layout."""
    depth = 0
    for position in range(start, len(line)):
        depth += (line[position] in "{[(") - (line[position] in "}])")
        if line[position] == " " and depth == 0:
            return position
    return len(line)


def read(text: str, mesh: Mapping[str, int]) -> Program:
    """What the program of a printed module does in one step.

    mesh: sizes of the axes over which it is partitioned, outermost first.
    """
    computations, entry = parse(text)
    unknown = 0
    total = 0
    moved: Counter[tuple[str, tuple[tuple[int, ...], ...]]] = Counter()
    ran: Counter[tuple[str, tuple[tuple[int, ...], ...]]] = Counter()
    calls: Counter[str] = Counter()
    devices = math.prod(mesh.values())

    def send(kind: str, item: Instruction, computation: Computation, times: int, seen: set[str]) -> None:
        # Libtpu repeats an asynchronous collective in every fusion that advances it; its channel is one.
        channel = re.search(r"channel_id=(\d+)", item.rest)
        if channel is not None and channel.group(1) in seen:
            return
        if channel is not None:
            seen.add(channel.group(1))
        groups = _groups(item, devices)
        moved[kind, groups] += times * _sent(kind, item, computation, len(groups[0]) if groups else devices)
        ran[kind, groups] += times

    def fused(name: str, times: int, seen: set[str]) -> None:
        """Libtpu fuses some collectives: an all-reduce whose result is sliced at once is a reduce-scatter."""
        computation = computations.get(name)
        for item in computation.instructions.values() if computation else ():
            kind = item.opcode.removesuffix("-start")
            if kind in COLLECTIVES and computation is not None:
                scattered = kind == "all-reduce" and "scatter" in name
                send("reduce-scatter" if scattered else kind, item, computation, times, seen)
            elif item.opcode == "fusion":
                fused(item.attribute("calls") or "", times, seen)

    def visit(name: str, times: int) -> None:
        nonlocal unknown, total
        computation = computations.get(name)
        if computation is None:
            return
        seen: set[str] = set()
        for item in computation.instructions.values():
            kind = item.opcode.removesuffix("-start")
            if item.opcode == "while":
                trips = _trips(item, computation, computations)
                unknown += trips is None
                visit(item.attribute("body") or "", times * (1 if trips is None else trips))
            elif item.opcode in ("call", "async-start"):
                visit(item.attribute("to_apply") or item.attribute("calls") or "", times)
            elif item.opcode == "conditional":
                for branch in re.findall(
                    r"%([\w.\-]+)", item.rest.partition("branch_computations={")[2].partition("}")[0]
                ):
                    visit(branch, times)
            elif kind in COLLECTIVES:
                send(kind, item, computation, times, seen)
            elif item.opcode == "fusion":
                fused(item.attribute("calls") or "", times, seen)
            if item.opcode == "custom-call":
                target = re.search(r'custom_call_target="([^"]+)"', item.rest)
                calls[target.group(1) if target else "?"] += times
            total += times * traffic(item, computation, computations)

    visit(entry, 1)
    collectives = tuple(
        Collective(kind, _axes(groups, mesh), len(groups[0]) if groups else devices, ran[kind, groups], sent, groups)
        for (kind, groups), sent in sorted(moved.items(), key=lambda entry: -entry[1])
    )
    return Program(total, collectives, unknown, dict(calls))


def traffic(item: Instruction, computation: Computation, computations: Mapping[str, Computation]) -> int:
    """Bytes an instruction reads and writes: each operand once, a slice of one as far as it is read."""
    if item.opcode in _FREE or item.opcode.endswith("-done"):
        return 0
    if item.opcode == "fusion":
        body = computations.get(item.attribute("calls") or "")
        if body is not None:
            read = sum(
                _read(name, _bytes(computation, operand), body, computations)
                for name, operand in zip(body.parameters, item.operands, strict=False)
            )
            return read + _written(item, body)
    sizes = [_bytes(computation, operand) for operand in item.operands]
    if item.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * item.bytes
    if item.opcode == "dynamic-update-slice" and len(sizes) > 1:
        return 2 * sizes[1]
    if item.opcode == "scatter" and len(sizes) > 2:
        return 2 * sizes[2] + sizes[1]
    if item.opcode in ("broadcast", "rng-bit-generator"):
        return item.bytes
    if item.opcode == "copy-start":
        return item.bytes  # its type holds both ends
    if item.opcode == "slice-start":
        _, result, *_ = _parts(item.kind)
        return _dense(result) + sum(array_bytes(result))
    return item.bytes + sum(sizes)


def _bytes(computation: Computation, name: str) -> int:
    item = computation.instructions.get(name)
    return item.bytes if item is not None else 0


def _read(name: str, whole: int, body: Computation, computations: Mapping[str, Computation]) -> int:
    """How much of a fusion's parameter is read: all of it, unless only slices of it are used."""
    read = 0
    for user in body.users.get(name, []):
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            read += _dense(user.kind)
        elif user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == name:
            continue
        elif user.opcode in ("bitcast", "reshape", "get-tuple-element"):
            read += _read(user.name, whole, body, computations)
        elif user.opcode == "fusion":
            inner = computations.get(user.attribute("calls") or "")
            inside = (
                [p for p, operand in zip(inner.parameters, user.operands, strict=False) if operand == name]
                if inner
                else []
            )
            if inner is None or not inside:
                return whole
            read += sum(_read(parameter, whole, inner, computations) for parameter in inside)
        else:
            return whole
    return min(read, whole)


def _dense(kind: str) -> int:
    """Bytes of a type whatever memory it is in."""
    return sum(array_bytes(re.sub(r"S\(\d+\)", "", kind)))


def _written(item: Instruction, body: Computation) -> int:
    """Bytes a fusion writes: of an update in place, the update."""
    root = body.root
    roots = (
        [body.instructions[name] for name in root.operands if name in body.instructions]
        if root.opcode == "tuple"
        else [root]
    )
    written = 0
    for output in roots:
        result = output
        while result.opcode in ("bitcast", "reshape") and result.operands[0] in body.instructions:
            result = body.instructions[result.operands[0]]
        updates = {"dynamic-update-slice": 1, "scatter": 2}
        if result.opcode in updates:
            update = body.instructions.get(result.operands[updates[result.opcode]])
            written += _dense(update.kind) if update else 0
        else:
            written += result.bytes
    return min(written, item.bytes) if len(roots) == 1 else written


def _sent(kind: str, item: Instruction, computation: Computation, size: int) -> int:
    """Bytes each device sends for one collective over groups of `size`, by the usual ring algorithms."""
    if size <= 1:
        return 0
    out = [_dense(part) for part in _parts(item.kind)]
    share = (size - 1) / size
    if kind == "all-gather":
        result = out[len(out) // 2 :] if item.opcode.endswith("-start") else out
        return round(sum(result) * share)
    given = sum(
        _dense(computation.instructions[name].kind) for name in item.operands if name in computation.instructions
    )
    if kind == "all-reduce":
        return round(2 * given * share)
    if kind == "collective-permute":
        return given
    return round(given * share)


def _parts(kind: str) -> list[str]:
    """The arrays of a printed type, flattened."""
    return [match.group(0) for match in _ARRAY.finditer(kind)]


def _trips(item: Instruction, computation: Computation, computations: Mapping[str, Computation]) -> int | None:
    """Trips of a while loop: what the compiler noted, or a counter that is compared with a constant."""
    known = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', item.rest)
    if known:
        return int(known.group(1))
    condition = computations.get(item.attribute("condition") or "")
    if condition is None:
        return None
    test = condition.root
    while test.opcode in ("bitcast", "copy", "convert") or (test.opcode == "fusion" and len(test.operands) == 2):
        if test.opcode == "fusion":
            inner = computations.get(test.attribute("calls") or "")
            if inner is None or inner.root.opcode != "compare":
                return None
            counter, bound = (test.operands[inner.parameters.index(name)] for name in inner.root.operands)
            return _bound(condition, counter, bound, inner.root, item, computation)
        test = condition.instructions[test.operands[0]]
    if test.opcode != "compare" or len(test.operands) != 2:
        return None
    return _bound(condition, *test.operands, test, item, computation)


def _bound(
    condition: Computation, counter: str, bound: str, test: Instruction, loop: Instruction, outer: Computation
) -> int | None:
    limit = _constant(condition, bound)
    picked = condition.instructions.get(counter)
    if limit is None or picked is None or picked.opcode != "get-tuple-element" or "direction=LT" not in test.rest:
        return None
    index = re.search(r"index=(\d+)", picked.rest)
    initial = outer.instructions.get(loop.operands[0])
    start = 0
    if initial is not None and initial.opcode == "tuple" and index is not None:
        start = _constant(outer, initial.operands[int(index.group(1))]) or 0
    return max(0, limit - start)


def _constant(computation: Computation, name: str) -> int | None:
    item = computation.instructions.get(name)
    while item is not None and item.opcode in ("copy", "bitcast", "convert"):
        item = computation.instructions.get(item.operands[0])
    if item is None or item.opcode != "constant":
        return None
    return int(item.operands[0]) if re.fullmatch(r"-?\d+", item.operands[0]) else None


def _groups(item: Instruction, devices: int) -> tuple[tuple[int, ...], ...]:
    """The devices of each group of a collective; () if it says nothing that can be read."""
    if item.opcode.startswith("collective-permute"):
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}?(?:,|$)", item.rest)
        return tuple(_pairs(pairs.group(1))) if pairs else ()
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", item.rest)
    if listed:
        return tuple(tuple(int(n) for n in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", listed.group(1)))
    counted = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", item.rest)
    if counted:
        shape, source, order = ([int(n) for n in part.split(",")] if part else [] for part in counted.groups())
        flat = _transposed(source, order or list(range(len(source))))
        size = shape[-1]
        return tuple(tuple(flat[i : i + size]) for i in range(0, len(flat), size))
    named = re.search(r"replica_groups=@?\w*mesh\[([^\]]*)\](?:, device_ids=\((.*?\)?)\))? ?\{([^}]*)\}", item.rest)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'?(\w+)'?=(\d+)", named.group(1))}
        order = _device_order(named.group(2) or "")
        places = _grid(sizes, re.findall(r"'(\w+)'", named.group(3)))
        return tuple(tuple(order[place] if order else place for place in group) for group in places)
    return (tuple(range(devices)),)


def _device_order(text: str) -> list[int]:
    """The devices of a printed mesh in order, from "[2,4]T(1,0)" or "0,2,1,3"; [] if they are just 0, 1, ..."""
    laid = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if laid is None:
        return [int(n) for n in re.findall(r"\d+", text)]
    sizes = [int(n) for n in laid.group(1).split(",")]
    return _transposed(sizes, [int(n) for n in laid.group(2).split(",")]) if laid.group(2) else []


def _pairs(text: str) -> Iterator[tuple[int, int]]:
    for first, second in re.findall(r"(\d+),(\d+)", text):
        yield int(first), int(second)


def _transposed(sizes: list[int], order: list[int]) -> list[int]:
    """0, 1, ... laid out in `sizes`, axes put in `order`, flattened."""
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    grids = itertools.product(*(range(sizes[axis]) for axis in order))
    return [sum(index * strides[axis] for index, axis in zip(grid, order, strict=True)) for grid in grids]


def _grid(sizes: Mapping[str, int], over: list[str]) -> tuple[tuple[int, ...], ...]:
    """Groups of a mesh's devices that differ in the axes `over` only."""
    names = list(sizes)
    order = [names.index(name) for name in names if name not in over] + [
        names.index(name) for name in over if name in names
    ]
    flat = _transposed(list(sizes.values()), order)
    size = math.prod(sizes[name] for name in over if name in sizes)
    return tuple(tuple(flat[i : i + size]) for i in range(0, len(flat), size))


def _axes(groups: tuple[tuple[int, ...], ...], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The fewest mesh axes that a collective's groups span."""
    if not groups:
        return ()
    names = [name for name, size in mesh.items() if size > 1]
    for count in range(1, len(names) + 1):
        for over in itertools.combinations(names, count):
            blocks = {device: i for i, block in enumerate(_grid(mesh, list(over))) for device in block}
            if all(len({blocks.get(device) for device in group}) == 1 for group in groups):
                return over
    return ()
