"""Root-mean-square layer norm (Zhang and Sennrich 2019)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True)
class RmsNormReference:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, computed in f32."""

    name: str = "reference"

    def __call__(self, x_D: Array, scale_D: Array, eps: float) -> Array:
        """x_D: (..., D); scale_D: (D,). Returns x's shape and dtype."""
        x = x_D.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
        return ((x * inverse).astype(x_D.dtype) * scale_D).astype(x_D.dtype)
