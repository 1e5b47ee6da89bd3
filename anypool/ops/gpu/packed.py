"""Training's attention on a GPU: causal within the segments of packed rows, no scores in memory.

The kernel is `jax.experimental.pallas.ops.gpu.attention.mha`, which XLA compiles through Triton for NVIDIA and AMD. It
attends by place in the row, the reference by position in the segment; both are the same as long as a segment's tokens
are neighbours, which a packed row promises.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from anypool.ops.need import Need, lacks

STEP = 128
"""Rows are of a multiple of so many tokens: the largest block."""
_MODULE = "jax.experimental.pallas.ops.gpu.attention"


# B batch  T query position  S key position  N query head  K key-value head  H head width
@dataclass(frozen=True)
class TritonAttention:
    """`PackedAttentionReference` without scores in memory; an interpreter runs it where `interpret` is set.

    wide_bytes, widest_bytes: of one head of one token, up to which blocks are of 128 tokens, and up to which they are
        of 64; beyond, a block is more than the least shared memory of the platform's chips.
    """

    wide_bytes: int
    widest_bytes: int
    name: str = "pallas triton"
    interpret: bool = False

    def refuses(self, need: Need) -> str | None:
        """Why it cannot train this model, or None."""
        if (lacking := lacks(_MODULE)) is not None:
            return lacking
        if need.dtype not in (jnp.bfloat16, jnp.float32):
            return f"Triton attention computes in bfloat16 or float32, not {need.dtype}"
        if _bytes(need.head_dim, need.dtype) > self.widest_bytes:
            return f"Triton attention's blocks do not fit shared memory at head_dim {need.head_dim} in {need.dtype}"
        if need.window is not None and (need.length is None or need.window < need.length):
            return f"Triton attention knows no sliding window ({need.window})"
        if need.sequence > 1:
            return f"Triton attention takes whole rows, and the mesh divides them (sequence={need.sequence})"
        if need.length is not None and need.length % STEP:
            return f"Triton attention takes rows of a multiple of {STEP} tokens, not {need.length}"
        return None

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
        """As `PackedAttentionReference`, for whole rows without a window: T = S, a multiple of 128; else ValueError."""
        from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

        _, T, N, H = q_BTNH.shape
        if k_BSKH.shape[1] != T or T % STEP or (window is not None and window < T):
            raise ValueError(
                f"Triton attention was given {T} queries and {k_BSKH.shape[1]} keys a row and the window {window}; it "
                f"takes as many of both, a multiple of {STEP}, and no window: give `choose` the length, the window and "
                "the mesh's sequence axis, so that it can refuse"
            )
        block = 128 if _bytes(H, q_BTNH.dtype) <= self.wide_bytes else 64
        groups = N // k_BSKH.shape[2]
        out: Array = mha(
            q_BTNH,
            _repeat(k_BSKH, groups),
            _repeat(v_BSKH, groups),
            q_segments_BT.astype(jnp.int32),
            scale,
            True,
            BlockSizes(block, block, 32, 32, 32, 32),
            interpret=self.interpret,
        )
        return out


def _bytes(head_dim: int, dtype: jnp.dtype) -> int:
    """Of one head of one token, as the kernel holds it: filled up to a power of two."""
    return (1 << (head_dim - 1).bit_length()) * jnp.dtype(dtype).itemsize


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _repeat(x_BSKH: Array, times: int) -> Array:
    """Every key-value head as often as query heads share it: the kernel wants as many of both."""
    return jnp.repeat(x_BSKH, times, axis=2)


def _repeat_forward(x_BSKH: Array, times: int) -> tuple[Array, None]:
    return _repeat(x_BSKH, times), None


def _repeat_backward(times: int, _: None, bar_BSNH: Array) -> tuple[Array]:
    # Summed in f32: what differentiates `repeat` would sum in bf16.
    B, S, N, H = bar_BSNH.shape
    bar = bar_BSNH.reshape(B, S, N // times, times, H)
    return (jnp.sum(bar, axis=3, dtype=jnp.float32).astype(bar_BSNH.dtype),)


_repeat.defvjp(_repeat_forward, _repeat_backward)
