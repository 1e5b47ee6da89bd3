"""Projections by a weight held output-major, as Hugging Face stores them.

An implementation may hold weights in a layout of its own: `pack` makes it on the host, once.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


# D input width  O output width  V vocabulary
@dataclass(frozen=True)
class LinearReference:
    """x @ w.T with f32 accumulation, w stored as (O, D)."""

    name: str = "reference"

    def pack(self, w_OD: np.ndarray) -> Any:
        """The weight in the layout `apply` and `embed` read: here as it is."""
        return w_OD

    def apply(self, x_D: Array, *weights: Any) -> tuple[Array, ...]:
        """One projection for each weight of the same input.

        Args:
            x_D: (..., D).
            weights: each packed from (O_i, D).

        Returns:
            For each weight an array (..., O_i) of x's dtype.
        """
        contract = (((x_D.ndim - 1,), (1,)), ((), ()))
        return tuple(
            jax.lax.dot_general(x_D, w, contract, preferred_element_type=jnp.float32).astype(x_D.dtype) for w in weights
        )

    def logits(self, x_D: Array, weight: Any) -> Array:
        """The projection onto the vocabulary, kept in f32: (..., D) -> (..., V)."""
        return jax.lax.dot_general(x_D, weight, (((x_D.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    def embed(self, table: Any, ids: Array) -> Array:
        """Rows of a packed (V, D) table: int ids (...) -> (..., D)."""
        return jnp.take(table, ids, axis=0, mode="clip")
