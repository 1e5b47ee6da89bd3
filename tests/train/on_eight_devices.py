"""Run by test_sharding.py in a process of its own, which has eight devices: prints what it finds as JSON.

For every mesh the first moments after one step, compared with one device's, and the losses of three steps. For one of
them also the step as Trainium would get it.
"""

import json
import sys

import jax
import numpy as np

from anypool.models.params import initial
from anypool.ops.kernels import reference
from anypool.train import Batch, MeshShape, TrainStep, make_mesh, place_batch
from tests.train.conftest import packed_rows, step_config

MESHES = ("", "data=2,fsdp=4", "fsdp=2,sequence=2,tensor=2")


def main() -> None:
    jax.config.update("jax_disable_most_optimizations", True)
    config = step_config()
    params = initial(config.specs, seed=0)
    found = {}
    alone: list[np.ndarray] = []
    for text in MESHES:
        shape = MeshShape.parse(text)
        step = TrainStep(config, make_mesh(shape, jax.devices()[: shape.devices]), reference())
        compiled = step.lower(rows=8, length=32, micro_batches=2).compile()
        state, losses = step.place(params), []
        moments: list[np.ndarray] = []
        held = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state))
        for i in range(3):
            batch = place_batch(step.mesh, Batch.from_rows(**packed_rows(rows=16, seed=i), micro_batches=2), rows=16)
            state, metrics = compiled(*step.arguments(state, batch))
            losses.append(float(metrics.loss))
            moments = moments or [np.asarray(leaf) for leaf in jax.tree.leaves(state.moments.mu)]
        alone = alone or moments
        errors = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(moments, alone, strict=True)]
        found[text] = {"losses": losses, "error": float(max(errors)), "held": held}
    lowered = step.lower(rows=8, length=32, micro_batches=2, platform="neuron").as_text()
    json.dump({"meshes": found, "neuron": lowered}, sys.stdout)


if __name__ == "__main__":
    main()
