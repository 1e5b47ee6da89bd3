"""Next-token cross-entropy in f32, with z-loss, a part of the tokens at a time so that logits are never whole.

The gradient is written out and computed with the loss, in the same pass over the vocabulary. For logits x with
softmax p and log-sum-exp z, the loss of a token is  z - x[target] + c z^2,  and its gradient in x is
(1 + 2 c z) p - onehot(target).  Source of the z-loss: Chowdhery et al. 2022 (PaLM), section 5, with c = 1e-4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

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
) -> tuple[Array, tuple[Array, Array]]:
    """Weighted sums over all tokens of what is minimised, and of its two parts; f32 ().

    Args:
        hidden_BTD: after the final norm. table_VD: the output projection.
        targets_BT: int. weights_BT: f32, 0 where nothing is to be learned.
        z_loss: c, above.
        chunks: how many the positions of each shard are computed in.
        shards: into how many neighbouring parts a mesh divides the positions; each chunk takes some of every part.
        constrain: says how the logits of a chunk, f32 (B, S, C, V), are divided.

    Returns:
        (objective, (cross-entropy, z-loss)). Only the objective has a gradient, in hidden and table.
    """
    B, T = targets_BT.shape

    def split(x: Array) -> Array:
        """(B, T, ...) -> (N, B, S, C, ...)"""
        return jnp.moveaxis(x.reshape(B, shards, chunks, T // (shards * chunks), *x.shape[2:]), 2, 0)

    summed = partial(_summed, z_loss, constrain)
    objective, parts = summed(split(hidden_BTD), table_VD, split(targets_BT), split(weights_BT))
    return objective, parts


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(
    z_loss: float, constrain: Constrain, hidden: Array, table: Array, targets: Array, weights: Array
) -> tuple[Array, tuple[Array, Array]]:
    def one(sums: tuple[Array, Array], chunk: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        (entropy, z), _ = _chunk(z_loss, constrain, table, *chunk)
        return (sums[0] + entropy, sums[1] + z), None

    (entropy, z), _ = _scan(one, (jnp.float32(0), jnp.float32(0)), (hidden, targets, weights))
    return entropy + z, (entropy, z)


def _summed_forward(
    z_loss: float, constrain: Constrain, hidden: Array, table: Array, targets: Array, weights: Array
) -> tuple[Any, Any]:
    def one(sums: tuple[Array, Array, Array], chunk: tuple[Array, Array, Array]) -> tuple[Any, Array]:
        (entropy, z), logits_bar = _chunk(z_loss, constrain, table, *chunk)
        bar = logits_bar.astype(table.dtype)
        table_bar = jnp.einsum("bscv,bscd->vd", bar, chunk[0], preferred_element_type=jnp.float32)
        hidden_bar = jnp.einsum("bscv,vd->bscd", bar, table, preferred_element_type=jnp.float32)
        return (sums[0] + entropy, sums[1] + z, sums[2] + table_bar), hidden_bar.astype(hidden.dtype)

    start = (jnp.float32(0), jnp.float32(0), jnp.zeros(table.shape, jnp.float32))
    (entropy, z, table_bar), hidden_bar = _scan(one, start, (hidden, targets, weights))
    return (entropy + z, (entropy, z)), (hidden_bar, table_bar.astype(table.dtype))


def _summed_backward(z_loss: float, constrain: Constrain, kept: tuple[Array, Array], bars: Any) -> tuple[Any, ...]:
    hidden_bar, table_bar = kept
    scale = bars[0]
    return (hidden_bar * scale).astype(hidden_bar.dtype), (table_bar * scale).astype(table_bar.dtype), None, None


_summed.defvjp(_summed_forward, _summed_backward)


def _chunk(
    z_loss: float, constrain: Constrain, table_VD: Array, hidden_BSCD: Array, targets_BSC: Array, weights_BSC: Array
) -> tuple[tuple[Array, Array], Array]:
    """(cross-entropy, z-loss) of a chunk's tokens, summed, and the gradient of their sum in the logits."""
    logits = jnp.einsum("bscd,vd->bscv", hidden_BSCD, table_VD, preferred_element_type=jnp.float32)
    logits = constrain(logits)
    # Compared, not gathered: a vocabulary divided over devices stays where it is.
    hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 3) == targets_BSC[..., None]
    peak = jnp.max(logits, axis=-1, keepdims=True)
    powers = jnp.exp(logits - peak)
    total = jnp.sum(powers, axis=-1, keepdims=True)
    z = jnp.log(total) + peak
    chosen = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    weights = weights_BSC[..., None]
    logits_bar = (powers * ((1 + 2 * z_loss * z) / total) - jnp.where(hit, 1.0, 0.0)) * weights
    z = z[..., 0]
    return (jnp.sum(weights_BSC * (z - chosen)), jnp.sum(weights_BSC * z_loss * z * z)), logits_bar


def _scan(one: Any, start: Any, chunks: Any) -> tuple[Any, Any]:
    """`lax.scan`, but a single chunk is computed without a loop."""
    if len(chunks[0]) > 1:
        scanned: tuple[Any, Any] = jax.lax.scan(one, start, chunks)
        return scanned
    sums, out = one(start, jax.tree.map(lambda x: x[0], chunks))
    return sums, None if out is None else out[None]
