"""Learning rates, AdamW and Muon.

The arithmetic is optax's; its state is kept in two trees like the parameters', so that it is sharded, named and stored
as they are. Nothing here branches on data.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from optax.contrib import MuonDimensionNumbers, MuonState, scale_by_muon

from anypool.models.decoder import Decoder
from anypool.models.params import Spec, each
from anypool.train.errors import TrainError

SCHEDULES = ("cosine", "linear", "wsd", "constant")
OPTIMIZERS = ("adamw", "muon")

MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024
MUON_UPDATE_RMS = 0.2


@dataclass(frozen=True)
class Schedule:
    """The learning rate at every step: linear warm-up, then a decay from `peak` to `final_fraction` of it.

    cosine, linear: the decay takes all steps after the warm-up (Loshchilov and Hutter 2017; linear).
    wsd: warm-up, stable, and a linear decay over the last `decay_steps` (Hu et al. 2024).
    constant: no decay.
    """

    peak: float
    total_steps: int
    kind: str = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0
    final_fraction: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise TrainError(f"schedule is {self.kind!r}; there are {', '.join(SCHEDULES)}")
        if not self.peak > 0:
            raise TrainError(f"the peak learning rate is {self.peak}; a number above 0 is expected")
        if not 0 <= self.final_fraction <= 1:
            raise TrainError(f"final_fraction is {self.final_fraction}; a number from 0 to 1 is expected")
        if self.total_steps < 1:
            raise TrainError(f"total_steps is {self.total_steps}; at least 1 is expected")
        if min(self.warmup_steps, self.decay_steps) < 0 or self.warmup_steps + self.decay_steps > self.total_steps:
            raise TrainError(
                f"warmup_steps {self.warmup_steps} and decay_steps {self.decay_steps} do not fit into "
                f"total_steps {self.total_steps}"
            )
        if (self.kind == "wsd") != (self.decay_steps > 0):
            raise TrainError(
                f"decay_steps is {self.decay_steps} with schedule {self.kind!r}; it belongs to 'wsd', which needs it"
            )

    def __call__(self, step: Array) -> Array:
        """The rate for the update that follows `step` updates: int () -> f32 ()."""
        done = step.astype(jnp.float32)
        span = self.decay_steps if self.kind == "wsd" else self.total_steps - self.warmup_steps
        # 0 before the decay begins, 1 from its end on.
        decayed = jnp.clip((done - (self.total_steps - span)) / max(span, 1), 0.0, 1.0)
        if self.kind == "constant":
            left = jnp.float32(1.0)
        elif self.kind == "cosine":
            left = 0.5 * (1 + jnp.cos(jnp.pi * decayed))
        else:
            left = 1 - decayed
        rate = self.peak * (self.final_fraction + (1 - self.final_fraction) * left)
        warm = jnp.minimum((done + 1) / self.warmup_steps, 1.0) if self.warmup_steps else 1.0
        return jnp.asarray(rate * warm, jnp.float32)


@dataclass(frozen=True)
class OptimizerConfig:
    """adamw: Loshchilov and Hutter 2019. muon: Jordan et al. 2024 for the matrices of the layers, AdamW for the rest.

    Muon's updates are scaled by 0.2 sqrt(larger side) (Liu et al. 2025), so that AdamW's learning rate and decay serve.

    weight_decay: decoupled, times the learning rate; of matrices and the embedding, not of norms and biases.
    """

    schedule: Schedule
    kind: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    momentum: float = 0.95  # of Muon

    def __post_init__(self) -> None:
        if self.kind not in OPTIMIZERS:
            raise TrainError(f"optimizer is {self.kind!r}; there are {', '.join(OPTIMIZERS)}")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise TrainError(f"{name} is {getattr(self, name)}; a number from 0 to below 1 is expected")
        for name in ("eps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise TrainError(f"{name} is {getattr(self, name)}; a number of at least 0 is expected")

    def is_muon(self, spec: Spec) -> bool:
        """Whether a parameter is updated by Muon."""
        return self.kind == "muon" and is_matrix(spec) and "vocab" not in spec.axes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Moments:
    """What the optimizer remembers, in f32. mu: mean of gradients; nu: of their squares, None where Muon updates."""

    mu: Decoder
    nu: Decoder


def is_matrix(spec: Spec) -> bool:
    """Whether a parameter is a matrix, or a stack of matrices."""
    return len([axis for axis in spec.axes if axis != "layers"]) == 2


def moments(config: OptimizerConfig, tree: Decoder, make: Any) -> Moments:
    """The moments of a tree of specs, each made by `make(spec)`."""
    return Moments(mu=each(tree, make), nu=each(tree, lambda spec: None if config.is_muon(spec) else make(spec)))


def update(
    config: OptimizerConfig,
    tree: Decoder,
    step: Array,
    params: Decoder,
    gradients: Decoder,
    state: Moments,
    made: Array,
) -> tuple[Decoder, Moments]:
    """Parameters and moments after one update.

    Args:
        tree: the specs.
        step: steps done so far, int32 ().
        made: bool (); False leaves all as it is, in every bit, whatever is in the gradients.
    """
    rate = config.schedule(step)

    def one(spec: Spec, param: Array, gradient: Array, mu: Array, nu: Array | None) -> _Updated:
        if nu is None:
            direction, mu = _muon(config, step, gradient, mu, made)
        else:
            direction, mu, nu = _adam(config, step, gradient, mu, nu, made)
        if is_matrix(spec):
            direction = direction + config.weight_decay * param
        return _Updated(jnp.where(made, param - rate * direction, param), mu, nu)

    updated = jax.tree.map(one, tree, params, gradients, state.mu, state.nu, is_leaf=lambda x: isinstance(x, Spec))

    def part(name: str) -> Decoder:
        taken: Decoder = jax.tree.map(attrgetter(name), updated)
        return taken

    return part("param"), Moments(mu=part("mu"), nu=part("nu"))


@dataclass(frozen=True)
class _Updated:
    param: Array
    mu: Array
    nu: Array | None


# Moments are chosen before they are used: the direction then needs no other than those that are kept, and the compiler
# writes them over the old ones. Chosen and not multiplied by 0, which would keep a NaN.


def _adam(
    config: OptimizerConfig, step: Array, gradient: Array, mu: Array, nu: Array, made: Array
) -> tuple[Array, Array, Array]:
    mu = jnp.where(made, optax.tree.update_moment(gradient, mu, config.beta1, 1), mu)
    nu = jnp.where(made, optax.tree.update_moment_per_elem_norm(gradient, nu, config.beta2, 2), nu)
    mean = optax.tree.bias_correction(mu, config.beta1, step + 1)
    square = optax.tree.bias_correction(nu, config.beta2, step + 1)
    return mean / (jnp.sqrt(square) + config.eps), mu, nu


def _muon(config: OptimizerConfig, step: Array, gradient: Array, mu: Array, made: Array) -> tuple[Array, Array]:
    beta = config.momentum
    mu = jnp.where(made, optax.tree.update_moment(gradient, mu, beta, 1), mu)
    # Nesterov's look ahead, as optax has it.
    ahead = optax.tree.bias_correction(mu, beta, step + 2)
    ahead = beta * ahead + (1 - beta) * optax.tree.bias_correction(gradient, beta, step + 1)
    # Weights are (out, in); what precedes is a stack of layers, each made orthogonal by itself.
    axes = MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
    # Without momentum of its own, which is above.
    rule = scale_by_muon(MUON_COEFFICIENTS, beta=0.0, nesterov=False, weight_dimension_numbers=axes)
    state = MuonState(count=step, mu=ahead, ns_coeffs=jnp.asarray(MUON_COEFFICIENTS))
    direction, _ = rule.update(ahead, state)
    return direction * (MUON_UPDATE_RMS * max(gradient.shape[-2:]) ** 0.5), mu
