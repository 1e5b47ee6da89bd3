"""Dense scaled dot-product attention with grouped key-value heads."""

import jax
import jax.numpy as jnp
from jax import Array

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
    scores = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * scale
    seen = mask_BTS[:, None, None]
    scores = jnp.where(seen, scores, MASKED)
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(scores - peak), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    out = jnp.einsum("bkgts,bskh->btkgh", weights.astype(v_BSKH.dtype), v_BSKH, preferred_element_type=jnp.float32)
    return out.reshape(B, T, N, H).astype(q_BTNH.dtype)


def causal_mask(segments_BT: Array, window: int | None = None) -> Array:
    """(B, T, T) mask: a token sees itself and those before it in its segment, `window` tokens in all if given."""
    order = jnp.arange(segments_BT.shape[1])
    distance = order[:, None] - order[None, :]
    near = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    return (segments_BT[:, :, None] == segments_BT[:, None, :]) & near
