"""The train step: loss, gradient, clip and update as one compiled program.

step = TrainStep(config, mesh, kernels)
state = step.place(params)                       # f32, stacked or per layer as config.layers says
state, metrics = step(state, batch)              # the old state's memory is reused
entropy, tokens = step.evaluate(state, batch)    # sums over a batch, without an update

A run with LoRA has the adapters for parameters, and its base beside them: step.place(adapters, base).

step.lower(rows=16, length=4096, platform="neuron")    # nothing is allocated; devices need not be here
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
from anypool.train.lora import LoraConfig, LoraLinear, adapt
from anypool.train.lora import specs as adapter_specs
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
    lora: trains adapters beside frozen weights; None trains the weights.
    """

    model: ModelConfig
    optimizer: OptimizerConfig
    compute_dtype: str = "bfloat16"
    z_loss: float = 0.0
    clip_norm: float | None = 1.0
    remat: str = "full"
    layers: str = "scan"
    lora: LoraConfig | None = None

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
        """What is trained: the model's parameters, or the adapters of LoRA."""
        return self.model_specs if self.lora is None else adapter_specs(self.model, self.lora, self.layers == "scan")

    @cached_property
    def model_specs(self) -> Decoder:
        """The model's parameters: stacked for a loop over layers, otherwise layer by layer."""
        return specs(Decoder, self.model, stacked=self.layers == "scan")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """step: steps done, those skipped too, int32 (). params, moments: f32; what is trained.

    frozen: the base that adapters of LoRA are beside, its matrices in the compute dtype; None in other runs. No step
    changes or donates it.
    """

    step: Any
    params: Decoder
    moments: Moments
    frozen: Decoder | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Metrics:
    """f32 (). loss: mean cross-entropy of the learned tokens, in nats. z_loss: its mean, already times the coefficient.

    gradient_norm: before clipping. tokens: how many were learned. learning_rate: of this update.
    skipped: 1 if the update was not made, otherwise 0.
    """

    loss: Array
    z_loss: Array
    gradient_norm: Array
    tokens: Array
    learning_rate: Array
    skipped: Array


# A micro-batch  B row  T position  D model width  V vocabulary
@dataclass(frozen=True)
class TrainStep:
    """A train step for a mesh, which may be of devices that are not here."""

    config: StepConfig
    mesh: Mesh
    kernels: Kernels

    def __call__(self, state: TrainState, batch: Batch, skip_norm: Any = math.inf) -> tuple[TrainState, Metrics]:
        """One update. The state is donated, but for what is frozen: its arrays are gone afterwards.

        A step whose loss or gradient norm is not finite, or whose gradient norm is above `skip_norm`, leaves parameters
        and moments as they are in every bit, and only counts. The learning rate and the correction of young moments go
        by the steps done, skipped or not, so that one number says where a run is. After n updates in t steps that
        makes Adam's at most sqrt((1 - beta2^t) / (1 - beta2^n)) times as long as if it had counted updates.

        skip_norm: f32 (); a new value compiles nothing.

        Raises MeshError if the mesh does not divide the model or the batch.
        """
        self._check(*batch.tokens.shape[1:])
        after, metrics = self.compiled(*self.arguments(state, batch, skip_norm))
        return replace(after, frozen=state.frozen), metrics

    def evaluate(self, state: TrainState, batch: Batch) -> tuple[Array, Array]:
        """Sums over a batch's learned tokens of (cross-entropy in nats, their number): f32 (), f32 ().

        Nothing is donated. Raises MeshError if the mesh does not divide the model or the batch.
        """
        self._check(*batch.tokens.shape[1:])
        sums: tuple[Array, Array] = self._evaluated(state.params, state.frozen, batch)
        return sums

    def lower(self, rows: int, length: int, micro_batches: int = 1, platform: str | None = None) -> Any:
        """The step for `micro_batches` times `rows` x `length` tokens, lowered from shapes alone.

        platform: what JAX calls it, for compilers that have no devices here ("neuron"); without it, the mesh's own.

        Raises MeshError if the mesh does not divide the model or the batch.
        """
        self._check(rows, length)
        traced = self.compiled.trace(*self.abstract_arguments(rows, length, micro_batches))
        return traced.lower(lowering_platforms=None if platform is None else (platform,))

    @cached_property
    def compiled(self) -> Any:
        """`run` under jit, with the shardings of its arguments and results."""
        state, frozen, batch, one = self._shardings
        return jax.jit(self.run, in_shardings=(state, frozen, batch, one), out_shardings=(state, one), donate_argnums=0)

    @cached_property
    def _evaluated(self) -> Any:
        state, frozen, batch, one = self._shardings
        return jax.jit(self.losses, in_shardings=(state.params, frozen, batch), out_shardings=(one, one))

    @cached_property
    def _shardings(self) -> tuple[TrainState, Decoder | None, Any, Any]:
        """Of the state, what is frozen, every array of a batch, and single numbers."""

        def one(spec: Spec) -> Any:
            return parameter_sharding(spec, self.mesh)

        alone = replicated(self.mesh)
        return self._states(one, alone), self._frozen(one), batch_sharding(self.mesh), alone

    def arguments(self, state: TrainState, batch: Batch, skip_norm: Any = math.inf) -> tuple[Any, ...]:
        """What `compiled` and `lower(...).compile()` are called with."""
        return replace(state, frozen=None), state.frozen, batch, np.float32(skip_norm)

    def abstract_arguments(self, rows: int, length: int, micro_batches: int = 1) -> tuple[Any, ...]:
        """`arguments` without memory; `rows` are those of one micro-batch."""
        number = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(self.mesh))
        state = self.abstract_state()
        return replace(state, frozen=None), state.frozen, self.abstract_batch(rows, length, micro_batches), number

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""

        def one(spec: Spec) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=parameter_sharding(spec, self.mesh))

        def frozen(spec: Spec) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(spec.shape, self._kind(spec), sharding=parameter_sharding(spec, self.mesh))

        state = self._states(one, jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(self.mesh)))
        return replace(state, frozen=self._frozen(frozen))

    def abstract_batch(self, rows: int, length: int, micro_batches: int = 1) -> Batch:
        """Shapes, dtypes and sharding of a batch; `rows` are those of one micro-batch."""
        return Batch.abstract(micro_batches, rows, length, batch_sharding(self.mesh))

    def place(self, params: Decoder, frozen: Decoder | None = None) -> TrainState:
        """The state before the first update, on the mesh, which may be of several processes.

        Args:
            params: as `config.specs` says, on the host or a device; they are copied. Every process gives the same.
            frozen: as `config.model_specs` says: the base of LoRA.

        Raises TrainError if a base is missing, or there is one and no LoRA.
        """
        if (frozen is None) != (self.config.lora is None):
            raise TrainError(
                "lora is set, and the base is missing: place(adapters, base)"
                if frozen is None
                else "there is a base, and lora is None: set lora in StepConfig, or place(params)"
            )

        def zeros(spec: Spec) -> Array:
            made: Array = jnp.zeros(spec.shape, jnp.float32, device=parameter_sharding(spec, self.mesh))
            return made

        return TrainState(
            step=jnp.zeros((), jnp.int32, device=replicated(self.mesh)),
            params=self._map(lambda spec, param: self._place(spec, param, jnp.dtype(jnp.float32)), params),
            moments=moments(self.config.optimizer, self.config.specs, zeros),
            frozen=self.place_frozen(frozen) if frozen is not None else None,
        )

    def place_frozen(self, base: Decoder) -> Decoder:
        """The base of LoRA on the mesh, its matrices in the compute dtype. base: as `config.model_specs` says."""

        def one(spec: Spec, param: Any) -> Array:
            return self._place(spec, param, self._kind(spec))

        placed: Decoder = jax.tree.map(one, self.config.model_specs, base, is_leaf=_is_spec)
        return placed

    def _place(self, spec: Spec, param: Any, kind: Any) -> Array:
        sharding = parameter_sharding(spec, self.mesh)
        # The step gives its memory away, and the caller's array is not ours to give: each way makes a copy.
        if isinstance(param, Array):
            made: Array = jax.device_put(jnp.array(param, kind, copy=True), sharding)
        else:
            made = jax.make_array_from_callback(spec.shape, sharding, lambda part: np.array(param[part], kind))
        return made

    def run(
        self, state: TrainState, frozen: Decoder | None, batch: Batch, skip_norm: Array
    ) -> tuple[TrainState, Metrics]:
        """One update, as a pure function. state: without what is frozen."""
        config = self.config
        tokens = jnp.maximum(jnp.sum(batch.weights), 1.0)
        gradients, (entropy, z) = self._gradients(self._cast(state.params), frozen, batch, tokens)
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradients)))
        # Comparisons with NaN are false.
        made = (jnp.abs(entropy + z) < jnp.inf) & (norm < jnp.inf) & (norm <= skip_norm)
        if config.clip_norm is not None:
            scale = jnp.minimum(config.clip_norm / (norm + 1e-6), 1.0)
            gradients = jax.tree.map(lambda g: g * scale, gradients)
        params, after = update(config.optimizer, config.specs, state.step, state.params, gradients, state.moments, made)
        rate = config.optimizer.schedule(state.step)
        skipped = 1 - made.astype(jnp.float32)
        metrics = Metrics(entropy / tokens, z / tokens, norm, jnp.sum(batch.weights), rate, skipped)
        return TrainState(state.step + 1, params, after), metrics

    def losses(self, params: Decoder, frozen: Decoder | None, batch: Batch) -> tuple[Array, Array]:
        """Sums over one batch's learned tokens of (cross-entropy, their number), without a gradient: f32 (), f32 ()."""
        weights = self._whole(self._cast(params), frozen)

        def one(sums: tuple[Array, Array], micro: Batch) -> tuple[tuple[Array, Array], None]:
            _, (entropy, _) = self._objective(weights, micro)
            return (sums[0] + entropy, sums[1] + jnp.sum(micro.weights)), None

        (entropy, tokens), _ = jax.lax.scan(one, (jnp.float32(0), jnp.float32(0)), batch)
        return entropy, tokens

    def _gradients(
        self, weights: Decoder, frozen: Decoder | None, batch: Batch, tokens: Array
    ) -> tuple[Decoder, tuple[Array, Array]]:
        """f32 gradients of the mean objective over all micro-batches, and the sums of its parts."""

        def objective(weights: Decoder, micro: Batch) -> tuple[Array, Any]:
            whole, parts = self._objective(self._whole(weights, frozen), micro)
            return whole / tokens, parts

        differentiate = jax.value_and_grad(objective, has_aux=True)

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
        if config.lora is not None:
            kernels = replace(kernels, linear=LoraLinear(kernels.linear, config.lora.scale))
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
            self.kernels,
        )

    def _cast(self, params: Decoder) -> Decoder:
        """Matrices in the compute dtype, divided as they are, so that what is gathered later is already small."""
        return self._constrain(self._map(lambda spec, w: w.astype(self._kind(spec)), params))

    def _kind(self, spec: Spec) -> Any:
        # Vectors stay f32: their gradients are sums over all tokens, which bf16 would spoil.
        return jnp.dtype(self.config.compute_dtype if is_matrix(spec) else jnp.float32)

    def _whole(self, weights: Decoder, frozen: Decoder | None) -> Decoder:
        """The model's weights as its forward pass takes them."""
        return weights if frozen is None else adapt(frozen, weights)

    def _constrain(self, tree: Decoder) -> Decoder:
        if self.mesh.size == 1:
            return tree
        return self._map(lambda s, x: jax.lax.with_sharding_constraint(x, parameter_sharding(s, self.mesh)), tree)

    def _map(self, function: Callable[[Spec, Any], Any], tree: Decoder) -> Decoder:
        mapped: Decoder = jax.tree.map(function, self.config.specs, tree, is_leaf=_is_spec)
        return mapped

    def _states(self, make: Callable[[Spec], Any], step: Any) -> TrainState:
        """A state, but for what is frozen, with `make(spec)` for every array."""
        return TrainState(step, each(self.config.specs, make), moments(self.config.optimizer, self.config.specs, make))

    def _frozen(self, make: Callable[[Spec], Any]) -> Decoder | None:
        return None if self.config.lora is None else each(self.config.model_specs, make)

    def _check(self, rows: int, length: int) -> None:
        if length > self.config.model.max_position:
            raise TrainError(
                f"the sequence length {length} is more than max_position_embeddings {self.config.model.max_position}"
            )
        check_divides(self.config.model, self.mesh, rows, length)


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, Spec)
