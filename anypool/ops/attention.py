"""Dense scaled dot-product attention with grouped key-value heads."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from anypool.ops.contract import contract

MASKED = -1e30
"""Score of a hidden key: finite, so that a row which sees nothing gives no NaN."""


# B batch  T query position  S key position  N query head  K key-value head  G = N/K  H head width
def attention(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array, scale: float) -> Array:
    """Softmax(q k^T * scale) v in f32; returns (B, T, N, H) of q's dtype.

    mask_BTS: bool, True where the key may be seen. Rows with no True give zeros.
    Source: Vaswani et al. 2017; Ainslie et al. 2023 (grouped heads).
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = contract("btkgh,bskh->bkgts", q_BTKGH, k_BSKH) * scale
    seen = mask_BTS[:, None, None]
    scores = jnp.where(seen, scores, MASKED)
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(scores - peak), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    out = contract("bkgts,bskh->btkgh", weights.astype(v_BSKH.dtype), v_BSKH)
    return out.reshape(B, T, N, H).astype(q_BTNH.dtype)


def causal_mask(segments_BT: Array, window: int | None = None) -> Array:
    """(B, T, T) mask: a token sees itself and those before it in its segment, `window` tokens in all if given."""
    order = jnp.arange(segments_BT.shape[1])
    distance = order[:, None] - order[None, :]
    near = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    return (segments_BT[:, :, None] == segments_BT[:, None, :]) & near


@dataclass(frozen=True)
class PackedAttentionReference:
    """Causal attention within packed sequences, for training. Its memory grows with the length, not its square.

    queries: how many are attended for at a time; their scores are computed again on the way back, never kept.
    """

    name: str = "reference"
    queries: int = 512

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
        """(B, T, N, H) of q's dtype.

        segments: int; a token sees its own segment only, itself and what is before it, `window` tokens in all if given.
        positions: int, counted within the segment. Queries may be a part of what the keys are of.
        """
        B, T, N, H = q_BTNH.shape

        def attend(q: Array, k: Array, v: Array, segments: Array, positions: Array) -> Array:
            distance = positions[:, :, None] - k_positions_BS[:, None, :]
            seen = (segments[:, :, None] == k_segments_BS[:, None, :]) & (distance >= 0)
            if window is not None:
                seen = seen & (distance < window)
            return attention(q, k.astype(q.dtype), v.astype(q.dtype), seen, scale)

        again: Callable[..., Array] = jax.checkpoint(attend)
        size = math.gcd(T, self.queries)
        if T // size == 1 or size < 64:  # short, or of an odd length
            return again(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, q_positions_BT)
        # In f32 between the chunks, because there their gradients are summed.
        k, v = k_BSKH.astype(jnp.float32), v_BSKH.astype(jnp.float32)

        def split(x: Array) -> Array:
            return jnp.moveaxis(x.reshape(B, T // size, size, *x.shape[2:]), 1, 0)

        def one(_: None, chunk: tuple[Array, Array, Array]) -> tuple[None, Array]:
            q, segments, positions = chunk
            return None, again(q, k, v, segments, positions)

        _, out = jax.lax.scan(one, None, (split(q_BTNH), split(q_segments_BT), split(q_positions_BT)))
        return jnp.moveaxis(out, 0, 1).reshape(B, T, N, H)
