"""The train step: loss, gradient, clip and update as one compiled program.

step = TrainStep(config, mesh, kernels)
state = step.place(params)                       # f32, stacked or per layer as config.layers says
state, metrics = step(state, batch)              # the old state's memory is reused

step.lower(rows=16, length=4096, platform="neuron")    # nothing is allocated; devices need not be here
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from anypool.models import ModelConfig
from anypool.models.decoder import Decoder, forward
from anypool.models.params import Spec, each, specs
from anypool.ops import Kernels
from anypool.train import remat
from anypool.train.batch import Batch
from anypool.train.embedding import ShardedLinear
from anypool.train.errors import TrainError
from anypool.train.loss import chunks_for, cross_entropy
from anypool.train.optimizer import Moments, OptimizerConfig, is_matrix, moments, update
from anypool.train.sharding import (
    ROWS,
    PackedAttend,
    Sharder,
    batch_sharding,
    check_divides,
    parameter_sharding,
    replicated,
)

LAYERS = ("scan", "unrolled")
COMPUTE_DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class StepConfig:
    """What decides the compiled program, but for the mesh, the kernels and the shape of the batch.

    compute_dtype: of matrices and activations; master weights, moments, norms, biases and sums are f32.
    z_loss: its coefficient; 0 leaves it out.
    clip_norm: gradients of a larger global norm are scaled down to it; None leaves them as they are.
    remat: a policy of `remat.KEPT`.
    layers: scan loops over stacked layers (compiles once for all, what accelerators want); unrolled writes them out.
    """

    model: ModelConfig
    optimizer: OptimizerConfig
    compute_dtype: str = "bfloat16"
    z_loss: float = 0.0
    clip_norm: float | None = 1.0
    remat: str = "full"
    layers: str = "scan"

    def __post_init__(self) -> None:
        remat.check_policy(self.remat)
        if self.layers not in LAYERS:
            raise TrainError(f"layers is {self.layers!r}; there are {', '.join(LAYERS)}")
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise TrainError(f"compute_dtype is {self.compute_dtype!r}; there are {', '.join(COMPUTE_DTYPES)}")
        if not self.z_loss >= 0:
            raise TrainError(f"z_loss is {self.z_loss}; a number of at least 0 is expected")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise TrainError(f"clip_norm is {self.clip_norm}; a number above 0 is expected")

    @cached_property
    def specs(self) -> Decoder:
        """Declared parameters: stacked for a loop over layers, otherwise layer by layer."""
        return specs(Decoder, self.model, stacked=self.layers == "scan")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step changes. step: updates done, int32 (). params, moments: f32."""

    step: Any
    params: Decoder
    moments: Moments


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Metrics:
    """f32 (). loss: mean cross-entropy of the learned tokens, in nats. z_loss: its mean, already times the coefficient.

    gradient_norm: before clipping. tokens: how many were learned. learning_rate: of this update.
    """

    loss: Array
    z_loss: Array
    gradient_norm: Array
    tokens: Array
    learning_rate: Array


# A micro-batch  B row  T position  D model width  V vocabulary
@dataclass(frozen=True)
class TrainStep:
    """A train step for a mesh, which may be of devices that are not here."""

    config: StepConfig
    mesh: Mesh
    kernels: Kernels

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update. The state is donated: its arrays are gone afterwards.

        Raises MeshError if the mesh does not divide the model or the batch.
        """
        self._check(*batch.tokens.shape[1:])
        after: tuple[TrainState, Metrics] = self.compiled(state, batch)
        return after

    def lower(self, rows: int, length: int, micro_batches: int = 1, platform: str | None = None) -> Any:
        """The step for `micro_batches` times `rows` x `length` tokens, lowered from shapes alone.

        platform: what JAX calls it, for compilers that have no devices here ("neuron"); without it, the mesh's own.

        Raises MeshError if the mesh does not divide the model or the batch.
        """
        self._check(rows, length)
        traced = self.compiled.trace(self.abstract_state(), self.abstract_batch(rows, length, micro_batches))
        return traced.lower(lowering_platforms=None if platform is None else (platform,))

    @cached_property
    def compiled(self) -> Any:
        """`run` under jit, with the shardings of its arguments and results."""
        shardings = self._states(lambda spec: parameter_sharding(spec, self.mesh), replicated(self.mesh))
        return jax.jit(
            self.run,
            in_shardings=(shardings, batch_sharding(self.mesh)),
            out_shardings=(shardings, replicated(self.mesh)),
            donate_argnums=0,
        )

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""

        def one(spec: Spec) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=parameter_sharding(spec, self.mesh))

        return self._states(one, jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(self.mesh)))

    def abstract_batch(self, rows: int, length: int, micro_batches: int = 1) -> Batch:
        """Shapes, dtypes and sharding of a batch; `rows` are those of one micro-batch."""
        return Batch.abstract(micro_batches, rows, length, batch_sharding(self.mesh))

    def place(self, params: Decoder) -> TrainState:
        """The state before the first update, on the mesh. params: f32, on the host or a device; they are copied."""

        def zeros(spec: Spec) -> Array:
            made: Array = jnp.zeros(spec.shape, jnp.float32, device=parameter_sharding(spec, self.mesh))
            return made

        def copy(spec: Spec, param: Any) -> Array:
            # The step gives its memory away, and the caller's array is not ours to give.
            made: Array = jax.device_put(jnp.array(param, jnp.float32, copy=True), parameter_sharding(spec, self.mesh))
            return made

        return TrainState(
            step=jnp.zeros((), jnp.int32, device=replicated(self.mesh)),
            params=jax.tree.map(copy, self.config.specs, params, is_leaf=lambda x: isinstance(x, Spec)),
            moments=moments(self.config.optimizer, self.config.specs, zeros),
        )

    def run(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """One update, as a pure function."""
        config = self.config
        tokens = jnp.maximum(jnp.sum(batch.weights), 1.0)
        gradients, (entropy, z) = self._gradients(self._cast(state.params), batch, tokens)
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradients)))
        if config.clip_norm is not None:
            scale = jnp.minimum(config.clip_norm / (norm + 1e-6), 1.0)
            gradients = jax.tree.map(lambda g: g * scale, gradients)
        params, after = update(config.optimizer, config.specs, state.step, state.params, gradients, state.moments)
        rate = config.optimizer.schedule(state.step)
        metrics = Metrics(entropy / tokens, z / tokens, norm, jnp.sum(batch.weights), rate)
        return TrainState(state.step + 1, params, after), metrics

    def losses(self, params: Decoder, batch: Batch) -> tuple[Array, Array]:
        """Sums over one batch's learned tokens of (cross-entropy, their number), without a gradient: f32 (), f32 ()."""
        weights = self._cast(params)

        def one(sums: tuple[Array, Array], micro: Batch) -> tuple[tuple[Array, Array], None]:
            _, (entropy, _) = self._objective(weights, micro)
            return (sums[0] + entropy, sums[1] + jnp.sum(micro.weights)), None

        (entropy, tokens), _ = jax.lax.scan(one, (jnp.float32(0), jnp.float32(0)), batch)
        return entropy, tokens

    def _gradients(self, weights: Decoder, batch: Batch, tokens: Array) -> tuple[Decoder, tuple[Array, Array]]:
        """f32 gradients of the mean objective over all micro-batches, and the sums of its parts."""
        differentiate = jax.value_and_grad(lambda w, micro: _over(self._objective(w, micro), tokens), has_aux=True)

        def one(weights: Decoder, micro: Batch) -> tuple[Decoder, tuple[Array, Array]]:
            (_, parts), gradients = differentiate(weights, micro)
            return self._constrain(jax.tree.map(lambda g: g.astype(jnp.float32), gradients)), parts

        if batch.tokens.shape[0] == 1:
            return one(weights, jax.tree.map(lambda x: x[0], batch))

        def add(sums: Any, micro: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, one(weights, micro)), None

        zeros = self._constrain(jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights))
        sums: tuple[Decoder, tuple[Array, Array]]
        sums, _ = jax.lax.scan(add, (zeros, (jnp.float32(0), jnp.float32(0))), batch)
        return sums

    def _objective(self, weights: Decoder, micro: Batch) -> tuple[Array, tuple[Array, Array]]:
        """Sums over the tokens of a micro-batch, whose arrays are (B, T): what is minimised, and its two parts."""
        config, model, mesh = self.config, self.config.model, self.mesh.shape
        mark, kernels = Sharder(self.mesh), self.kernels
        if self.mesh.size > 1:
            kernels = replace(kernels, linear=ShardedLinear(kernels.linear, self.mesh))
        looped = config.layers == "scan"
        hidden, _ = forward(
            weights,
            micro.tokens,
            micro.positions,
            None if looped else (None,) * model.num_layers,
            (micro.segments, micro.positions),
            PackedAttend(kernels.packed_attention, model.sliding_window, self.mesh),
            model,
            kernels,
            mark,
            remat.wrapper(config.remat, looped),
        )
        rows, length = micro.tokens.shape
        chunks = chunks_for(
            rows // (mesh["data"] * mesh["fsdp"]), length // mesh["sequence"], model.vocab_size // mesh["tensor"]
        )
        return cross_entropy(
            mark.constrain(hidden, ROWS, ("sequence",), None),
            weights.embed if weights.head is None else weights.head,
            micro.targets,
            micro.weights,
            config.z_loss,
            chunks,
            mesh["sequence"],
            lambda logits: mark.constrain(logits, ROWS, ("sequence",), None, ("tensor",)),
        )

    def _cast(self, params: Decoder) -> Decoder:
        """Matrices in the compute dtype, divided as they are, so that what is gathered later is already small."""
        kind = jnp.dtype(self.config.compute_dtype)
        # Vectors stay f32: their gradients are sums over all tokens, which bf16 would spoil.
        cast = self._map(lambda spec, w: w.astype(kind) if is_matrix(spec) else w, params)
        return self._constrain(cast)

    def _constrain(self, tree: Decoder) -> Decoder:
        if self.mesh.size == 1:
            return tree
        return self._map(lambda s, x: jax.lax.with_sharding_constraint(x, parameter_sharding(s, self.mesh)), tree)

    def _map(self, function: Callable[[Spec, Any], Any], tree: Decoder) -> Decoder:
        mapped: Decoder = jax.tree.map(function, self.config.specs, tree, is_leaf=lambda x: isinstance(x, Spec))
        return mapped

    def _states(self, make: Callable[[Spec], Any], step: Any) -> TrainState:
        return TrainState(step, each(self.config.specs, make), moments(self.config.optimizer, self.config.specs, make))

    def _check(self, rows: int, length: int) -> None:
        if length > self.config.model.max_position:
            raise TrainError(
                f"the sequence length {length} is more than max_position_embeddings {self.config.model.max_position}"
            )
        check_divides(self.config.model, self.mesh, rows, length)


def _over(objective: tuple[Array, Any], tokens: Array) -> tuple[Array, Any]:
    return objective[0] / tokens, objective[1]
