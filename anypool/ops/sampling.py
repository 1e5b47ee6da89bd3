"""The choice of the next token: penalties, temperature, filters, and a draw keyed by (seed, absolute position).

Draws are Gumbel-max: the token with the largest logit / temperature + noise, where the noise is a pure function of the
request's seed and the token's position. Filters are thresholds found by bisection over the bits of a float, which
needs no sort and keeps every token that ties with the last one kept.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from anypool.ops.random import gumbel

# R row  V vocabulary  E edit  L reported alternative
TOP_LOGPROBS = 20
"""Alternatives computed for each token when log-probabilities are asked for (OpenAI's limit)."""
EXCLUDED = -1e30


@dataclass(frozen=True)
class Sampler:
    """What a compiled sampler has to be able to do; the least that serves every row of a step is used.

    draw: some row has a temperature. filters: some row has top-k, top-p or min-p, or edits its logits.
    edits: how many logits a row may edit (penalties, bias); logprobs: report log-probabilities.
    """

    draw: bool = False
    filters: bool = False
    edits: int = 0
    logprobs: bool = False


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingRows:
    """Sampling parameters of a step's rows, as arrays.

    temperature, top_p, min_p, repetition: f32 (R,); temperature 0 is greedy, top_p 1, min_p 0 and repetition 1 are off.
    top_k: int32 (R,), 0 is off. seed: uint32 (R, 2). position: int32 (R,), absolute position of the token to be drawn.
    edit_ids: int32 (R, E); edit_bias: f32 (R, E), added to the logit (presence, frequency, logit bias);
    edit_seen: f32 (R, E), 1 where the repetition penalty applies. Unused edits are id 0 with bias 0 and seen 0.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    seed: Array
    position: Array
    repetition: Array
    edit_ids: Array
    edit_bias: Array
    edit_seen: Array

    @classmethod
    def neutral(cls, rows: int, edits: int) -> "SamplingRows":
        """Greedy rows that edit nothing, as NumPy arrays to be filled in."""
        arrays: dict[str, Any] = {
            "temperature": np.zeros(rows, np.float32),
            "top_k": np.zeros(rows, np.int32),
            "top_p": np.ones(rows, np.float32),
            "min_p": np.zeros(rows, np.float32),
            "seed": np.zeros((rows, 2), np.uint32),
            "position": np.zeros(rows, np.int32),
            "repetition": np.ones(rows, np.float32),
            "edit_ids": np.zeros((rows, edits), np.int32),
            "edit_bias": np.zeros((rows, edits), np.float32),
            "edit_seen": np.zeros((rows, edits), np.float32),
        }
        return cls(**arrays)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """token: int32 (R,). If asked for: logprob f32 (R,), top_ids int32 and top_logprobs f32 (R, L), best first."""

    token: Array
    logprob: Array | None = None
    top_ids: Array | None = None
    top_logprobs: Array | None = None


def sample(logits_RV: Array, rows: SamplingRows, sampler: Sampler) -> Sampled:
    """Draws one token for each row. logits_RV: f32."""
    scores = edit(logits_RV, rows) if sampler.edits else logits_RV
    if sampler.draw or sampler.filters:
        greedy = rows.temperature <= 0
        heat = jnp.where(greedy, 1.0, rows.temperature)[:, None]
        scores = (scores - jnp.max(scores, axis=-1, keepdims=True)) / heat
        if sampler.filters:
            scores = jnp.where(greedy[:, None], scores, keep_likely(scores, rows))
        noise = gumbel(rows.seed, rows.position, scores.shape[-1])
        scores = jnp.where(greedy[:, None], scores, scores + noise)
    token = first_argmax(scores)
    if not sampler.logprobs:
        return Sampled(token)
    logprobs_RV = jax.nn.log_softmax(logits_RV, axis=-1)
    chosen = jnp.sum(jnp.where(_columns(logits_RV) == token[:, None], logprobs_RV, 0.0), axis=-1)
    top_ids, top_logprobs = best(logprobs_RV, TOP_LOGPROBS)
    return Sampled(token, chosen, top_ids, top_logprobs)


def edit(logits_RV: Array, rows: SamplingRows) -> Array:
    """Repetition penalty (Keskar et al. 2019: divide a positive logit, multiply a negative one), then the biases."""
    old = jnp.take_along_axis(logits_RV, rows.edit_ids, axis=-1, mode="clip")
    penalty = rows.repetition[:, None]
    penalised = jnp.where(old > 0, old / penalty, old * penalty)
    new = jnp.where(rows.edit_seen > 0, penalised, old) + rows.edit_bias
    row = jnp.arange(logits_RV.shape[0], dtype=jnp.int32)[:, None]
    return logits_RV.at[row, rows.edit_ids].add(new - old, mode="promise_in_bounds")


def keep_likely(scores_RV: Array, rows: SamplingRows) -> Array:
    """Excludes what min-p, then top-k, then top-p (Holtzman et al. 2020) leave out. The best token always stays.

    scores_RV: logits over temperature, shifted so that the best of each row is 0.
    """
    weights = jnp.exp(scores_RV)
    weights = jnp.where(weights >= rows.min_p[:, None], weights, 0.0)
    bits = jax.lax.bitcast_convert_type(weights, jnp.uint32)  # of floats >= 0: ordered as they are
    wanted = jnp.where(rows.top_k > 0, rows.top_k, scores_RV.shape[-1]).astype(jnp.float32)
    floor = _largest_threshold(bits, jnp.ones_like(weights), wanted)
    weights = jnp.where(bits >= floor, weights, 0.0)
    bits = jax.lax.bitcast_convert_type(weights, jnp.uint32)
    mass = jnp.sum(weights, axis=-1) * rows.top_p
    floor = jnp.where((rows.top_p < 1.0)[:, None], _largest_threshold(bits, weights, mass), jnp.uint32(1))
    kept = bits >= jnp.maximum(floor, jnp.uint32(1))
    return jnp.where(kept | (scores_RV == 0.0), scores_RV, EXCLUDED)


def _largest_threshold(bits_RV: Array, weights_RV: Array, wanted_R: Array) -> Array:
    """Largest threshold (R, 1) at which the weights at or above it still sum to `wanted`; 0 if none does."""

    def narrow(step: Array, found: Array) -> Array:
        candidate = found | (jnp.uint32(1) << (jnp.uint32(30) - step.astype(jnp.uint32)))
        reached = jnp.sum(jnp.where(bits_RV >= candidate, weights_RV, 0.0), axis=-1) >= wanted_R
        return jnp.where(reached[:, None], candidate, found)

    nothing = jnp.zeros((bits_RV.shape[0], 1), jnp.uint32)
    threshold: Array = jax.lax.fori_loop(0, 31, narrow, nothing)
    return threshold


def first_argmax(scores_RV: Array) -> Array:
    """Index of each row's largest score, the lowest among equals: int32 (R,)."""
    best_R1 = jnp.max(scores_RV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(scores_RV == best_R1, _columns(scores_RV), scores_RV.shape[-1] - 1), axis=-1)


def best(scores_RV: Array, count: int) -> tuple[Array, Array]:
    """The `count` largest of each row, largest first, by repeated maximum: int32 (R, count), f32 (R, count)."""
    ids, values = [], []
    for _ in range(min(count, scores_RV.shape[-1])):
        top = first_argmax(scores_RV)
        ids.append(top)
        values.append(jnp.max(scores_RV, axis=-1))
        scores_RV = jnp.where(_columns(scores_RV) == top[:, None], -jnp.inf, scores_RV)
    return jnp.stack(ids, axis=-1), jnp.stack(values, axis=-1)


def _columns(x_RV: Array) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, x_RV.shape, 1)
