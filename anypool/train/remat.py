"""Remat: which activations of a layer are kept for the way back, and which are computed again.

    policy        kept of every layer, besides its input       computed again
    none          all that the gradient needs                  nothing (but the scores of attention)
    projections   what the matrix products gave                norms, rotations, activation functions, attention
    attention     queries, keys, values, and what attention gave    the MLP as well
    full          nothing                                      the whole layer

The names are those that `models.decoder.block` marks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from anypool.models import ModelConfig
from anypool.train.errors import TrainError

KEPT: dict[str, tuple[str, ...] | None] = {
    "none": None,
    "projections": ("q", "k", "v", "attended", "middle", "gate", "up"),
    "attention": ("q", "k", "v", "attended"),
    "full": (),
}
"""Policy -> names of the activations that are kept."""


def check_policy(policy: str) -> str:
    """The policy. Raises TrainError if there is none of this name."""
    if policy not in KEPT:
        raise TrainError(f"remat is {policy!r}; there are {', '.join(KEPT)}")
    return policy


def wrapper(policy: str, looped: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What to wrap a layer in. looped: the layers are in a `scan`, which alone keeps the compiler from undoing it."""
    names = KEPT[policy]
    if names is None:
        return lambda run: run
    keep = jax.checkpoint_policies.save_only_these_names(*names)
    return lambda run: jax.checkpoint(run, policy=keep, prevent_cse=not looped)


def kept_bytes_per_token(config: ModelConfig, policy: str, itemsize: int) -> int | None:
    """Bytes of activations kept for each token over all layers, on one device; None if the compiler decides ("none").

    The input of every layer is part of it; what is alive while one layer is computed is not.
    """
    names = KEPT[check_policy(policy)]
    if names is None:
        return None
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    width = {
        "q": heads,
        "k": kv_heads,
        "v": kv_heads,
        "attended": heads,
        "middle": config.hidden_size,
        "gate": config.intermediate_size,
        "up": config.intermediate_size,
    }
    return config.num_layers * itemsize * (config.hidden_size + sum(width[name] for name in names))
