"""Training's attention on a TPU: causal within the segments of packed rows, blocks nobody sees left out.

The kernel is `jax.experimental.pallas.ops.tpu.splash_attention`. It attends by place in the row, the reference by
position in the segment; both are the same as long as a segment's tokens are neighbours, which a packed row promises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from anypool.ops.need import Need, lacks

LANES = 128
"""Width of a vector register: blocks of keys and head widths are its multiples."""
LARGEST_BLOCK = 512
_MODULE = "jax.experimental.pallas.ops.tpu.splash_attention"


# B batch  T query position  S key position  N query head  K key-value head  H head width
@dataclass(frozen=True)
class SplashAttention:
    """`PackedAttentionReference` without scores in memory; an interpreter runs it where `interpret` is set."""

    name: str = "pallas splash"
    interpret: bool = False

    def refuses(self, need: Need) -> str | None:
        """Why it cannot train this model, or None."""
        if (lacking := lacks(_MODULE)) is not None:
            return lacking
        if need.sequence > 1:
            return f"splash attention takes whole rows, and the mesh divides them (sequence={need.sequence})"
        if need.length is not None and need.length % LANES:
            return f"splash attention takes rows of a multiple of {LANES} tokens, not {need.length}"
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
        """As `PackedAttentionReference`, for whole rows: T = S, a multiple of 128; else ValueError.

        Heads that are no multiple of 128 wide are filled up with zeros, which changes no score.
        """
        from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

        _, T, N, H = q_BTNH.shape
        if k_BSKH.shape[1] != T or T % LANES:
            raise ValueError(
                f"splash attention was given {T} queries and {k_BSKH.shape[1]} keys a row; it takes as many of both, a "
                f"multiple of {LANES}: give `choose` the length and the mesh's sequence axis, so that it can refuse"
            )
        attend = _kernel(N, T, None if window is None or window >= T else window, self.interpret)
        # Scaled in f32, because the kernel scales nothing and most scales are no power of two.
        q = (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)

        def heads_first(x: Array) -> Array:
            return jnp.pad(jnp.moveaxis(x, 2, 1), ((0, 0), (0, 0), (0, 0), (0, -H % LANES)))

        segments = SegmentIds(q_segments_BT.astype(jnp.int32), k_segments_BS.astype(jnp.int32))
        out_BNTH = jax.vmap(attend)(heads_first(q), heads_first(k_BSKH), heads_first(v_BSKH), segments)
        return jnp.moveaxis(out_BNTH[..., :H], 1, 2).astype(q_BTNH.dtype)


def _kernel(heads: int, length: int, window: int | None, interpret: bool) -> Any:
    """The kernel for a shape, with its tables of which blocks are seen."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = next(size for size in (LARGEST_BLOCK, 384, 256, LANES) if length % size == 0)
    shape = (length, length)
    mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
