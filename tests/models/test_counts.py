"""Counts against published numbers and against what the compiler counts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from anypool.models import ModelConfig, RopeConfig
from anypool.models.counts import (
    cache_bytes_per_token,
    decode_flops_per_token,
    forward_flops_per_token,
    keys_seen,
    parameters,
    train_flops_per_token,
)
from anypool.models.decoder import Decoder, forward_dense, logits
from anypool.models.params import abstract, specs
from anypool.ops.kernels import reference

LLAMA_8B = ModelConfig(
    model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
    num_kv_heads=8, head_dim=128, max_position=131072, rms_norm_eps=1e-5, rope=RopeConfig(),
)  # fmt: skip
LLAMA_70B = replace(LLAMA_8B, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64)
SMOLLM2 = ModelConfig(
    model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9,
    num_kv_heads=3, head_dim=64, max_position=8192, rms_norm_eps=1e-5, rope=RopeConfig(), tie_embeddings=True,
)  # fmt: skip


def test_parameters_are_those_of_the_published_checkpoints():
    assert parameters(LLAMA_8B).total == 8_030_261_248
    assert parameters(LLAMA_70B).total == 70_553_706_496
    assert parameters(SMOLLM2).total == 134_515_008
    assert parameters(LLAMA_8B).products == 8_030_261_248 - 128256 * 4096 - 65 * 4096
    assert parameters(SMOLLM2).products == 134_515_008 - 61 * 576


def test_flops():
    six_n = 6 * parameters(LLAMA_8B).products
    assert train_flops_per_token(LLAMA_8B, 8192) == six_n + 6 * 32 * 32 * 128 * 8193
    # PaLM, appendix B: 6 N + 12 L H Q T, in which a causal sequence counts twice.
    assert train_flops_per_token(LLAMA_8B, 8192) == pytest.approx(six_n + 12 * 32 * 32 * 128 * 8192 / 2, rel=1e-4)
    assert train_flops_per_token(LLAMA_8B, 64) == 3 * forward_flops_per_token(LLAMA_8B, 64)
    assert decode_flops_per_token(LLAMA_8B, 100) == 2 * parameters(LLAMA_8B).products + 4 * 32 * 32 * 128 * 100


@pytest.mark.parametrize("tied", [False, True])
def test_products_are_all_that_the_compiler_counts(tied):
    """Of a wide model on short text, where products are nearly all. The compiler counts the square of attention."""
    config = replace(
        SMOLLM2,
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1536,
        num_layers=2,
        num_heads=8,
        tie_embeddings=tied,
    )
    config = replace(config, num_kv_heads=4)
    kernels, tokens = reference(), jax.ShapeDtypeStruct((1, 64), jnp.int32)
    params = abstract(specs(Decoder, config), jnp.float32)

    def run(params, tokens):
        return logits(params, forward_dense(params, tokens, tokens, config, kernels), kernels)

    counted = jax.jit(run).lower(params, tokens).cost_analysis()["flops"]
    square = 2 * parameters(config).products + 4 * 2 * 8 * 64 * 64
    assert counted / 64 == pytest.approx(square, rel=0.02)


def test_keys_and_cache():
    assert keys_seen(LLAMA_8B, 4) == (1 + 2 + 3 + 4) / 4
    assert keys_seen(replace(LLAMA_8B, sliding_window=2), 4) == (1 + 2 + 2 + 2) / 4
    assert keys_seen(replace(LLAMA_8B, sliding_window=8), 4) == 2.5
    assert cache_bytes_per_token(LLAMA_8B, 2) == 131072  # 128 KiB
