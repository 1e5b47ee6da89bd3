"""A product of two arrays that is cheap in both directions."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def contract(subscripts: str, a: Array, b: Array) -> Array:
    """`einsum(subscripts, a, b)` summed and returned in f32.

    subscripts: "x,y->z" in which each letter stands for one axis of one size, and a letter of x or y is in at least
    one of the others.

    Differentiating an f32 product of bf16 arrays would multiply f32 by bf16 on the way back, which matrix units do not
    do. Here the way back also multiplies in the operands' dtype and sums in f32.
    """
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _forward(subscripts: str, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return contract(subscripts, a, b), (a, b)


def _backward(subscripts: str, operands: tuple[Array, Array], result_bar: Array) -> tuple[Any, Any]:
    a, b = operands
    of_a, of_b, of_result = subscripts.replace("->", ",").split(",")
    bar = result_bar.astype(jnp.result_type(a, b))
    a_bar = jnp.einsum(f"{of_result},{of_b}->{of_a}", bar, b, preferred_element_type=jnp.float32)
    b_bar = jnp.einsum(f"{of_result},{of_a}->{of_b}", bar, a, preferred_element_type=jnp.float32)
    return a_bar.astype(a.dtype), b_bar.astype(b.dtype)


contract.defvjp(_forward, _backward)
