"""The gate of a gated MLP: silu(gate) * up (Shazeer 2020, SwiGLU)."""

from dataclasses import dataclass

import jax
from jax import Array


@dataclass(frozen=True)
class SiluMulReference:
    """silu(gate) * up, elementwise."""

    name: str = "reference"

    def __call__(self, gate: Array, up: Array) -> Array:
        """gate, up: same shape and dtype; so is the result."""
        return gate * jax.nn.sigmoid(gate) * up
