"""The compiled CPU kernels that have a gradient, as implementations of the ops of a training step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.ffi
import jax.numpy as jnp
import numpy as np
from jax import Array

from anypool.ops.cpu.calls import MAX_HEAD_DIM, RmsNormCpu, SiluMulCpu, only_f32
from anypool.ops.linear import LinearReference


# B batch  T query position  S key position  N query head  K key-value head  H head width
# D input width  O output width  V vocabulary
@dataclass(frozen=True)
class LinearTrain(LinearReference):
    """x @ w.T with w as (O, D), and both its gradients, without transposing anything in memory."""

    name: str = "cpu"

    def refuses(self, dtype: jnp.dtype, head_dim: int) -> str | None:
        return only_f32(dtype)

    def apply(self, x_D: Array, *weights: Any) -> tuple[Array, ...]:
        return tuple(_project(x_D, w) for w in weights)

    def logits(self, x_D: Array, weight: Any) -> Array:
        return _project(x_D, weight)

    def logits_back(self, bar_V: Array, x_D: Array, weight: Any) -> tuple[Array, Array]:
        return _project_backward((x_D, weight), bar_V)


def _multiply(a: Array, b: Array, a_by_columns: bool = False, b_by_columns: bool = False) -> Array:
    """a (M, K), or (K, M) if by columns, times b (K, N), or (N, K) if by columns: (M, N)."""
    shape = (a.shape[1 if a_by_columns else 0], b.shape[0 if b_by_columns else 1])
    call = jax.ffi.ffi_call("anypool_multiply", jax.ShapeDtypeStruct(shape, jnp.float32))
    product: Array = call(a, b, a_by_columns=a_by_columns, b_by_columns=b_by_columns)
    return product


@jax.custom_vjp
def _project(x_D: Array, w_OD: Array) -> Array:
    out = _multiply(x_D.reshape(-1, x_D.shape[-1]), w_OD, b_by_columns=True)
    return out.reshape(*x_D.shape[:-1], len(w_OD))


def _project_forward(x_D: Array, w_OD: Array) -> tuple[Array, tuple[Array, Array]]:
    return _project(x_D, w_OD), (x_D, w_OD)


def _project_backward(kept: tuple[Array, Array], bar_O: Array) -> tuple[Array, Array]:
    x_D, w_OD = kept
    bar = bar_O.reshape(-1, len(w_OD))
    w_bar = _multiply(bar, x_D.reshape(-1, x_D.shape[-1]), a_by_columns=True)
    return _multiply(bar, w_OD).reshape(x_D.shape), w_bar


_project.defvjp(_project_forward, _project_backward)


@dataclass(frozen=True)
class PackedAttentionCpu:
    """Attention within packed sequences, a tile of queries at a time; on the way back it scores again.

    Its memory grows with the length. What it is given and gives is as of `PackedAttentionReference`.
    """

    name: str = "cpu"

    def refuses(self, dtype: jnp.dtype, head_dim: int) -> str | None:
        if head_dim % 16 or head_dim > MAX_HEAD_DIM:
            return f"head_dim {head_dim} is not a multiple of 16 up to {MAX_HEAD_DIM}"
        return only_f32(dtype)

    def __call__(
        self,
        q_BTNH: Array,
        k_BSKH: Array,
        v_BSKH: Array,
        q_segments_BT: Array,
        q_positions_BT: Array,
        k_segments_BS: Array,
        k_positions_BS: Array,
        window: int | None,
        scale: float,
    ) -> Array:
        places = (q_segments_BT, q_positions_BT, k_segments_BS, k_positions_BS)
        return _attend(window, scale, q_BTNH, k_BSKH, v_BSKH, *(x.astype(jnp.int32) for x in places))


def _attributes(window: int | None, scale: float) -> dict[str, Any]:
    return {"scale": np.float32(scale), "window": np.int64(window or 0)}


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(window: int | None, scale: float, q_BTNH: Array, *others: Array) -> Array:
    return _attend_forward(window, scale, q_BTNH, *others)[0]


def _attend_forward(window: int | None, scale: float, q_BTNH: Array, *others: Array) -> tuple[Array, tuple[Array, ...]]:
    B, T, N, _ = q_BTNH.shape
    results = (_like(q_BTNH), jax.ShapeDtypeStruct((B, N, T), jnp.float32))
    call = jax.ffi.ffi_call("anypool_packed_attention", results)
    out, peaks = call(q_BTNH, *others, **_attributes(window, scale))
    return out, (q_BTNH, *others, out, peaks)


def _attend_backward(window: int | None, scale: float, kept: tuple[Array, ...], out_bar: Array) -> tuple[Any, ...]:
    q_BTNH, k_BSKH, v_BSKH = kept[:3]
    call = jax.ffi.ffi_call("anypool_packed_attention_back", (_like(q_BTNH), _like(k_BSKH), _like(v_BSKH)))
    return (*call(*kept, out_bar, **_attributes(window, scale)), None, None, None, None)


_attend.defvjp(_attend_forward, _attend_backward)


@dataclass(frozen=True)
class RmsNormTrain(RmsNormCpu):
    """The norm with a gradient; it keeps what it was given, and nothing else."""

    def __call__(self, x_D: Array, scale_D: Array, eps: float) -> Array:
        return _norm(eps, x_D, scale_D)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(eps: float, x_D: Array, scale_D: Array) -> Array:
    return RmsNormCpu()(x_D, scale_D, eps)


def _norm_forward(eps: float, x_D: Array, scale_D: Array) -> tuple[Array, tuple[Array, Array]]:
    return _norm(eps, x_D, scale_D), (x_D, scale_D)


def _norm_backward(eps: float, kept: tuple[Array, Array], bar_D: Array) -> tuple[Array, Array]:
    x_D, scale_D = kept
    call = jax.ffi.ffi_call("anypool_rms_norm_back", (_like(x_D), _like(scale_D)))
    x_bar, scale_bar = call(x_D, scale_D, bar_D, eps=np.float32(eps))
    return x_bar, scale_bar


_norm.defvjp(_norm_forward, _norm_backward)


@dataclass(frozen=True)
class SiluMulTrain(SiluMulCpu):
    """The gate with a gradient; it keeps what it was given, and nothing else."""

    def __call__(self, gate: Array, up: Array) -> Array:
        return _silu_mul(gate, up)


@jax.custom_vjp
def _silu_mul(gate: Array, up: Array) -> Array:
    return SiluMulCpu()(gate, up)


def _silu_mul_forward(gate: Array, up: Array) -> tuple[Array, tuple[Array, Array]]:
    return _silu_mul(gate, up), (gate, up)


def _silu_mul_backward(kept: tuple[Array, Array], bar: Array) -> tuple[Array, Array]:
    gate, up = kept
    gate_bar, up_bar = jax.ffi.ffi_call("anypool_silu_mul_back", (_like(gate), _like(up)))(gate, up, bar)
    return gate_bar, up_bar


_silu_mul.defvjp(_silu_mul_forward, _silu_mul_backward)


@dataclass(frozen=True)
class CrossEntropyCpu:
    """A token's logits are read once; their gradient takes their place."""

    name: str = "cpu"

    def refuses(self, dtype: jnp.dtype, head_dim: int) -> str | None:
        return only_f32(dtype)

    def __call__(self, logits_V: Array, targets: Array, weights: Array, z_loss: float) -> tuple[Array, Array, Array]:
        logits_TV = logits_V.reshape(-1, logits_V.shape[-1])
        of_token = jax.ShapeDtypeStruct(logits_TV.shape[:1], jnp.float32)
        results = (_like(logits_TV), of_token, of_token)
        call = jax.ffi.ffi_call("anypool_cross_entropy", results, input_output_aliases={0: 0})
        bar_TV, entropy_T, z_T = call(
            logits_TV, targets.reshape(-1).astype(jnp.int32), weights.reshape(-1), c=np.float32(z_loss)
        )
        return jnp.sum(entropy_T), jnp.sum(z_T), bar_TV.reshape(logits_V.shape)


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


TRAINING: dict[str, Any] = {
    "linear": LinearTrain(),
    "rms_norm": RmsNormTrain(),
    "silu_mul": SiluMulTrain(),
    "packed_attention": PackedAttentionCpu(),
    "cross_entropy": CrossEntropyCpu(),
}
