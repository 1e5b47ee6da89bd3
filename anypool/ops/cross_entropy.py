"""The loss of logits and its gradient in them, in one go.

For logits x with softmax p and log-sum-exp z, the loss of a token is  z - x[target] + c z^2,  and its gradient in x is
(1 + 2 c z) p - onehot(target).  Source of the z-loss: Chowdhery et al. 2022 (PaLM), section 5, with c = 1e-4.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array


# V vocabulary
@dataclass(frozen=True)
class CrossEntropyReference:
    """Cross-entropy and z-loss in f32."""

    name: str = "reference"

    def __call__(self, logits_V: Array, targets: Array, weights: Array, z_loss: float) -> tuple[Array, Array, Array]:
        """Sums over all tokens of weighted (cross-entropy, z-loss), f32 (), and their gradient in the logits.

        logits_V: f32 (..., V). targets: int (...); what is outside the vocabulary is no token. weights: f32 (...).
        z_loss: c, above.
        """
        # Compared, not gathered: a vocabulary divided over devices stays where it is.
        hit = jax.lax.broadcasted_iota(jnp.int32, logits_V.shape, logits_V.ndim - 1) == targets[..., None]
        peak = jnp.max(logits_V, axis=-1, keepdims=True)
        powers = jnp.exp(logits_V - peak)
        total = jnp.sum(powers, axis=-1, keepdims=True)
        z = jnp.log(total) + peak
        chosen = jnp.sum(jnp.where(hit, logits_V, 0.0), axis=-1)
        bar = (powers * ((1 + 2 * z_loss * z) / total) - jnp.where(hit, 1.0, 0.0)) * weights[..., None]
        z = z[..., 0]
        return jnp.sum(weights * (z - chosen)), jnp.sum(weights * z_loss * z * z), bar
