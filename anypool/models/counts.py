"""What follows from a model's sizes by arithmetic: parameters, floating-point operations, bytes of cache.

Conventions: a multiply and an add are 2 FLOPs. Counted are the matrix products and the two products of attention, as in
Chowdhery et al. 2022 (PaLM), appendix B; not norms, rotations, softmax, or the lookup of the embedding. Unlike there,
attention counts only the keys that a token may see, so a causal sequence counts once, not as a full square. The way
back is twice the way forward; what remat computes again is no FLOP of the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from anypool.models.config import ModelConfig
from anypool.models.decoder import Decoder
from anypool.models.params import all_specs, specs


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters. total: as stored in a checkpoint, tied embeddings once. embedding: the lookup table's.

    products: those that every token is multiplied by, the output projection included even when it is tied.
    """

    total: int
    embedding: int
    products: int


def parameters(config: ModelConfig) -> Parameters:
    """Counted from the declarations, one layer's times the number of layers."""
    declared = all_specs(specs(Decoder, config, stacked=True))
    embedding = config.vocab_size * config.hidden_size
    matrices = sum(math.prod(s.shape) for s in declared if len(s.axes) - ("layers" in s.axes) == 2)
    return Parameters(
        total=sum(math.prod(spec.shape) for spec in declared),
        embedding=embedding,
        products=matrices - (0 if config.tie_embeddings else embedding),
    )


def keys_seen(config: ModelConfig, length: int) -> float:
    """Keys that a token of a causal sequence of `length` tokens sees, itself included, on average."""
    window = min(length, config.sliding_window or length)
    return (window * (window + 1) / 2 + (length - window) * window) / length


def attention_flops(config: ModelConfig, keys: float) -> float:
    """Of one token that sees `keys` keys, over all layers, on the way forward."""
    return 4.0 * config.num_layers * config.num_heads * config.head_dim * keys


def forward_flops_per_token(config: ModelConfig, length: int) -> float:
    """Of a token in a causal sequence of `length` tokens, on average. For packed rows `length` is the sequences'."""
    return 2.0 * parameters(config).products + attention_flops(config, keys_seen(config, length))


def train_flops_per_token(config: ModelConfig, length: int) -> float:
    """Forward and back."""
    return 3.0 * forward_flops_per_token(config, length)


def decode_flops_per_token(config: ModelConfig, context: int) -> float:
    """Of the next token after `context - 1` others."""
    return 2.0 * parameters(config).products + attention_flops(config, min(context, config.sliding_window or context))


def cache_bytes_per_token(config: ModelConfig, itemsize: int) -> int:
    """Keys and values of one token over all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
