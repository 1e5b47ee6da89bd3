"""Checks a program against the rules of Trainium's compiler, which cannot be had without AWS's package index.

The program is lowered for the platform "neuron" by JAX itself and walked operation by operation. A program without
errors is likely to compile; it is not proven to.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from anypool.check import stablehlo
from anypool.check.neuron_rules import BY_ID, CUSTOM_CALLS, PARTITIONING_CALLS, Severity
from anypool.check.stablehlo import Where, attribute, constant, defining, element, integers, is_integer, shape

MANY_BIT_OPERATIONS = 400
"""Exclusive-ors in a program beyond which random bits dominate its instructions; one threefry call has 20."""
LONG_PROGRAM = 60_000
"""Operations, loop bodies counted once, beyond which unrolled layers are the likely reason."""

_JAX = str(Path(jax.__file__).parent)
_HERE = str(Path(__file__).parent)


@dataclass(frozen=True)
class Finding:
    """One thing a compiler refuses or does badly.

    operation: the StableHLO operation with its types, the first of `count` on this line.
    where: "file:line" of user code, "" if the program does not say.
    called_from: the lines that called it, innermost first.
    """

    rule: str
    severity: Severity
    operation: str
    where: str
    what: str
    fix: str
    source: str = ""
    called_from: tuple[str, ...] = ()
    count: int = 1


def lint(module: Any, chip: str = "trn2") -> list[Finding]:
    """What Trainium's compiler would refuse in a StableHLO module (`lowered.compiler_ir()`), errors first.

    chip: trn1, trn2 or trn3; later ones take one more 8-bit kind.
    """
    found: dict[tuple[str, str], Finding] = {}
    exclusive_ors = operations = 0
    for visit in stablehlo.walk(module):
        operations += 1
        exclusive_ors += visit.op.name == "stablehlo.xor"
        for rule in _broken(visit.op, chip):
            finding = _finding(rule, _said(visit.op), visit.frames)
            key = (rule, finding.where)
            found[key] = replace(found[key], count=found[key].count + 1) if key in found else finding
    if exclusive_ors > MANY_BIT_OPERATIONS:
        found["threefry", ""] = _finding("threefry", f"{exclusive_ors} stablehlo.xor", ())
    if operations > LONG_PROGRAM:
        found["unrolled", ""] = _finding("unrolled", f"{operations} operations", ())
    return sorted(found.values(), key=lambda finding: (finding.severity != "error", finding.rule, finding.where))


def lint_traced(traced: Any, chip: str = "trn2") -> tuple[Any | None, list[Finding]]:
    """Lowers `jax.jit(f).trace(...)` for Trainium and lints it: (module, findings).

    The module is None if JAX cannot lower the program at all, which is then a finding.
    """
    try:
        lowered = traced.lower(lowering_platforms=("neuron",))
    except NotImplementedError as error:
        missing = re.search(r"primitive '?([\w-]+)'?", str(error))
        if missing is None:
            raise
        return None, [_not_lowered(traced, missing.group(1))]
    module = lowered.compiler_ir("stablehlo")
    return module, lint(module, chip)


def errors(findings: list[Finding]) -> list[Finding]:
    """Those that keep a program from compiling."""
    return [finding for finding in findings if finding.severity == "error"]


def _finding(rule: str, operation: str, where: tuple[Where, ...]) -> Finding:
    known = BY_ID[rule]
    where = tuple(frame for frame in where if not frame.file.startswith(_HERE))
    line = stablehlo.user_line(where)
    others = tuple(str(frame) for frame in where if frame != line)
    what = f"{known.what} ({known.code})" if known.code else known.what
    return Finding(rule, known.severity, operation, str(line or ""), what, known.fix, known.source, others)


def _not_lowered(traced: Any, primitive: str) -> Finding:
    """The finding for a primitive without a lowering; its line is where the traced program first uses it."""
    host = any(part in primitive for part in ("callback", "debug_print", "infeed", "outfeed"))
    return _finding("host-transfer" if host else "no-lowering", primitive, _first_use(traced.jaxpr.jaxpr, primitive))


def _first_use(jaxpr: Any, primitive: str) -> tuple[Where, ...]:
    """The user's frames, innermost first, of the first equation that applies a primitive."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == primitive:
            traceback = equation.source_info.traceback
            frames = traceback.frames if traceback is not None else ()
            ours = (frame for frame in frames if not frame.file_name.startswith(_JAX))
            return tuple(Where(frame.file_name, frame.line_num, frame.function_name) for frame in ours)
        for value in equation.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns") and (found := _first_use(inner, primitive)):
                    return found
    return ()


def _broken(op: Any, chip: str) -> Iterator[str]:
    """Every rule that an operation breaks."""
    called = stablehlo.callee(op)
    if called is not None and "randint" in called:
        yield "randint"
    if op.name.startswith("func.") or op.name == "stablehlo.return":
        return
    yield from _types({element(value) for value in (*op.operands, *op.results)}, op, chip)
    if op.name in _CHECKS:
        yield from _CHECKS[op.name](op)
    elif op.name in _REFUSED:
        yield _REFUSED[op.name]


def _types(kinds: set[str], op: Any, chip: str) -> Iterator[str]:
    if "f64" in kinds:
        yield "f64"
    if any(kind.startswith("complex") for kind in kinds):
        yield "complex"
    allowed = {"f8E5M2", "f8E4M3"} | ({"f8E4M3FN", "f8E8M0FNU", "f4E2M1FN"} if chip == "trn3" else set())
    if any(re.match(r"f[468]E", kind) and kind not in allowed for kind in kinds):
        yield "f8-kind"
    if any("?" in str(value.type) or "stablehlo.bounds" in str(value.type) for value in op.results):
        yield "dynamic-shape"
    if kinds & {"i64", "ui64"} and op.name != "stablehlo.constant":
        yield "wide-integer"


def _constant(op: Any) -> Iterator[str]:
    if element(op.results[0]) in ("i64", "ui64"):
        numbers = re.findall(r"-?\d+", str(op.attributes["value"]).partition("<")[2].partition(">")[0])
        if any(not -(2**31) <= int(number) < 2**32 for number in numbers):
            yield "wide-constant"


def _while(op: Any) -> Iterator[str]:
    if stablehlo.trip_count(op) is None:
        yield "dynamic-loop"


def _reduce(op: Any) -> Iterator[str]:
    if len(op.results) > 1:
        yield "variadic-reduce"


def _reduce_window(op: Any) -> Iterator[str]:
    yield from _reduce(op)
    for name in ("base_dilations", "window_dilations"):
        if any(step > 1 for step in integers(attribute(op, name))):
            yield "dilated-window"
            return


def _convolution(op: Any) -> Iterator[str]:
    dilated, strided, kernel = (
        any(step > 1 for step in integers(attribute(op, name)))
        for name in ("lhs_dilation", "window_strides", "rhs_dilation")
    )
    if dilated and (strided or kernel):
        yield "dilated-convolution"


def _dot(op: Any) -> Iterator[str]:
    if any(is_integer(element(value)) for value in op.operands):
        yield "integer-dot"


def _combines_integers(op: Any) -> bool:
    """True if an operation's computation combines integers rather than replacing them."""
    body = [child.operation for child in op.regions[0].blocks[0].operations]
    combining = any(child.name not in ("stablehlo.return", "stablehlo.constant") for child in body)
    return combining and all(is_integer(element(value)) for value in op.results)


def _scatter(op: Any) -> Iterator[str]:
    if _combines_integers(op):
        yield "integer-scatter"
    yield from _iota_index(op, op.operands[0], op.operands[1])


def _collective(op: Any) -> Iterator[str]:
    if any(is_integer(element(value)) for value in op.results):
        yield "integer-collective"


def _shift(op: Any) -> Iterator[str]:
    if element(op.results[0]) not in ("i32", "ui32"):
        yield "arithmetic-shift"


def _power(op: Any) -> Iterator[str]:
    if element(op.results[0]) in ("i64", "ui64"):
        yield "wide-power"
    exponent = defining(op.operands[1])
    while exponent is not None and exponent.name in ("stablehlo.broadcast_in_dim", "stablehlo.convert"):
        exponent = defining(exponent.operands[0])
    if exponent is None or exponent.name != "stablehlo.constant":
        yield "power"


def _random_bits(op: Any) -> Iterator[str]:
    if "DEFAULT" not in str(op.attributes["rng_algorithm"]):
        yield "random-bits"


def _custom_call(op: Any) -> Iterator[str]:
    target = str(op.attributes["call_target_name"]).strip('"')
    if any("tuple<" in str(value.type) for value in op.operands):
        yield "custom-call"
    elif "callback" in target:
        yield "host-transfer"
    elif target not in CUSTOM_CALLS | PARTITIONING_CALLS:
        yield "custom-call"


def _select(op: Any) -> Iterator[str]:
    """jnp.take and x.at[].get by default fill what is out of bounds: a gather chosen by an and over the indices."""
    gathered = defining(op.operands[1])
    mask = defining(op.operands[0])
    while mask is not None and mask.name == "stablehlo.broadcast_in_dim":
        mask = defining(mask.operands[0])
    if gathered is None or mask is None or gathered.name != "stablehlo.gather" or mask.name != "stablehlo.reduce":
        return
    body = [child.operation.name for child in mask.regions[0].blocks[0].operations]
    if "stablehlo.and" in body:
        yield "fill-gather"


def _gather(op: Any) -> Iterator[str]:
    yield from _iota_index(op, op.operands[0], op.operands[1])


def _iota_index(op: Any, indexed: Any, index: Any) -> Iterator[str]:
    made = defining(index)
    while made is not None and made.name in ("stablehlo.reshape", "stablehlo.broadcast_in_dim", "stablehlo.convert"):
        made = defining(made.operands[0])
    if made is not None and made.name == "stablehlo.iota":
        longest = max(shape(made.results[0]), default=0)
        if longest > max(shape(indexed), default=0):
            yield "long-iota-index"


def _division(op: Any) -> Iterator[str]:
    if is_integer(element(op.results[0])) and shape(op.results[0]):
        divisor = constant(op.operands[1])
        if divisor is None or divisor <= 0 or divisor & (divisor - 1):
            yield "integer-division"


_CHECKS: dict[str, Callable[[Any], Iterator[str]]] = {
    "stablehlo.constant": _constant,
    "stablehlo.while": _while,
    "stablehlo.reduce": _reduce,
    "stablehlo.reduce_window": _reduce_window,
    "stablehlo.convolution": _convolution,
    "stablehlo.dot": _dot,
    "stablehlo.dot_general": _dot,
    "stablehlo.scatter": _scatter,
    "stablehlo.all_reduce": _collective,
    "stablehlo.reduce_scatter": _collective,
    "stablehlo.shift_right_arithmetic": _shift,
    "stablehlo.power": _power,
    "stablehlo.rng_bit_generator": _random_bits,
    "stablehlo.custom_call": _custom_call,
    "stablehlo.select": _select,
    "stablehlo.gather": _gather,
    "stablehlo.divide": _division,
    "stablehlo.remainder": _division,
}

_REFUSED: dict[str, str] = {
    "chlo.top_k": "top-k",
    "stablehlo.sort": "sort",
    "stablehlo.case": "branch",
    "stablehlo.if": "branch",
    "stablehlo.infeed": "host-transfer",
    "stablehlo.outfeed": "host-transfer",
    "stablehlo.send": "host-transfer",
    "stablehlo.recv": "host-transfer",
    "stablehlo.reduce_precision": "unsupported-operation",
    "stablehlo.triangular_solve": "unsupported-operation",
    "stablehlo.cholesky": "unsupported-operation",
    "stablehlo.fft": "unsupported-operation",
    "stablehlo.rng": "random-bits",
    "chlo.erf": "erf",
    "chlo.erfc": "erf",
    **dict.fromkeys(
        (f"stablehlo.dynamic_{kind}" for kind in ("reshape", "broadcast_in_dim", "iota", "pad", "gather", "conv")),
        "dynamic-shape",
    ),
    "stablehlo.real_dynamic_slice": "dynamic-shape",
    "stablehlo.set_dimension_size": "dynamic-shape",
}


def _said(op: Any) -> str:
    """An operation in one line: its name and the types of its operands and results."""
    ins = ", ".join(_short(value) for value in list(op.operands)[:3])
    outs = ", ".join(_short(value) for value in list(op.results)[:3])
    target = attribute(op, "call_target_name")
    label = f" {str(target).strip(chr(34))}" if target is not None else ""
    return f"{op.name}{label}({ins}) -> {outs}"


def _short(value: Any) -> str:
    kind = str(value.type)
    found = re.match(r"tensor<(.*?)(?:, .*)?>$", kind)
    if not found:
        return kind
    sizes, last = re.match(r"((?:[\d?]+x)*)(.*)", found.group(1)).groups()  # type: ignore[union-attr]
    return f"{last}[{sizes.rstrip('x').replace('x', ',')}]"
