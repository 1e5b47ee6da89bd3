"""Checkpoints against the disk they are on: bytes a second of save and restore, and what a save costs the steps.

    python benchmarks/checkpoint.py [--width 512 --layers 8] [--folder DIR] [--format json]

A small model's step runs on the CPU. Plain rows write and read the same bytes as one file. A store does not wait for
the disk when an object is written; the rows "to the disk" do (fsync, sync). Reads are of pages that the system was
asked to forget (POSIX_FADV_DONTNEED).
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from anypool.models import ModelConfig, RopeConfig
from anypool.models.params import initial
from anypool.ops.kernels import reference
from anypool.store import Store
from anypool.train import Batch, OptimizerConfig, Schedule, StepConfig, TrainState, TrainStep, single_device
from anypool.train.checkpoint import CheckpointInfo, Checkpoints, Policy, Verify

VERIFY: tuple[Verify, ...] = ("full", "read")
PIECE_BYTES = 8 * 1024 * 1024


def make_step(width: int, layers: int) -> TrainStep:
    model = ModelConfig(
        model_type="llama", vocab_size=16384, hidden_size=width, intermediate_size=4 * width, num_layers=layers,
        num_heads=width // 64, num_kv_heads=width // 64, head_dim=64, max_position=2048, rms_norm_eps=1e-5,
        rope=RopeConfig(),
    )  # fmt: skip
    optimizer = OptimizerConfig(Schedule(1e-3, 1000))
    config = StepConfig(model, optimizer, compute_dtype="float32", layers="unrolled", remat="none")
    return TrainStep(config, single_device(), reference())


def seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def plain_write(path: Path, pieces: list[memoryview], sync: bool) -> None:
    with path.open("wb", buffering=0) as file:
        for piece in pieces:
            file.write(piece)
        if sync:
            os.fsync(file.fileno())


def plain_read(path: Path, buffer: bytearray) -> None:
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def forget(folder: Path) -> None:
    """Have the system drop the pages of all files from memory; they must have been written to the disk."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_rates(
    saver: Checkpoints, step: TrainStep, state: TrainState, folder: Path, rounds: int
) -> list[dict[str, Any]]:
    """Writing and reading the state, each the best of the rounds: what the disk can do, not what else it did."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    source = memoryview(np.random.default_rng(0).bytes(PIECE_BYTES))
    pieces = [source] * (size // PIECE_BYTES) + [source[: size % PIECE_BYTES]]
    path, buffer = folder / "plain", bytearray(PIECE_BYTES)
    specs, abstract = step.config.specs, step.abstract_state()
    updates = int(state.step)
    best: dict[str, float] = {}

    def time_of(name: str, call: Callable[[], Any]) -> None:
        best[name] = min(best.get(name, float("inf")), seconds(call))

    def save(sync: bool) -> None:
        saver.save(state, specs, step=updates, epoch=1)
        saver.wait()
        if sync:
            os.sync()

    def restore(info: CheckpointInfo, verify: Verify) -> None:
        jax.block_until_ready(saver.restore(info, abstract, specs, verify=verify))

    for _ in range(rounds):
        for sync in (False, True):
            suffix = ", to the disk" if sync else ""
            path.unlink(missing_ok=True)
            os.sync()
            time_of(f"plain write{suffix}", partial(plain_write, path, pieces, sync))
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            os.sync()
            time_of(f"save{suffix}", partial(save, sync))
        (info,) = saver.committed()
        forget(folder)
        time_of("plain read", lambda: plain_read(path, buffer))
        for verify in VERIFY:
            forget(folder)
            time_of(f"restore, verify={verify}", partial(restore, info, verify))
    return [
        {"what": name, "seconds": round(took, 3), "mb_per_second": round(size / took / 1e6)}
        for name, took in best.items()
    ]


def stall(saver: Checkpoints, step: TrainStep, state: TrainState, batch: Batch, steps: int) -> dict[str, Any]:
    """Steps alone, the stop while the state is copied, and the steps while the save goes on."""

    def run() -> float:
        nonlocal state

        def one() -> None:
            nonlocal state
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics.loss)

        return seconds(one)

    run()
    alone = [run() for _ in range(steps)]
    pending = saver.save(state, step.config.specs, step=int(state.step), epoch=2)
    beside = []
    while not pending.done:
        beside.append(run())
    saver.wait()
    return {
        "step_seconds": round(statistics.median(alone), 3),
        "stall_seconds": round(pending.stall_seconds, 3),
        "steps_beside_the_save": len(beside),
        "step_seconds_beside_the_save": round(statistics.median(beside), 3) if beside else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512, help="of the model; a multiple of 64")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; a temporary one if left out")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    arguments = parser.parse_args()
    step = make_step(arguments.width, arguments.layers)
    rows, length = 2, 128
    generator = np.random.default_rng(0)
    batch = Batch.from_rows(
        tokens_RT=generator.integers(0, step.config.model.vocab_size, (rows, length)),
        segments_RT=np.ones((rows, length), np.int32),
        learned_RT=np.ones((rows, length), bool),
        micro_batches=1,
    )
    state = step.place(initial(step.config.specs, seed=0))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        files = {"config.json": json.dumps(step.config.model.to_hf()).encode()}
        saver = Checkpoints(Store.open(name), files, Policy(keep_last=None))
        found: dict[str, Any] = {"state_mb": round(sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6)}
        found["disk"] = disk_rates(saver, step, state, folder, arguments.rounds)
        found["training"] = stall(saver, step, state, batch, arguments.steps)
        saver.close()
    if arguments.format == "json":
        print(json.dumps(found, indent=2))
        return
    print(f"state of {found['state_mb']} MB, {os.cpu_count()} cores")
    print(f"{'':28}  {'seconds':>8}  {'MB/s':>6}")
    for row in found["disk"]:
        print(f"{row['what']:28}  {row['seconds']:8}  {row['mb_per_second']:6}")
    for what, value in found["training"].items():
        print(f"{what.replace('_', ' '):28}  {value!s:>8}")


if __name__ == "__main__":
    main()
