"""Run by test_hosts.py, once for each of two processes: prints what this one finds as JSON.

    python -m tests.train.on_two_hosts MESH RANK PROCESS ADDRESS

Each has two devices and reads only its own rows; RANK is that of LoRA, 0 without. See `three_steps`.
"""

import json
import sys
from typing import Any

import jax

from anypool.models.params import initial
from anypool.ops.kernels import reference
from anypool.train import Batch, LoraConfig, MeshShape, TrainStep, make_mesh, place_batch, rows_here
from tests.train.conftest import packed_rows, step_config

ROWS, MICRO_BATCHES = 16, 2


def three_steps(step: TrainStep) -> dict[str, Any]:
    """Three steps and an evaluation on packed rows, of which this process reads as many as it has to."""
    config, mine = step.config, rows_here(step.mesh, ROWS, MICRO_BATCHES)

    def batch(seed: int) -> Batch:
        rows = {name: array[mine] for name, array in packed_rows(rows=ROWS, seed=seed).items()}
        return place_batch(step.mesh, Batch.from_rows(**rows, micro_batches=MICRO_BATCHES), ROWS)

    base = None if config.lora is None else initial(config.model_specs, seed=0)
    state, losses = step.place(initial(config.specs, seed=0), base), []
    for seed in range(3):
        state, metrics = step(state, batch(seed))
        losses.append(float(metrics.loss))
    entropy, tokens = step.evaluate(state, batch(3))
    held = sum(shard.data.size for leaf in jax.tree.leaves(state.params) for shard in leaf.addressable_shards)
    return {
        "losses": losses,
        "evaluated": float(entropy) / float(tokens),
        "rows": [mine.start, mine.stop],
        "held": held,
    }


def main(mesh: str, rank: int, process: int, address: str) -> None:
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, 2, process)
    config = step_config(lora=LoraConfig(rank=rank) if rank else None)
    print(json.dumps(three_steps(TrainStep(config, make_mesh(MeshShape.parse(mesh)), reference()))))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
