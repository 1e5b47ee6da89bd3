"""Answers one question in a process of its own: a compiler that crashes, hangs or eats memory harms nothing else.

    python -m anypool.check.child ANSWER.json  < question

The question is a line of JSON on standard input, `{"question": ..., "platform": ..., ...}`, which then stays open.
What is learned is written to ANSWER.json after every stage, so that a crash leaves what was known before it and the
name of the stage it came in.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anypool.check import neuronx
from anypool.pools.guard import die_with_parent


class Answer:
    """What is known so far, kept in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Any] = {"stage": "starting", "programs": []}

    def stage(self, name: str, **known: Any) -> None:
        """Notes what the process does next, and what it has learned."""
        self.known |= {"stage": name, **known}
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.known))
        partial.replace(self.path)


def main() -> None:
    """Reads the question, answers it; user errors are part of the answer, any other ends the process."""
    answer = Answer(Path(sys.argv[1]))
    asked = json.loads(sys.stdin.buffer.readline())
    # A compiler can work for minutes; it is not left alone when nobody waits for it any more.
    die_with_parent()
    answer.stage("importing jax")
    from anypool.check.question import Question

    try:
        run(Question.from_json(asked["question"]), asked["platform"], answer, run_it=asked.get("run_it", False))
    except ValueError as error:
        if not type(error).__module__.startswith("anypool."):
            raise
        answer.stage("refused", refused=str(error))


def run(question: Any, platform: str, answer: Answer, run_it: bool) -> None:
    """Lowers, and where there is a compiler compiles, every program of a job."""
    import jax

    from anypool.check import jobs
    from anypool.check.count import count
    from anypool.check.lint import errors, lint_traced

    answer.stage("loading the compiler")
    devices, proof = find_devices(platform, question)
    kernels = jobs.kernels_for(question, platform)
    answer.stage("tracing", kernels=kernels.report(), proof=proof)
    mesh = jobs.mesh_for(question, devices)
    flops = unknown = 0
    findings: list[dict[str, Any]] = []
    compiled = []
    # A TPU's kernels ask the default device which TPU they are for.
    with jax.default_device(devices[0]) if platform == "tpu" else nullcontext():
        for program in jobs.programs(question, mesh, kernels):
            answer.stage(f"lowering {program.name}")
            if platform == "neuron":
                module, found = lint_traced(program.traced, question.chips.chip.name)
                findings += [asdict(finding) | {"program": program.name} for finding in found]
                answer.stage("linted", findings=findings)
                if module is None or errors(found):
                    continue
                lowered = None
            else:
                lowered = program.traced.lower(lowering_platforms=(platform,))
                module = lowered.compiler_ir("stablehlo")
            counted = count(_plain(program.name, question, mesh) if _has_kernels(kernels) else module)
            flops, unknown = flops + counted.flops, unknown + counted.unknown_loops
            answer.stage(f"compiling {program.name}", flops=flops, unknown_loops=unknown)
            if lowered is not None:
                compiled.append((compile_one(program, lowered, question, answer), program.arguments))
            elif (compiler := neuronx.find()) is not None:
                compile_for_trainium(program, compiler, question, answer)
        if run_it and compiled:
            answer.stage("running one step", measured_seconds=run_once(*compiled[0]))
    answer.stage("done")


def compile_for_trainium(program: Any, compiler: neuronx.Compiler, question: Any, answer: Answer) -> None:
    """Hands one core's part of a program to AWS's compiler, and notes what it says."""
    module = neuronx.one_core(program.traced, question.devices)
    done = neuronx.compile_module(compiler, module, question.chips.chip.compiler.target)
    made = {"name": program.name, "compile_seconds": done.seconds, "neff_bytes": done.neff_bytes}
    known = {"compiler": f"{neuronx.COMMAND} {compiler.version}"}
    if done.rejected is not None:
        known["rejected"] = done.rejected
    answer.stage(f"compiled {program.name}", programs=[*answer.known["programs"], made], **known)


def _has_kernels(kernels: Any) -> bool:
    """Whether some op is not its reference: its operations are not in the program, then."""
    return any(choice.kernel != "reference" for choice in kernels.choices)


def _plain(name: str, question: Any, mesh: Any) -> Any:
    """The module of the same program made of references, to count its operations."""
    from anypool.check import jobs
    from anypool.ops.kernels import reference

    program = next(p for p in jobs.programs(question, mesh, reference()) if p.name == name)
    return program.traced.lower(lowering_platforms=("cpu",)).compiler_ir("stablehlo")


def find_devices(platform: str, question: Any) -> tuple[list[Any], str]:
    """Devices of the target, present or not, and the compiler with its version."""
    import jax

    if platform in ("cpu", "neuron"):
        # Trainium's program is lowered without its devices, for which those of the host stand in.
        what = f"XLA for CPU, jax {jax.__version__}" if platform == "cpu" else f"lowered by jax {jax.__version__}"
        return jax.devices("cpu")[: question.devices], what
    from jax.experimental import topologies

    if platform == "rocm":
        _register_rocm()
    chip, shape = question.chips.chip, question.chips.topology
    if platform == "tpu":
        name = f"{chip.compiler.target}:{'x'.join(map(str, shape))}"
        options = dict(chip.compiler.options)
        if shape[0] % 2 or shape[1] % 2:
            options["chips_per_host_bounds"] = (1, 1, 1)  # libtpu's own default is a host of 2x2
        topology = topologies.get_topology_desc(name, platform="tpu", **options)
        return list(topology.devices), f"libtpu {_version('libtpu')}"
    from anypool.check.gpu import target_description

    per_host = int(chip.chips_per_host.value) if chip.chips_per_host else question.chips.chips
    each = min(per_host, question.chips.chips)
    topology = topologies.get_topology_desc(
        platform=platform,
        target_config=target_description(chip),
        topology=f"1x{question.chips.chips // each}x{each}",
    )
    package = {"cuda": "jax-cuda12-pjrt", "rocm": "jax-rocm7-pjrt"}[platform]
    stubs = " with stub ROCm libraries" if platform == "rocm" and os.environ.get("ANYPOOL_ROCM_STUBS") else ""
    return list(topology.devices), f"{package} {_version(package)}{stubs}"


def _register_rocm() -> None:
    """The plug-in's own start refuses without a GPU; to compile, it only has to be known by name."""
    import importlib.util

    from jax._src import xla_bridge  # there is no public way to register a plug-in by its file

    spec = importlib.util.find_spec("jax_plugins.xla_rocm7")
    folder = Path(next(iter(spec.submodule_search_locations or []))) if spec else Path()
    xla_bridge.register_plugin(
        "rocm",
        priority=1,
        library_path=str(folder / "xla_rocm_plugin.so"),
        options={"platform_name": "ROCM"},
    )


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def compile_one(program: Any, lowered: Any, question: Any, answer: Answer) -> Any:
    """Compiles a program and notes its memory, traffic and collectives."""
    from anypool.check.hlo import read

    start = time.perf_counter()
    try:
        executable = lowered.compile()
    except Exception as error:  # the compiler's own kinds differ by version
        known = out_of_memory(str(error))
        if known is None:
            raise
        done = {"name": program.name, "compile_seconds": time.perf_counter() - start, **known}
        answer.stage("out of memory", programs=[*answer.known["programs"], done])
        sys.exit(0)
    seconds = time.perf_counter() - start
    answer.stage(f"reading {program.name}")
    memory = executable.memory_analysis()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    program_read = read(executable.as_text(), question.mesh)
    done = {
        "name": program.name,
        "compile_seconds": seconds,
        "memory": sizes,
        "hbm_traffic_bytes": program_read.hbm_bytes,
        "unknown_loops": program_read.unknown_loops,
        "custom_calls": dict(program_read.custom_calls),
        "collectives": [asdict(collective) for collective in program_read.collectives],
    }
    answer.stage(f"compiled {program.name}", programs=[*answer.known["programs"], done])
    return executable


_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def out_of_memory(message: str) -> dict[str, Any] | None:
    """What a compiler says that ran out of device memory: bytes wanted, and bytes there; None for other errors."""
    # Either all that is needed, or, seen early, what the temporaries alone need.
    for pattern, whole in (
        (r"Used ([\d.]+)([KMGT]?)B? of ([\d.]+)([KMGT]?)B? hbm", True),
        (r"\(([\d.]+)([KMGT]?)B?\) exceeds available HBM \(([\d.]+)([KMGT]?)B?\)", False),
    ):
        found = re.search(pattern, message)
        if found:
            used, used_unit, there, there_unit = found.groups()
            wanted = {"wanted": int(float(used) * _UNITS[used_unit]), "there": int(float(there) * _UNITS[there_unit])}
            return {"out_of_memory": wanted | {"whole": whole}, "message": message[:2000]}
    found = re.search(r"(?:Attempting to allocate|Out of memory.*?allocate) ([\d.]+)\s?([KMGT]?)i?B?", message)
    if "RESOURCE_EXHAUSTED" in message and found:
        return {
            "out_of_memory": {
                "wanted": int(float(found.group(1)) * _UNITS[found.group(2)]),
                "there": None,
                "whole": False,
            },
            "message": message[:2000],
        }
    return None


def run_once(executable: Any, arguments: tuple[Any, ...]) -> float:
    """Seconds of the second run of a program on zeros; the first one touches its memory."""
    import jax
    import jax.numpy as jnp

    def value(argument: Any) -> Any:
        if isinstance(argument, jax.ShapeDtypeStruct):
            return jax.device_put(jnp.zeros(argument.shape, argument.dtype), argument.sharding)
        return jax.device_put(argument)

    seconds = 0.0
    for _ in range(2):
        ready = jax.tree.map(value, arguments)
        start = time.perf_counter()
        jax.block_until_ready(executable(*ready))
        seconds = time.perf_counter() - start
    return seconds


if __name__ == "__main__":
    main()
