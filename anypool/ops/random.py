"""Random numbers as a pure function of (seed, position, index), in integer operations that every chip has.

Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): a counter-based
generator, so any worker on any chip draws the same number for the same token and needs no state to do so.
"""

import jax.numpy as jnp
from jax import Array

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry(key0: Array, key1: Array, counter0: Array, counter1: Array) -> tuple[Array, Array]:
    """Two words of 32 random bits for each key and counter; all uint32, broadcast against each other."""
    keys = (key0, key1, key0 ^ key1 ^ jnp.uint32(_PARITY))
    x0, x1 = counter0 + key0, counter1 + key1
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = ((x1 << distance) | (x1 >> (32 - distance))) ^ x0
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x0, x1


# R row  V vocabulary
def gumbel(seed_R2: Array, position_R: Array, width: int) -> Array:
    """Gumbel noise, f32 (R, width), for the draw at each row's absolute position.

    seed_R2: the two uint32 words of the request's seed. Index v and v + width/2 share one call of the generator.
    Values lie in about (-2.9, 17.4): the uniform number below it has 24 bits and is never 0 or 1.
    """
    half = (width + 1) // 2
    counter = jnp.arange(half, dtype=jnp.uint32)[None, :]
    low, high = threefry(seed_R2[:, :1], seed_R2[:, 1:], counter, position_R.astype(jnp.uint32)[:, None])
    bits = jnp.concatenate([low, high], axis=1)[:, :width]
    uniform = ((bits >> 8).astype(jnp.float32) + 0.5) * jnp.float32(2.0**-24)
    return -jnp.log(-jnp.log(uniform))
