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


# B batch  T query position  S key position  N query head  K key-value head  H head width  D model width
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


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


TRAINING: dict[str, Any] = {
    "rms_norm": RmsNormTrain(),
    "silu_mul": SiluMulTrain(),
    "packed_attention": PackedAttentionCpu(),
}
