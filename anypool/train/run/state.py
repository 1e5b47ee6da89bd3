"""The step of a run on a pool, and the state that a run begins with."""

from __future__ import annotations

from typing import Any

import jax

from anypool.models import Checkpoint, ModelConfig, resolve
from anypool.models.params import initial, load, shapes
from anypool.train.defaults import step_defaults, step_kernels
from anypool.train.run.file import RunFile, RunPool
from anypool.train.sharding import make_mesh
from anypool.train.step import StepConfig, TrainState, TrainStep


def make_step(file: RunFile, pool: RunPool, model: ModelConfig) -> TrainStep:
    """The step over all devices of the pool. Raises MeshError if they do not divide the model or the batch."""
    platform = pool.target.chip.jax_platform or "cpu"
    usual = step_defaults(platform)
    config = StepConfig(
        model=model,
        optimizer=file.optimizer,
        compute_dtype=file.compute_dtype,
        z_loss=file.z_loss,
        clip_norm=file.clip_norm,
        remat=pool.remat or usual["remat"],
        layers=pool.layers or usual["layers"],
        lora=file.lora,
    )
    mesh = make_mesh(pool.mesh, jax.devices())
    kernels = step_kernels(platform, model, file.compute_dtype, pool.mesh, file.data.sequence_length)
    return TrainStep(config, mesh, kernels)


def first_state(file: RunFile, step: TrainStep) -> TrainState:
    """The state before the first update: the weights of the model to go on from, or fresh ones from the seed.

    With LoRA, fresh adapters beside the model's weights.
    """
    config = step.config
    if file.model.id is None:
        return step.place(initial(config.specs, file.seed))
    if config.lora is None:
        return step.place(read_weights(file.model.id, config.specs))
    return step.place(initial(config.specs, file.seed), base_weights(file, step))


def base_weights(file: RunFile, step: TrainStep) -> Any:
    """What the adapters of a run with LoRA are beside, on the host."""
    assert file.model.id is not None, "the run file's check asks for a model"
    return read_weights(file.model.id, step.config.model_specs)


def read_weights(id: str, specs: Any) -> Any:
    """A model's weights on the host, in the dtypes of its files. Raises ModelError."""
    checkpoint = Checkpoint.open(resolve(id))
    checkpoint.check(shapes(specs))
    return load(specs, checkpoint, lambda spec, array: array)
