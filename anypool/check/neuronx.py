"""AWS's own compiler, where it is installed: linted programs are compiled for real, one core's part of each.

neuronx-cc comes from AWS's package index only. What is written here follows its documentation (command line and error
codes of SDK 2.32) and reports of those who called it by hand; it has never been run against the real one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anypool.check.errors import CheckError

COMMAND = "neuronx-cc"
_VERSION = re.compile(r"version\s+([\w.+-]+)", re.IGNORECASE)
_CODE = re.compile(r"\[?(NCC_[A-Z]+\d+)\]?:?\s*(.*)")


@dataclass(frozen=True)
class Compiler:
    """The program `neuronx-cc`, and the version it says it has."""

    path: str
    version: str


@dataclass(frozen=True)
class Compiled:
    """What became of a program. rejected: the compiler's code and message, or None if it made one (`neff_bytes`)."""

    seconds: float
    neff_bytes: int
    rejected: str | None = None


class CompilerCrashError(RuntimeError):
    """neuronx-cc ended without a program and without one of its error codes."""


def find() -> Compiler | None:
    """The compiler, if it is in PATH. Raises CheckError if it is and does not tell its version."""
    path = shutil.which(COMMAND)
    if path is None:
        return None
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CheckError(f"{path} --version: {error}: mend the installation, or take it out of PATH") from None
    found = _VERSION.search(done.stdout + done.stderr)
    if done.returncode or found is None:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise CheckError(
            f"{path} --version ended with {done.returncode} and named no version"
            f"{': ' + said[-1] if said else ''}: mend the installation, or take it out of PATH"
        )
    return Compiler(path, found.group(1))


def compile_module(compiler: Compiler, module: bytes, target: str) -> Compiled:
    """Compiles one core's HLO.

    module: a serialized HloModuleProto, partitioned. target: the instance family, as `--target` takes it.

    Raises CompilerCrashError.
    """
    with tempfile.TemporaryDirectory(prefix="anypool-neuronx-") as folder:
        given, made = Path(folder) / "module.pb", Path(folder) / "module.neff"
        given.write_bytes(renumbered(module))
        command = [compiler.path, "compile", str(given), "--framework", "XLA", "--target", target]
        command += ["--model-type", "transformer", "--output", str(made)]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=folder, check=False)
        seconds = time.perf_counter() - start
        said = done.stdout + done.stderr
        code = _CODE.search(said)
        if done.returncode == 0 and made.is_file():
            return Compiled(seconds, made.stat().st_size)
        if code is not None:
            return Compiled(seconds, 0, f"{code.group(1)}: {code.group(2).strip()}".rstrip(": "))
        last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "it said nothing")
        how = "made no program" if done.returncode == 0 else f"ended with exit code {done.returncode}"
        raise CompilerCrashError(f"neuronx-cc {how}: {last[:500]}")


def one_core(traced: Any, devices: int) -> bytes:
    """The HLO of one core, serialized: as JAX lowers it, or, for a mesh, after XLA has partitioned it.

    traced: `jax.jit(f).trace(...)`. devices: of its mesh; as many host devices have to be here.
    """
    if devices == 1:
        lowered = traced.lower(lowering_platforms=("neuron",))
        serialized: bytes = lowered.compiler_ir("hlo").as_serialized_hlo_module_proto()
        return serialized
    # AWS's plug-in partitions with XLA before it calls the compiler. XLA shows what its partitioner made only in a
    # dump, on the way to a program for the CPU, which is thrown away and so made with little care.
    with tempfile.TemporaryDirectory(prefix="anypool-partition-") as folder:
        options = {
            "xla_dump_to": folder,
            "xla_dump_hlo_pass_re": "^spmd-partitioning$",
            "xla_dump_hlo_as_proto": True,
            "xla_backend_optimization_level": 0,
            "xla_llvm_disable_expensive_passes": True,
        }
        traced.lower(lowering_platforms=("cpu",)).compile(compiler_options=options)
        found = sorted(Path(folder).glob("*after_spmd-partitioning*.hlo.pb"))
        if not found:
            raise RuntimeError("XLA left no dump of its partitioner: this version of JAX names the pass otherwise")
        # A dump is an HloProto, whose first field is the module.
        module: bytes = next(value for field, _, value in _fields(found[-1].read_bytes()) if field == 1)
        return module


# An HloModuleProto is rewritten by its wire format: the schema comes with no package of ours.
_MODULE_COMPUTATION = 3
_COMPUTATION_INSTRUCTION, _COMPUTATION_ROOT = 2, 6
_INSTRUCTION_ID, _INSTRUCTION_IDS = 35, (36, 37)
"""Field numbers in xla/service/hlo.proto; 36 and 37 are operands and what has to run before."""


def renumbered(module: bytes) -> bytes:
    """A serialized HloModuleProto whose instructions count from 1.

    JAX 0.10 and later number instructions in 64 bits, the computation's number in the upper half; compilers built with
    an older XLA end on these.
    """
    instructions = [
        held
        for name, _, part in _fields(module)
        if name == _MODULE_COMPUTATION
        for inner, _, held in _fields(part)
        if inner == _COMPUTATION_INSTRUCTION
    ]
    old = [next(value for name, _, value in _fields(held) if name == _INSTRUCTION_ID) for held in instructions]
    if not old:
        raise ValueError("there are no instructions in it: this is no serialized HloModuleProto")
    numbers = {number: place for place, number in enumerate(old, start=1)}

    def instruction(field: int, kind: int, value: Any) -> Any:
        if field == _INSTRUCTION_ID:
            return numbers[value]
        if field in _INSTRUCTION_IDS:
            return numbers[value] if kind == 0 else b"".join(_varint(numbers[each]) for each in _varints(value))
        return value

    def computation(field: int, kind: int, value: Any) -> Any:
        if field == _COMPUTATION_INSTRUCTION:
            return _rewritten(value, instruction)
        return numbers[value] if field == _COMPUTATION_ROOT else value

    def whole(field: int, kind: int, value: Any) -> Any:
        return _rewritten(value, computation) if field == _MODULE_COMPUTATION else value

    return _rewritten(module, whole)


def _rewritten(message: bytes, change: Callable[[int, int, Any], Any]) -> bytes:
    """A message with every field's value changed: `change(field, wire type, value)`."""
    out = bytearray()
    for field, kind, value in _fields(message):
        new = change(field, kind, value)
        out += _varint(field << 3 | kind)
        if kind == 0:
            out += _varint(new)
        elif kind == 2:
            out += _varint(len(new)) + new
        else:
            out += new
    return bytes(out)


def _fields(message: bytes) -> Iterator[tuple[int, int, Any]]:
    """(number, wire type, value) of every field: int for varints, bytes for the rest."""
    at = 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        kind = tag & 7
        value: Any
        if kind == 0:
            value, at = _read_varint(message, at)
        else:
            if kind == 2:
                size, at = _read_varint(message, at)
            elif kind in (1, 5):
                size = 8 if kind == 1 else 4
            else:
                raise ValueError(f"wire type {kind} at byte {at}: this is no serialized HloModuleProto")
            value, at = message[at : at + size], at + size
        yield tag >> 3, kind, value


def _varints(packed: bytes) -> Iterator[int]:
    at = 0
    while at < len(packed):
        value, at = _read_varint(packed, at)
        yield value


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
