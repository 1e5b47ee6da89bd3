"""The programs of a job, from shapes alone: no weight is read, nothing is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from anypool.check.question import Question
from anypool.engine.batch import LEAST_EDITS
from anypool.engine.runner import step_logits
from anypool.models.decoder import Decoder
from anypool.models.params import Spec, each, specs
from anypool.ops import Kernels, choose
from anypool.ops.divided import DividedPagedAttention
from anypool.ops.paged_attention import BLOCK
from anypool.ops.sampling import Sampler, SamplingRows, sample
from anypool.train import MeshShape, OptimizerConfig, Schedule, StepConfig, TrainStep, make_mesh
from anypool.train.defaults import step_kernels
from anypool.train.sharding import check_divides, parameter_sharding


@dataclass(frozen=True)
class JobProgram:
    """One program of a job: its name, `jax.jit(...)` traced, and its arguments as shapes (or arrays, where need be)."""

    name: str
    traced: Any
    arguments: tuple[Any, ...]


def kernels_for(question: Question, platform: str) -> Kernels:
    """The kernels that a worker or a run takes on this platform, by name, without looking at the machine."""
    model = question.model
    if question.job == "train":
        return step_kernels(platform, model, question.dtype, MeshShape(**question.mesh), question.seq)
    tensor = question.mesh.get("tensor", 1)
    return choose(
        platform,
        jnp.dtype(question.dtype),
        model.head_dim,
        # The CPU's own kernels hold weights in packed panels that one device reads; over a mesh the references serve.
        faster=platform != "cpu" or question.devices == 1,
        heads=model.num_heads // tensor,
        kv_heads=model.num_kv_heads // tensor,
        window=model.sliding_window,
    )


def mesh_for(question: Question, devices: Sequence[Any]) -> Mesh:
    """The mesh of a question over the devices of its target. Raises MeshError if it does not divide the model."""
    mesh = make_mesh(MeshShape(**question.mesh), devices)
    rows = question.batch // question.micro_batches
    if question.job == "train":
        check_divides(question.model, mesh, rows, question.seq)
    else:
        # Streams of a worker are not divided, only heads, MLP and vocabulary.
        check_divides(question.model, mesh, mesh.size, mesh.size)
    return mesh


def programs(question: Question, mesh: Mesh, kernels: Kernels) -> list[JobProgram]:
    """What a job compiles, the largest first."""
    if question.job == "train":
        return [train_step(question, mesh, kernels)]
    return [serving_step(question, mesh, kernels), sampler(question, mesh)]


def train_config(question: Question) -> StepConfig:
    """The training step's own settings."""
    schedule = Schedule(peak=3e-4, total_steps=10_000, warmup_steps=100)
    return StepConfig(
        model=question.model,
        optimizer=OptimizerConfig(schedule, kind=question.optimizer),
        compute_dtype=question.dtype,
        remat=question.remat,
    )


def train_step(question: Question, mesh: Mesh, kernels: Kernels) -> JobProgram:
    """One update: loss, gradient, clip and optimizer."""
    step = TrainStep(train_config(question), mesh, kernels)
    rows = question.batch // question.micro_batches
    arguments = step.abstract_arguments(rows, question.seq, question.micro_batches)
    return JobProgram("train_step", step.compiled.trace(*arguments), arguments)


def serving_step(question: Question, mesh: Mesh, kernels: Kernels) -> JobProgram:
    """The engine's step: rows of one token each (decode), or tiles of 16 prompt tokens (prefill)."""
    config = question.model
    blocks = -(-question.seq // BLOCK)
    decode = question.batch if question.job == "decode" else 0
    tiles = 0 if decode else question.batch * -(-question.chunk // BLOCK)
    rows, tokens = decode + tiles, decode + tiles * BLOCK
    one = NamedSharding(mesh, PartitionSpec())
    attention = DividedPagedAttention(kernels.paged_attention, mesh)
    if mesh.size > 1 and attention.name != "reference":
        # A compiler divides plain operations by itself; a kernel's it leaves whole.
        kernels = replace(kernels, paged_attention=attention)
    cache_shape = attention.cache_shape(question.batch * blocks + 1, config.num_kv_heads, config.head_dim)
    cache_sharding = NamedSharding(mesh, attention.cache_spec())
    cache = jax.ShapeDtypeStruct(cache_shape, jnp.dtype(question.dtype), sharding=cache_sharding)

    def i32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=one)

    function = partial(step_logits, decode=decode, config=config, kernels=kernels)
    caches = (cache,) * config.num_layers
    jitted = jax.jit(function, donate_argnums=1, out_shardings=(one, (cache_sharding,) * config.num_layers))
    arrays = (i32(tokens), i32(rows), i32(rows), i32(rows, blocks), i32(question.batch))
    arguments = (parameters(question, mesh, kernels), caches, *arrays)
    return JobProgram(f"{question.job}_step", jitted.trace(*arguments), arguments)


def parameters(question: Question, mesh: Mesh, kernels: Kernels) -> Decoder:
    """A worker's weights: shapes, dtype and sharding."""

    def one(spec: Spec) -> Any:
        if kernels.linear.name != "reference" and len(spec.shape) == 2:
            # A layout of the kernel's own, which only packing something can tell.
            return kernels.linear.pack(np.zeros(spec.shape, jnp.dtype(question.dtype)))
        return jax.ShapeDtypeStruct(spec.shape, jnp.dtype(question.dtype), sharding=parameter_sharding(spec, mesh))

    return each(specs(Decoder, question.model), one)


def sampler(question: Question, mesh: Mesh) -> JobProgram:
    """The draw of the next tokens, with filters and penalties."""
    one = NamedSharding(mesh, PartitionSpec())
    rows = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one),
        SamplingRows.neutral(question.batch, LEAST_EDITS),
    )
    scores = jax.ShapeDtypeStruct((question.batch, question.model.vocab_size), jnp.float32, sharding=one)
    wanted = Sampler(draw=True, filters=True, edits=LEAST_EDITS)
    return JobProgram("sample", jax.jit(partial(sample, sampler=wanted)).trace(scores, rows), (scores, rows))
