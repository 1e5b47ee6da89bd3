"""`anypool drill train`: trainers lost in every way, runs that go on elsewhere, and what it cost them.

One run that nothing happens to, and for every fault one that it happens to, with the same seed: the same samples in the
same order. Pools are this machine's CPU, as four devices (a, and c of the same shape) and as two (b).
"""

from __future__ import annotations

import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from anypool.drills import zombie
from anypool.drills.training import EVERY_STEPS, DrillError, DrillRun
from anypool.measure.report import circumstances
from anypool.store import Entry
from anypool.train.checkpoint import Checkpoints

LOSS_TOLERANCE = 1e-4
"""Of the final loss, relative to the unbroken run's, in f32 on other meshes. On the same mesh it is bit-equal."""
THROTTLE_SECONDS = 0.05
"""After each step, so that there is a step to be killed in."""
SMALL_FILE_BYTES = 64 * 1024
"""What a disk that is full still takes: heartbeats, and no checkpoint."""


@dataclass
class Takeover:
    """One pool lost, or left on purpose: then nothing was detected. Seconds."""

    fault: str
    on: str
    to: str
    steps_redone: int
    detect_seconds: float | None
    restore_seconds: float
    first_step_seconds: float


@dataclass
class Finding:
    """What one fault did to its run."""

    fault: str
    takeovers: list[Takeover] = field(default_factory=list)
    samples_repeated: int = 0
    samples_skipped: int = 0
    fenced_commits: int = 0
    commits_failed: int = 0
    loss_difference: float = 0.0
    largest_difference: float = 0.0
    bit_equal: bool | None = None
    note: str = ""

    @property
    def clean(self) -> bool:
        lost = self.samples_repeated or self.samples_skipped or self.fenced_commits
        return not lost and self.loss_difference <= LOSS_TOLERANCE and self.bit_equal is not False


def run(*, seed: int, faults: Sequence[str] | None, steps: int, format: str, folder: Path | None = None) -> int:
    """Makes the drill and prints what it saw; 1 if anything was lost, repeated or computed otherwise, else 0.

    folder: where the runs are, left there; None for a temporary one. Raises DrillError.
    """
    chosen = list(faults or FAULTS)
    for fault in chosen:
        if fault not in FAULTS:
            raise DrillError(f"fault {fault!r} is unknown; there are {', '.join(FAULTS)}")
    if steps < 4 * EVERY_STEPS:
        raise DrillError(f"steps = {steps}: at least {4 * EVERY_STEPS}, or there is no room for a fault")
    where, began = circumstances(), time.monotonic()
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="anypool-drill-") as made:
            findings = _drill(Path(made), seed, chosen, steps)
    else:
        findings = _drill(folder, seed, chosen, steps)
    document = summary(findings) | {
        "faults": [vars(one) | {"takeovers": [vars(t) for t in one.takeovers]} for one in findings],
        "seed": seed,
        "steps": steps,
        "seconds": round(time.monotonic() - began, 1),
        **where,
    }
    print(json.dumps(document, indent=2)) if format == "json" else _print_tables(document)
    return 0 if all(one.clean for one in findings) else 1


def summary(findings: Sequence[Finding]) -> dict[str, Any]:
    """The worst of everything over all faults."""
    takeovers = [takeover for one in findings for takeover in one.takeovers]

    def largest(name: str) -> float | None:
        known = [value for takeover in takeovers if (value := getattr(takeover, name)) is not None]
        return max(known, default=None)

    return {
        **{name: largest(name) for name in ("detect_seconds", "restore_seconds", "first_step_seconds", "steps_redone")},
        **{
            name: sum(getattr(one, name) for one in findings)
            for name in ("samples_repeated", "samples_skipped", "fenced_commits")
        },
        "loss_difference": max(one.loss_difference for one in findings),
    }


def _drill(folder: Path, seed: int, faults: Sequence[str], steps: int) -> list[Finding]:
    rng = random.Random(seed)
    say(f"unbroken run of {steps} steps")
    unbroken = DrillRun(folder, "unbroken", steps=steps, seed=seed, pools="a", throttle=0.0)
    try:
        unbroken.start()
        unbroken.finish()
    finally:
        unbroken.stop()
    findings = []
    for fault in faults:
        say(f"fault: {fault}")
        pools = "ac" if fault == "same-mesh" else "ab"
        broken = DrillRun(folder, fault, steps=steps, seed=seed, pools=pools, throttle=THROTTLE_SECONDS)
        finding = Finding(fault)
        try:
            FAULTS[fault](broken, rng, finding)
            broken.finish()
        finally:
            broken.stop()
        _compare(unbroken, broken, finding)
        findings.append(finding)
    return findings


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _a_step(rng: random.Random, run: DrillRun) -> int:
    """A step to be killed in: some commits after the beginning, some steps before the end, not at a commit."""
    choice = [n for n in range(2 * EVERY_STEPS + 1, run.file.steps - EVERY_STEPS) if n % EVERY_STEPS]
    return rng.choice(choice)


def _takeover(run: DrillRun, finding: Finding, on: str, to: str, at: float, left: int, lost: bool) -> None:
    """Waits until the next pool has made a step. at: when the fault was made. left: the last step that was made."""
    detected = run.wait("lost")["at"] if lost else None
    starting = run.wait("starting")
    if starting["pool"] != to:
        raise DrillError(f"run {run.file.name}: went on at {starting['pool']}, not at {to}")
    restored = run.wait("restored")
    first = run.wait("step")
    began = at if detected is None else detected
    finding.takeovers.append(
        Takeover(
            fault=finding.fault,
            on=on,
            to=to,
            steps_redone=max(0, left - restored["step"]),
            detect_seconds=None if detected is None else round(detected - at, 4),
            restore_seconds=round(restored["seconds"], 4),
            first_step_seconds=round(first["received"] - began, 3),
        )
    )


def _last_step(run: DrillRun) -> int:
    """The last step that the newest trainer has said."""
    steps = [(event["epoch"], event["step"]) for event in list(run.seen) if event["event"] == "step"]
    return max(steps, default=(0, 0))[1]


def _kill_at_a_step(run: DrillRun, rng: random.Random, finding: Finding, to: str) -> None:
    step = _a_step(rng, run)
    run.start()
    run.wait("step", lambda event: event["step"] >= step)
    at = run.kill()
    _takeover(run, finding, "a", to, at, _last_step(run), lost=True)


def _move(run: DrillRun, rng: random.Random, finding: Finding) -> None:
    """Killed at a random step on a, on at b, and back to a on purpose."""
    _kill_at_a_step(run, rng, finding, "b")
    moved_at = run.wait("step")["step"] + 1
    run.wait("step", lambda event: event["step"] >= moved_at)
    at = time.monotonic()
    run.controller.asked.move_to = "a"
    ended = run.wait("ended")
    if ended["how"] != "moved":
        raise DrillError(f"run {run.file.name}: asked to move, it ended as {ended['how']}: {ended['reason']}")
    _takeover(run, finding, "b", "a", at, _last_step(run), lost=False)


def _checkpoint(run: DrillRun, rng: random.Random, finding: Finding) -> None:
    """Killed while a checkpoint is being written."""
    first = EVERY_STEPS * rng.randint(2, run.file.steps // EVERY_STEPS - 2)
    run.start()
    saving = run.wait("saving", lambda event: event["step"] >= first)
    at = run.kill()
    _takeover(run, finding, "a", "b", at, _last_step(run), lost=True)
    redone = finding.takeovers[0].steps_redone
    finding.note = (
        "the checkpoint was not committed" if redone >= EVERY_STEPS else "the checkpoint was committed in time"
    )
    finding.note += f" (step {saving['step']})"


def _same_mesh(run: DrillRun, rng: random.Random, finding: Finding) -> None:
    """Killed at a random step on a, on at another pool of the same shape."""
    _kill_at_a_step(run, rng, finding, "c")


def _torn(run: DrillRun, rng: random.Random, finding: Finding) -> None:
    """Killed, with a checkpoint beside the last commit that is half there: a shard cut short, no manifest."""
    step = _a_step(rng, run)
    run.start()
    run.wait("step", lambda event: event["step"] >= step)
    at = run.kill()
    left = _last_step(run)
    last = Checkpoints(run.store, None).latest()
    assert last is not None, "two commits were made before"
    torn = f"checkpoints/step-{left:08d}-e1"
    for entry in run.store.at(last.folder).list():
        data = run.store.at(last.folder).get(entry.key)
        if entry.key != "manifest.json":
            run.store.put(f"{torn}/{entry.key}", data[: len(data) // 2] if _is_shard(entry) else data)
    _takeover(run, finding, "a", "b", at, left, lost=True)
    finding.note = f"{torn} was passed over"


def _corrupt(run: DrillRun, rng: random.Random, finding: Finding) -> None:
    """Killed, and a byte of the last commit is another: the commit before it is taken."""
    step = _a_step(rng, run)
    run.start()
    run.wait("step", lambda event: event["step"] >= step)
    _wait_for_commits(run, 2)
    at = run.kill()
    left = _last_step(run)
    last = Checkpoints(run.store, None).latest()
    assert last is not None, "two commits were made before"
    below = run.store.at(last.folder)
    shard = rng.choice([entry for entry in below.list() if _is_shard(entry)])
    data = bytearray(below.get(shard.key))
    data[rng.randrange(len(data) // 2, len(data))] ^= 0x10
    below.put(shard.key, bytes(data))
    _takeover(run, finding, "a", "b", at, left, lost=True)
    found = [event for event in list(run.seen) if event["event"] == "corrupt"]
    if not found:
        raise DrillError(f"run {run.file.name}: {last.folder}/{shard.key} is damaged, and was restored")
    finding.note = f"{last.folder}/{shard.key} was refused by its hash"


def _full(run: DrillRun, rng: random.Random, finding: Finding) -> None:
    """The disk takes no checkpoint for a while: training goes on, and commits again once there is room."""
    step = _a_step(rng, run)
    run.start()
    run.wait("step", lambda event: event["step"] >= min(step, run.file.steps - 3 * EVERY_STEPS))
    assert run.controller.trainer is not None
    pid = run.controller.trainer.pid
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (SMALL_FILE_BYTES, resource.RLIM_INFINITY))
    failed = run.wait("commit_failed")
    resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
    committed = run.wait("committed")
    finding.commits_failed = sum(event["event"] == "commit_failed" for event in list(run.seen))
    finding.note = f"refused up to step {failed['step']}, committed again at step {committed['step']}"


def _zombie(run: DrillRun, rng: random.Random, finding: Finding) -> None:
    """A trainer that is stopped while it saves, replaced, and wakes up when another has long gone on."""
    first = EVERY_STEPS * rng.randint(2, run.file.steps // EVERY_STEPS - 3)
    run.prepare()
    with zombie.stopped_while_saving(run, "a", first) as sleeper:
        at = time.monotonic()
        run.start("b", fence=True)
        _takeover(run, finding, "a", "b", at, sleeper.last_step, lost=False)
        run.wait("committed")
        before = sleeper.commits()
        sleeper.wake()
        finding.note = f"it ended {sleeper.ended()}"
        run.finish()
        finding.fenced_commits = len(sleeper.commits() - before)


def _wait_for_commits(run: DrillRun, count: int) -> None:
    while sum(event["event"] == "committed" for event in list(run.seen)) < count:
        run.wait("committed")


def _is_shard(entry: Entry) -> bool:
    return entry.key.startswith("model") and entry.key.endswith(".safetensors")


Fault = Callable[[DrillRun, random.Random, Finding], None]

FAULTS: dict[str, Fault] = {
    "move": _move,
    "same-mesh": _same_mesh,
    "checkpoint": _checkpoint,
    "zombie": _zombie,
    "torn": _torn,
    "full": _full,
    "corrupt": _corrupt,
}


def _compare(unbroken: DrillRun, broken: DrillRun, finding: Finding) -> None:
    """Samples, losses and, where the mesh did not change, every bit of the last checkpoint."""
    wanted, found = unbroken.samples(), dict(broken.samples())
    if finding.fault == "zombie":
        found = {step: found.get(step, ids) for step, ids in wanted.items()}  # the sleeper's steps were seen elsewhere
    flat = [sample for step in sorted(found) for sample in found[step]]
    finding.samples_repeated = len(flat) - len(set(flat))
    finding.samples_skipped = len({sample for ids in wanted.values() for sample in ids} - set(flat))
    if found != wanted and not (finding.samples_repeated or finding.samples_skipped):
        raise DrillError(f"run {broken.file.name}: the same samples, at other steps")
    ours, theirs = broken.losses(), unbroken.losses()
    if sorted(ours) != sorted(theirs):
        raise DrillError(f"run {broken.file.name}: has losses of {len(ours)} steps, not of {len(theirs)}")
    differences = {step: abs(ours[step] - theirs[step]) / abs(theirs[step]) for step in theirs}
    finding.loss_difference = differences[max(differences)]
    finding.largest_difference = max(differences.values())
    if finding.fault in ("same-mesh", "full"):
        finding.bit_equal = unbroken.weights() == broken.weights()


def _print_tables(document: dict[str, Any]) -> None:
    console = Console()
    table = Table("fault", "from", "to", "detected, s", "restored in, s", "first step, s", "steps redone")
    for one in document["faults"]:
        for t in one["takeovers"]:
            detected = "on purpose" if t["detect_seconds"] is None else f"{t['detect_seconds']:.3f}"
            first, restored = f"{t['first_step_seconds']:.2f}", f"{t['restore_seconds']:.3f}"
            table.add_row(one["fault"], t["on"], t["to"], detected, restored, first, str(t["steps_redone"]))
    console.print(table)
    table = Table("fault", "repeated", "skipped", "fenced commits", "loss difference", "bit-equal", "note")
    for one in document["faults"]:
        equal = {None: "other mesh", True: "yes", False: "NO"}[one["bit_equal"]]
        counts = [str(one[name]) for name in ("samples_repeated", "samples_skipped", "fenced_commits")]
        table.add_row(one["fault"], *counts, f"{one['loss_difference']:.1e}", equal, one["note"])
    console.print(table)


__all__ = ["FAULTS", "Finding", "Takeover", "run", "summary"]
