"""The compiled CPU kernels as implementations of the ops."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.ffi
import jax.numpy as jnp
import numpy as np
from jax import Array

from anypool.ops.paged_attention import BLOCK

PANEL = 32
"""Output columns stored together in a packed weight (kPanel in kernels.cc)."""
MAX_HEAD_DIM = 256


def only_f32(dtype: jnp.dtype) -> str | None:
    """Why a kernel cannot compute in `dtype`, or None."""
    return None if dtype == jnp.float32 else f"the CPU kernels compute in float32, not {dtype}"


@partial(jax.tree_util.register_dataclass, data_fields=["panels"], meta_fields=["width"])
@dataclass(frozen=True)
class PackedWeight:
    """A weight (O, D) as panels of 32 outputs, (ceil(O / 32), D, 32), zero-padded."""

    panels: Any
    width: int


@dataclass(frozen=True)
class LinearCpu:
    """x @ w.T by register tiles over packed panels, all weights of one input in one call."""

    name: str = "cpu"

    def refuses(self, dtype: jnp.dtype, head_dim: int) -> str | None:
        return only_f32(dtype)

    def pack(self, w_OD: np.ndarray) -> PackedWeight:
        outputs, depth = w_OD.shape
        count = -(-outputs // PANEL)
        padded = np.zeros((count * PANEL, depth), np.float32)
        padded[:outputs] = w_OD
        return PackedWeight(np.ascontiguousarray(padded.reshape(count, PANEL, depth).transpose(0, 2, 1)), outputs)

    def apply(self, x_D: Array, *weights: PackedWeight) -> tuple[Array, ...]:
        lead = x_D.shape[:-1]
        x_TD = x_D.reshape(-1, x_D.shape[-1])
        outputs = [jax.ShapeDtypeStruct((x_TD.shape[0], w.width), jnp.float32) for w in weights]
        results = jax.ffi.ffi_call("anypool_linear", outputs)(x_TD, *(w.panels for w in weights))
        return tuple(y.reshape(*lead, w.width) for y, w in zip(results, weights, strict=True))

    def logits(self, x_D: Array, weight: PackedWeight) -> Array:
        return self.apply(x_D, weight)[0]

    def embed(self, table: PackedWeight, ids: Array) -> Array:
        ids = jnp.clip(ids, 0, table.width - 1)
        rows: Array = table.panels.at[ids // PANEL, :, ids % PANEL].get(mode="promise_in_bounds")
        return rows


@dataclass(frozen=True)
class RmsNormCpu:
    name: str = "cpu"

    def refuses(self, dtype: jnp.dtype, head_dim: int) -> str | None:
        return only_f32(dtype)

    def __call__(self, x_D: Array, scale_D: Array, eps: float) -> Array:
        result = jax.ShapeDtypeStruct(x_D.shape, x_D.dtype)
        normed: Array = jax.ffi.ffi_call("anypool_rms_norm", result)(x_D, scale_D, eps=np.float32(eps))
        return normed


@dataclass(frozen=True)
class SiluMulCpu:
    name: str = "cpu"

    def refuses(self, dtype: jnp.dtype, head_dim: int) -> str | None:
        return only_f32(dtype)

    def __call__(self, gate: Array, up: Array) -> Array:
        product: Array = jax.ffi.ffi_call("anypool_silu_mul", jax.ShapeDtypeStruct(gate.shape, gate.dtype))(gate, up)
        return product


@dataclass(frozen=True)
class PagedAttentionCpu:
    """Reads the live context of each row in place; the table's width costs nothing."""

    name: str = "cpu"
    bounded_by_table: bool = False

    def refuses(self, dtype: jnp.dtype, head_dim: int) -> str | None:
        if head_dim % 16 or head_dim > MAX_HEAD_DIM:
            return f"head_dim {head_dim} is not a multiple of 16 up to {MAX_HEAD_DIM}"
        return only_f32(dtype)

    def cache_shape(self, blocks: int, kv_heads: int, head_dim: int) -> tuple[int, ...]:
        return (blocks, kv_heads, 2, BLOCK * head_dim)

    def new_cache(self, blocks: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> Array:
        shape = jax.ShapeDtypeStruct(self.cache_shape(blocks, kv_heads, head_dim), dtype)
        cache: Array = jax.jit(jax.ffi.ffi_call("anypool_blank", shape))()
        return cache

    def apply(
        self,
        q_TNH: Array,
        k_TKH: Array,
        v_TKH: Array,
        cache: Array,
        start_R: Array,
        count_R: Array,
        table_RM: Array,
        decode: int,
        scale: float,
        window: int | None,
    ) -> tuple[Array, Array]:
        results = (jax.ShapeDtypeStruct(q_TNH.shape, q_TNH.dtype), jax.ShapeDtypeStruct(cache.shape, cache.dtype))
        call = jax.ffi.ffi_call("anypool_paged_attention", results, input_output_aliases={3: 1})
        attributes = {"decode": np.int64(decode), "scale": np.float32(scale), "window": np.int64(window or 0)}
        out, cache = call(q_TNH, k_TKH, v_TKH, cache, start_R, count_R, table_RM, **attributes)
        return out, cache


KERNELS: dict[str, Any] = {
    "linear": LinearCpu(),
    "rms_norm": RmsNormCpu(),
    "silu_mul": SiluMulCpu(),
    "paged_attention": PagedAttentionCpu(),
}
