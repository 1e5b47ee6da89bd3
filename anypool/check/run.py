"""Asks every question of a check, several at once, and tries what would make fit what does not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from anypool.check import compilers
from anypool.check.errors import CheckError
from anypool.check.judge import estimate, judge, unanswered
from anypool.check.memory import predict
from anypool.check.options import Options, capacity, device_count, question, read_model, tensor_divides, worker
from anypool.check.processes import Limits, Outcome, ask, available_bytes, stop_all
from anypool.check.question import Question
from anypool.check.result import Result
from anypool.chips import Target, TargetError, parse_targets
from anypool.paths import cache_dir
from anypool.train import MeshError, TrainError
from anypool.train.remat import KEPT

MOST_TRIES = 3
WORTH_TRYING = 1.1
"""A change is compiled only if its predicted memory is below this times the device's."""

Report = Callable[[str, str], None]
"""Called with (target and job, what is done next)."""


@dataclass(frozen=True)
class Running:
    """How a check is run. parallel: processes at once. seconds, memory_bytes: of each. suggest: try what would fit."""

    parallel: int
    seconds: float
    memory_bytes: int
    suggest: bool = True
    cache: bool = True

    @classmethod
    def make(
        cls, memory_gib: float | None, parallel: int | None, seconds: float, suggest: bool, cache: bool
    ) -> Running:
        """With what this machine has: two processes at most unless asked, and four fifths of its free memory."""
        whole = int(memory_gib * 2**30) if memory_gib else min(available_bytes() * 4 // 5, 16 * 2**30)
        processes = parallel or max(1, min(2, os.cpu_count() or 1, whole // (3 * 2**30)))
        return cls(processes, seconds, whole // processes, suggest, cache)


def check(
    model: str, targets: str, options: Options, running: Running, report: Report = lambda *_: None
) -> tuple[str, list[Result]]:
    """The model's name, and a result for every target and job, in the order asked.

    Raises TargetError, ModelError, CheckError or MeshError for a question that makes no sense.
    """
    name, config = read_model(model)
    asked = [(target, job) for target in parse_targets(targets) for job in options.jobs]
    # Every question is made before the first is asked: a mistake is reported at once.
    questions = [_question(config, target, job, options, alone=len(asked) == 1) for target, job in asked]
    with ThreadPoolExecutor(running.parallel) as pool:
        futures = [
            pool.submit(_result, made, target, job, running, report)
            for (target, job), made in zip(asked, questions, strict=True)
        ]
        try:
            return name, [future.result() for future in futures]
        except BaseException:  # Ctrl-C above all: nobody waits for what is still being compiled
            pool.shutdown(wait=False, cancel_futures=True)
            stop_all()
            raise


def _question(config: dict[str, Any], target: Target, job: str, options: Options, alone: bool) -> Question | str:
    """The question, or why this target cannot be asked it while others can."""
    try:
        return question(config, target, job, options)
    except (MeshError, TrainError) as error:
        # A mesh that fits one target need not fit another.
        if alone:
            raise
        return str(error)


def _result(made: Question | str, target: Target, job: str, running: Running, report: Report) -> Result:
    label = f"{target} {job}"
    if isinstance(made, str):
        return replace(unanswered(target, job, made, "not lowered"), verdict="rejected")
    result = answer(made, target, running, lambda stage: report(label, stage))
    if result.verdict == "does_not_fit" and running.suggest:
        result = replace(result, change=find_change(made, target, running, lambda stage: report(label, stage)))
    report(label, result.verdict)
    return result


def answer(made: Question, target: Target, running: Running, stage: Callable[[str], None]) -> Result:
    """One question's result, from the cache if it was asked before."""
    platform = target.chip.jax_platform
    if platform is None:
        return estimate(made, target)
    try:
        home = compilers.find(platform)
        host = available_bytes()
        if platform == "cpu" and (lacking := _too_large_here(made, host)):
            return replace(_predicted(made, target, host), reason=lacking)
        key = made.key(f"{home.name} {platform}")
        file = cache_dir() / "check" / f"{key}.json"
        known = _cached(file) if running.cache else None
        if known is not None:
            outcome = Outcome(known, None, 0.0, 0, file.with_suffix(".log"))
            return replace(judge(made, target, outcome, platform, home.name, host), cached=True)
        outcome = ask(made, home, Limits(running.seconds, running.memory_bytes), key, stage)
    except CheckError as error:
        return unanswered(target, made.job, str(error))
    if outcome.failure is None and running.cache:
        _keep(file, outcome.answer)
    return judge(made, target, outcome, platform, home.name, host)


def _too_large_here(made: Question, host_bytes: int) -> str | None:
    """A step for the CPU is run, so it has to fit this machine: all its devices share one memory."""
    wanted = sum(predict(made).values()) * made.devices
    if wanted <= host_bytes:
        return None
    return f"not run: it needs about {wanted / 2**30:.1f} GiB and this machine has {host_bytes / 2**30:.1f} GiB free"


def _predicted(made: Question, target: Target, host_bytes: int) -> Result:
    outcome = Outcome({"programs": []}, None, 0.0, 0, Path(os.devnull))
    result = judge(made, target, outcome, "cpu", "", host_bytes)
    return replace(result, proof="predicted, not compiled", verdict="does_not_fit", log=None)


def _cached(file: Path) -> dict[str, Any] | None:
    try:
        known: dict[str, Any] = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return known


def _keep(file: Path, known: dict[str, Any]) -> None:
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(known))
    temporary.replace(file)


def find_change(
    made: Question, target: Target, running: Running, stage: Callable[[str], None]
) -> dict[str, Any] | None:
    """The nearest change with which the job fits, compiled (or linted) to be sure; None if the first few do not."""
    tries = 0
    for what, candidate, wider in changes(made, target):
        room = capacity(wider.chip)
        if room is not None and sum(predict(candidate).values()) > WORTH_TRYING * room:
            continue
        tries += 1
        if tries > MOST_TRIES:
            break
        stage(f"trying {what}")
        result = answer(candidate, wider, running, stage)
        if result.verdict == "fits":
            return {
                "what": what,
                "target": str(wider),
                "mesh": candidate.mesh,
                "proof": result.proof,
                "hbm_bytes_per_device": result.hbm_bytes_per_device,
                "seconds_per_step": result.seconds_per_step,
            }
    return None


def changes(made: Question, target: Target) -> Iterator[tuple[str, Question, Target]]:
    """What could make a job fit, the smallest change first: settings, then the mesh, the batch, more chips."""
    if made.job == "train":
        yield from _training_changes(made, target)
    else:
        yield from _serving_changes(made, target)


def _training_changes(made: Question, target: Target) -> Iterator[tuple[str, Question, Target]]:
    policies = list(KEPT)
    for policy in policies[policies.index(made.remat) + 1 :]:
        yield f"--remat {policy}", replace(made, remat=policy), target
    rows = made.mesh["data"] * made.mesh["fsdp"]
    most = made.batch // rows
    if made.micro_batches < most:
        yield f"--micro-batches {most}", replace(made, micro_batches=most), target
    for mesh in _meshes(made):
        rows = mesh["data"] * mesh["fsdp"]
        if made.batch % rows == 0:
            candidate = replace(made, mesh=mesh, micro_batches=made.batch // rows)
            yield f"--mesh {candidate.mesh_text()}", candidate, target
    if made.batch > rows:
        yield f"--batch {rows}", replace(made, batch=rows, micro_batches=1), target
    yield from _more_chips(made, target)


def _meshes(made: Question) -> Iterator[dict[str, int]]:
    """Other meshes of as many devices that divide parameters further, or rows less."""
    model, devices = made.model, made.devices
    for tensor in (1, 2, 4, 8):
        rest = devices // tensor
        if devices % tensor or model.hidden_size % rest or not tensor_divides(model, tensor) or made.seq % tensor:
            continue
        mesh = {"data": 1, "fsdp": rest, "sequence": 1, "tensor": tensor}
        if mesh != made.mesh:
            yield mesh


def _serving_changes(made: Question, target: Target) -> Iterator[tuple[str, Question, Target]]:
    tensor = made.mesh.get("tensor", 1)
    devices = device_count(target)
    for wider in range(tensor + 1, devices + 1):
        if devices % wider == 0 and tensor_divides(made.model, wider):
            yield f"--mesh tensor={wider}", worker(made, target, wider), target
    streams = made.batch
    while streams > 1:
        streams //= 2
        yield f"--batch {streams}", worker(replace(made, batch=streams), target, tensor), target
    yield from _more_chips(made, target)


def _more_chips(made: Question, target: Target) -> Iterator[tuple[str, Question, Target]]:
    """The same job on larger topologies of the chip, each about twice the one before."""
    config, chips = made.config, target.chips
    options = Options((made.job,), seq=made.seq, dtype=made.dtype, optimizer=made.optimizer, remat=made.remat)
    while chips < 4096:
        chips *= 2
        shape = target.chip.topology.near(chips)
        if shape is None:
            return
        larger = Target(target.chip, shape)
        if larger.chips <= target.chips:
            return
        try:
            yield f"--on {larger}", question(config, larger, made.job, options), larger
        except (MeshError, TrainError, TargetError):
            continue
