"""The Llama family, written once: Llama, SmolLM2, Mistral, Qwen2 and Qwen3 differ only by flags of the configuration.

The forward pass is given its kernels and its way of attending, so the same lines train on whole sequences and serve
from a paged cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from anypool.models.config import ModelConfig
from anypool.models.params import param, parameters, repeated
from anypool.ops import Kernels, rotary_tables, rotate
from anypool.ops.attention import attention, causal_mask

# B batch  T token  D model width  N query head  K key-value head  H head width  F MLP width  V vocabulary


def _attention_bias(config: ModelConfig) -> bool:
    return config.attention_bias


def _qk_norm(config: ModelConfig) -> bool:
    return config.qk_norm


def _mlp_bias(config: ModelConfig) -> bool:
    return config.mlp_bias


@parameters
class Layer:
    attention_norm: Array = param("embed", hf="input_layernorm.weight", init="ones")
    q: Array = param("heads", "embed", hf="self_attn.q_proj.weight")
    k: Array = param("kv_heads", "embed", hf="self_attn.k_proj.weight")
    v: Array = param("kv_heads", "embed", hf="self_attn.v_proj.weight")
    o: Array = param("embed", "heads", hf="self_attn.o_proj.weight")
    mlp_norm: Array = param("embed", hf="post_attention_layernorm.weight", init="ones")
    gate: Array = param("mlp", "embed", hf="mlp.gate_proj.weight")
    up: Array = param("mlp", "embed", hf="mlp.up_proj.weight")
    down: Array = param("embed", "mlp", hf="mlp.down_proj.weight")
    q_bias: Array | None = param("heads", hf="self_attn.q_proj.bias", init="zeros", when=_attention_bias)
    k_bias: Array | None = param("kv_heads", hf="self_attn.k_proj.bias", init="zeros", when=_attention_bias)
    v_bias: Array | None = param("kv_heads", hf="self_attn.v_proj.bias", init="zeros", when=_attention_bias)
    o_bias: Array | None = param(
        "embed", hf="self_attn.o_proj.bias", init="zeros", when=lambda config: config.attention_out_bias
    )
    q_norm: Array | None = param("head_dim", hf="self_attn.q_norm.weight", init="ones", when=_qk_norm)
    k_norm: Array | None = param("head_dim", hf="self_attn.k_norm.weight", init="ones", when=_qk_norm)
    gate_bias: Array | None = param("mlp", hf="mlp.gate_proj.bias", init="zeros", when=_mlp_bias)
    up_bias: Array | None = param("mlp", hf="mlp.up_proj.bias", init="zeros", when=_mlp_bias)
    down_bias: Array | None = param("embed", hf="mlp.down_proj.bias", init="zeros", when=_mlp_bias)


@parameters
class Decoder:
    embed: Array = param("vocab", "embed", hf="model.embed_tokens.weight")
    layers: tuple[Layer, ...] | Layer = repeated(Layer, hf="model.layers.{i}.")
    norm: Array = param("embed", hf="model.norm.weight", init="ones")
    head: Array | None = param("vocab", "embed", hf="lm_head.weight", when=lambda config: not config.tie_embeddings)


Attend = Callable[[Array, Array, Array, Any, Any], tuple[Array, Any]]
"""(q (..., N, H), k and v (..., K, H), a layer's cache, context) -> (output (..., N, H), the cache with k and v).

Hashable; the arrays it needs (a mask, block tables) come as `context`, so that all layers share one traced block.
"""

Mark = Callable[..., Array]
"""(x, name, *axes) -> x: called on the activations of a block, with the logical axes that follow those of the tokens.

Training says with it how they are sharded and which are kept for the way back. Hashable.
"""

ACTIVATIONS = ("attention_in", "q", "k", "v", "attended", "middle", "mlp_in", "gate", "up", "residual")
"""Names of the activations that a block marks, in order: `middle` and `residual` are the sums after each half."""


def unmarked(x: Array, name: str, *axes: str) -> Array:
    """Marks nothing."""
    return x


def forward(
    params: Decoder,
    tokens: Array,
    positions: Array,
    caches: Any,
    context: Any,
    attend: Attend,
    config: ModelConfig,
    kernels: Kernels,
    mark: Mark = unmarked,
    remat: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda run: run,
) -> tuple[Array, Any]:
    """Hidden states after the final norm, and the caches.

    Args:
        tokens, positions: int (...), of one shape.
        caches: one for each layer, handed through `attend` with `context`. If the layers are stacked, so are the
            caches, and the layers are looped over instead of written out.
        remat: wraps the block, to choose what it keeps for the way back.

    Returns:
        hidden (..., D), and the caches as they came.
    """
    x = mark(kernels.linear.embed(params.embed, tokens), "residual", "embed")
    angles = rotary_tables(positions, config.rope.inverse_frequencies(config.head_dim), config.rope.attention_factor)
    run = remat(partial(block, attend=attend, config=config, kernels=kernels, mark=mark))
    if isinstance(params.layers, Layer):

        def one(x: Array, layer_and_cache: tuple[Layer, Any]) -> tuple[Array, Any]:
            layer, cache = layer_and_cache
            after: tuple[Array, Any] = run(layer, x, angles, cache, context)
            return after

        x, written = jax.lax.scan(one, x, (params.layers, caches))
    else:
        appended = []
        for layer, cache in zip(params.layers, caches, strict=True):
            x, after = run(layer, x, angles, cache, context)
            appended.append(after)
        written = tuple(appended)
    return kernels.rms_norm(x, params.norm, config.rms_norm_eps), written


@partial(jax.jit, static_argnames=("attend", "config", "kernels", "mark"))
def block(
    layer: Layer,
    x_D: Array,
    angles: tuple[Array, Array],
    cache: Any,
    context: Any,
    attend: Attend,
    config: ModelConfig,
    kernels: Kernels,
    mark: Mark = unmarked,
) -> tuple[Array, Any]:
    """One pre-norm transformer block: attention, then a gated MLP, each added to the residual."""
    lead, linear, eps = x_D.shape[:-1], kernels.linear.apply, config.rms_norm_eps
    h = mark(kernels.rms_norm(x_D, layer.attention_norm, eps), "attention_in", "embed")
    q, k, v = linear(h, layer.q, layer.k, layer.v)
    q = _plus(q, layer.q_bias).reshape(*lead, config.num_heads, config.head_dim)
    k = _plus(k, layer.k_bias).reshape(*lead, config.num_kv_heads, config.head_dim)
    v = _plus(v, layer.v_bias).reshape(*lead, config.num_kv_heads, config.head_dim)
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = kernels.rms_norm(q, layer.q_norm, eps), kernels.rms_norm(k, layer.k_norm, eps)
    q = mark(rotate(q, *angles), "q", "heads", "head_dim")
    k = mark(rotate(k, *angles), "k", "kv_heads", "head_dim")
    out, cache = attend(q, k, mark(v, "v", "kv_heads", "head_dim"), cache, context)
    (out,) = linear(mark(out, "attended", "heads", "head_dim").reshape(*lead, -1), layer.o)
    x_D = mark(x_D + _plus(out, layer.o_bias), "middle", "embed")
    h = mark(kernels.rms_norm(x_D, layer.mlp_norm, eps), "mlp_in", "embed")
    gate, up = linear(h, layer.gate, layer.up)
    gate = mark(_plus(gate, layer.gate_bias), "gate", "mlp")
    up = mark(_plus(up, layer.up_bias), "up", "mlp")
    (down,) = linear(kernels.silu_mul(gate, up), layer.down)
    return mark(x_D + _plus(down, layer.down_bias), "residual", "embed"), cache


def logits(params: Decoder, hidden_D: Array, kernels: Kernels) -> Array:
    """Scores of every next token in f32: (..., D) -> (..., V)."""
    table = params.embed if params.head is None else params.head
    scores: Array = kernels.linear.logits(hidden_D, table)
    return scores


def forward_dense(
    params: Decoder, tokens_BT: Array, segments_BT: Array, config: ModelConfig, kernels: Kernels
) -> Array:
    """Hidden states (B, T, D) of whole sequences: no cache, each token sees its own segment up to itself.

    segments_BT: int; tokens of one segment are neighbours, and positions count from each segment's first token.
    """
    T = tokens_BT.shape[1]
    order = jnp.arange(T)
    same = segments_BT[:, :, None] == segments_BT[:, None, :]
    positions = order - jnp.min(jnp.where(same, order, T), axis=-1)
    mask = causal_mask(segments_BT, config.sliding_window)
    caches = (None,) * config.num_layers
    hidden, _ = forward(params, tokens_BT, positions, caches, mask, attend_dense, config, kernels)
    return hidden


def attend_dense(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, cache: None, mask_BTT: Array) -> tuple[Array, None]:
    """Attention within a batch of whole sequences; the context is their mask."""
    return attention(q_BTNH, k_BTKH, v_BTKH, mask_BTT, q_BTNH.shape[-1] ** -0.5), cache


def _plus(x: Array, bias: Array | None) -> Array:
    return x if bias is None else (x + bias).astype(x.dtype)
