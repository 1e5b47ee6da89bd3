"""Projections by a weight held output-major, as Hugging Face stores them.

An implementation may hold weights in a layout of its own: `pack` makes it on the host, once.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from anypool.ops.contract import contract


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
        return tuple(contract(_by_rows(x_D), x_D, w).astype(x_D.dtype) for w in weights)

    def logits(self, x_D: Array, weight: Any) -> Array:
        """The projection onto the vocabulary, kept in f32: (..., D) -> (..., V)."""
        return contract(_by_rows(x_D), x_D, weight)

    def logits_back(self, bar_V: Array, x_D: Array, weight: Any) -> tuple[Array, Array]:
        """Gradients of `logits` in both its arguments, summed in f32 and kept so: f32 (..., D), f32 (V, D).

        bar_V: that of the logits, (..., V) in the dtype of the weight.
        """
        lead = "abcefghi"[: x_D.ndim - 1]
        x_bar = jnp.einsum(f"{lead}v,vd->{lead}d", bar_V, weight, preferred_element_type=jnp.float32)
        weight_bar = jnp.einsum(f"{lead}v,{lead}d->vd", bar_V, x_D, preferred_element_type=jnp.float32)
        return x_bar, weight_bar

    def embed(self, table: Any, ids: Array) -> Array:
        """Rows of a packed (V, D) table: int ids (...) -> (..., D)."""
        return _rows(table, ids)


def _by_rows(x_D: Array) -> str:
    lead = "abcdefgh"[: x_D.ndim - 1]
    return f"{lead}x,yx->{lead}y"


@jax.custom_vjp
def _rows(table_VD: Array, ids: Array) -> Array:
    return jnp.take(table_VD, ids, axis=0, mode="clip")


def _rows_forward(table_VD: Array, ids: Array) -> tuple[Array, tuple[Array, Array]]:
    return _rows(table_VD, ids), (table_VD, ids)


def _rows_backward(kept: tuple[Array, Array], rows_bar_D: Array) -> tuple[Array, None]:
    # In f32: a frequent token's row gets thousands of additions, and bf16 would lose most of them.
    table_VD, ids = kept
    bar = jnp.zeros(table_VD.shape, jnp.float32)
    bar = bar.at[ids].add(rows_bar_D.astype(jnp.float32), mode="promise_in_bounds")
    return bar.astype(table_VD.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)
