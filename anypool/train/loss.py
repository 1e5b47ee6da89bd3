"""Next-token cross-entropy in f32, with z-loss, a part of the tokens at a time so that logits are never whole.

The gradient is computed with the loss, in the same pass over the vocabulary (`ops.cross_entropy`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from anypool.ops import Kernels
from anypool.ops.kernels import reference

# B row  S shard of the positions  N chunk  C position in a chunk  D model width  V vocabulary
LOGITS_BYTES = 2**28
"""The most that a chunk's logits take on one device, if the length divides so."""

Constrain = Callable[[Array], Array]


def chunks_for(rows: int, length: int, vocab: int) -> int:
    """Into how many chunks to divide the positions of one device. All three as one device has them."""
    wanted = math.ceil(4 * rows * length * vocab / LOGITS_BYTES)
    return next(n for n in range(wanted, length + 1) if length % n == 0) if wanted < length else length


def cross_entropy(
    hidden_BTD: Array,
    table_VD: Array,
    targets_BT: Array,
    weights_BT: Array,
    z_loss: float,
    chunks: int = 1,
    shards: int = 1,
    constrain: Constrain = lambda logits_BSCV: logits_BSCV,
    kernels: Kernels | None = None,
) -> tuple[Array, tuple[Array, Array]]:
    """Weighted sums over all tokens of what is minimised, and of its two parts; f32 ().

    Args:
        hidden_BTD: after the final norm. table_VD: the output projection.
        targets_BT: int. weights_BT: f32, 0 where nothing is to be learned.
        z_loss: coefficient of the squared log-sum-exp.
        chunks: how many the positions of each shard are computed in.
        shards: into how many neighbouring parts a mesh divides the positions; each chunk takes some of every part.
        constrain: says how the logits of a chunk, f32 (B, S, C, V), are divided.
        kernels: of the product with the table and of the loss; without them, the references.

    Returns:
        (objective, (cross-entropy, z-loss)). Only the objective has a gradient, in hidden and table.
    """
    B, T = targets_BT.shape

    def split(x: Array) -> Array:
        """(B, T, ...) -> (N, B, S, C, ...)"""
        return jnp.moveaxis(x.reshape(B, shards, chunks, T // (shards * chunks), *x.shape[2:]), 2, 0)

    summed = partial(_summed, z_loss, constrain, kernels or reference())
    objective, parts = summed(split(hidden_BTD), table_VD, split(targets_BT), split(weights_BT))
    return objective, parts


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _summed(
    z_loss: float,
    constrain: Constrain,
    kernels: Kernels,
    hidden: Array,
    table: Array,
    targets: Array,
    weights: Array,
) -> tuple[Array, tuple[Array, Array]]:
    def one(sums: tuple[Array, Array], chunk: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        logits = constrain(kernels.linear.logits(chunk[0], table))
        entropy, z, _ = kernels.cross_entropy(logits, *chunk[1:], z_loss)
        return (sums[0] + entropy, sums[1] + z), None

    (entropy, z), _ = _scan(one, (jnp.float32(0), jnp.float32(0)), (hidden, targets, weights))
    return entropy + z, (entropy, z)


def _summed_forward(
    z_loss: float,
    constrain: Constrain,
    kernels: Kernels,
    hidden: Array,
    table: Array,
    targets: Array,
    weights: Array,
) -> tuple[Any, Any]:
    def one(
        sums: tuple[Array, Array, Array], chunk: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array, Array], Array]:
        logits = constrain(kernels.linear.logits(chunk[0], table))
        entropy, z, logits_bar = kernels.cross_entropy(logits, *chunk[1:], z_loss)
        bar = logits_bar.astype(table.dtype)
        hidden_bar, table_bar = kernels.linear.logits_back(bar, chunk[0], table)
        return (sums[0] + entropy, sums[1] + z, sums[2] + table_bar), hidden_bar.astype(hidden.dtype)

    start = (jnp.float32(0), jnp.float32(0), jnp.zeros(table.shape, jnp.float32))
    (entropy, z, table_bar), hidden_bar = _scan(one, start, (hidden, targets, weights))
    return (entropy + z, (entropy, z)), (hidden_bar, table_bar.astype(table.dtype))


def _summed_backward(
    z_loss: float, constrain: Constrain, kernels: Kernels, kept: tuple[Array, Array], bars: Any
) -> tuple[Any, ...]:
    hidden_bar, table_bar = kept
    scale = bars[0]
    return (hidden_bar * scale).astype(hidden_bar.dtype), (table_bar * scale).astype(table_bar.dtype), None, None


_summed.defvjp(_summed_forward, _summed_backward)


def _scan(one: Any, start: Any, chunks: Any) -> tuple[Any, Any]:
    """`lax.scan`, but a single chunk is computed without a loop."""
    if len(chunks[0]) > 1:
        scanned: tuple[Any, Any] = jax.lax.scan(one, start, chunks)
        return scanned
    sums, out = one(start, jax.tree.map(lambda x: x[0], chunks))
    return sums, None if out is None else out[None]
