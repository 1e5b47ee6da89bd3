"""Rotary position embedding (Su et al. 2021), in the half-split form of Hugging Face."""

import jax.numpy as jnp
import numpy as np
from jax import Array


# H head width  F = H/2 frequency
def rotary_tables(positions: Array, frequencies_F: np.ndarray, scale: float = 1.0) -> tuple[Array, Array]:
    """Cosine and sine of every position's angles, f32 (..., 1, F), ready to broadcast over heads.

    positions: int (...); frequencies_F: radians per position; scale: of both tables (YaRN's attention factor).
    """
    angles = positions.astype(jnp.float32)[..., None, None] * jnp.asarray(frequencies_F, jnp.float32)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x_NH: Array, cos_F: Array, sin_F: Array) -> Array:
    """Turns each head's pairs (h, h + H/2) by its position's angles.

    x_NH: (..., N, H); cos_F, sin_F: (..., 1, F). Returns x's shape and dtype.
    """
    half = x_NH.shape[-1] // 2
    x = x_NH.astype(jnp.float32)
    first, second = x[..., :half], x[..., half:]
    turned = jnp.concatenate([first * cos_F - second * sin_F, second * cos_F + first * sin_F], axis=-1)
    return turned.astype(x_NH.dtype)
