"""Memory of one device, predicted without a compiler: what is kept for the whole step, and the largest of what is not.

What is kept (weights, optimizer, cache) is exact. What is alive for a while depends on the compiler's order of things
and is estimated by the terms below, which docs/check.md compares with compilers' own figures.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from anypool.check.jobs import kernels_for
from anypool.check.question import Question
from anypool.models import ModelConfig
from anypool.models.counts import cache_bytes_per_token
from anypool.models.decoder import Decoder
from anypool.models.params import Spec, all_specs, specs
from anypool.ops.attention import PackedAttentionReference
from anypool.ops.paged_attention import BLOCK
from anypool.train import OptimizerConfig, Schedule
from anypool.train.loss import LOGITS_BYTES
from anypool.train.optimizer import is_matrix
from anypool.train.remat import kept_bytes_per_token
from anypool.train.sharding import PARAMETER_AXES


def predict(question: Question) -> dict[str, int]:
    """Bytes on one device by what they are for; their sum is what the device needs."""
    parts = _training(question) if question.job == "train" else _serving(question)
    return {name: round(size) for name, size in parts.items() if size}


def _fused(question: Question, op: str) -> bool:
    """Whether a kernel attends, whose scores never leave it."""
    platform = question.chips.chip.jax_platform
    # Naming the CPU's kernels would build them; they are not part of the prediction.
    if platform is None or platform in ("cpu", "neuron"):
        return False
    return bool(getattr(kernels_for(question, platform), op).name != "reference")


def _divided(spec: Spec, mesh: dict[str, int]) -> float:
    """Elements of a parameter on one device, as `train.sharding.parameter_sharding` divides it."""
    matrix = is_matrix(spec)
    parts = 1
    for axis in spec.axes:
        if matrix or axis != "embed":
            parts *= math.prod(mesh.get(name, 1) for name in PARAMETER_AXES[axis])
    return math.prod(spec.shape) / parts


def _serving(question: Question) -> dict[str, float]:
    config, mesh = question.model, question.mesh
    width = jnp.dtype(question.dtype).itemsize
    tensor = mesh.get("tensor", 1)
    blocks = -(-question.seq // BLOCK)
    head_bytes = config.num_kv_heads * config.head_dim * width / tensor
    rows = question.batch if question.job == "decode" else question.batch * -(-question.chunk // BLOCK)
    queries = 1 if question.job == "decode" else BLOCK
    keys = rows * blocks * BLOCK
    # The reference gathers every row's blocks of one layer, keys and values apart, and scores them in f32.
    if _fused(question, "paged_attention"):
        keys = 0
    gathered = 2 * 2 * keys * head_bytes
    scores = 2 * 4 * keys * queries * config.num_heads / tensor
    layer = question.tokens * width * (4 * config.hidden_size + 3 * config.intermediate_size / tensor)
    return {
        "parameters": sum(_divided(spec, mesh) for spec in all_specs(specs(Decoder, config))) * width,
        "kv_cache": cache_bytes_per_token(config, width) * BLOCK * (question.batch * blocks + 1) / tensor,
        "activations": gathered + scores + layer,
        "logits": 2 * 4 * question.batch * config.vocab_size,
    }


def _training(question: Question) -> dict[str, float]:
    config, mesh = question.model, question.mesh
    width = jnp.dtype(question.dtype).itemsize
    size = {axis: mesh.get(axis, 1) for axis in ("data", "fsdp", "sequence", "tensor")}
    declared = all_specs(specs(Decoder, config))
    parameters = sum(_divided(spec, mesh) for spec in declared)
    matrices = sum(_divided(spec, mesh) for spec in declared if is_matrix(spec))
    optimizer = OptimizerConfig(Schedule(1e-4, 10), kind=question.optimizer)
    second = sum(_divided(spec, mesh) for spec in declared if not optimizer.is_muon(spec))
    rows = question.batch / question.micro_batches / (size["data"] * size["fsdp"])
    tokens = rows * question.seq / (size["sequence"] * size["tensor"])
    kept = kept_bytes_per_token(config, question.remat, width)
    if kept is None:
        kept = kept_bytes_per_token(config, "projections", width) or 0
        kept += config.num_layers * width * (4 * config.hidden_size + config.intermediate_size)
    layer = sum(math.prod(spec.shape) for spec in all_specs(_one_layer(config))) / size["tensor"]
    wide = 3 * config.intermediate_size + 2 * config.num_heads * config.head_dim + 4 * config.hidden_size
    queries = math.gcd(question.seq, PackedAttentionReference.queries)
    if _fused(question, "packed_attention"):
        queries = 0
    scores = 3 * 4 * rows * config.num_heads / size["tensor"] * queries * question.seq / size["sequence"]
    logits = min(LOGITS_BYTES, 4 * tokens * config.vocab_size)
    table = config.vocab_size * config.hidden_size / size["tensor"]
    # libtpu keeps the gathered table a second time for v6e and tpu7x, and not for v5e and v5p: half of it, then.
    again = 0.5 * width * table if question.chips.chip.jax_platform == "tpu" else 0.0
    return {
        "parameters": 4 * parameters,
        "optimizer": 4 * (parameters + second),
        "weights": width * matrices if width < 4 else 0.0,
        # Compilers keep a gradient as it was computed and make it f32 in the update; sums of micro-batches are f32.
        "gradients": width * matrices + (4 * parameters if question.micro_batches > 1 else 0),
        "activations": kept * tokens,
        "layer": max(2 * width * layer + width * tokens * wide + scores, logits + (width + 4) * table + again),
    }


def _one_layer(config: ModelConfig) -> Any:
    layers: Any = specs(Decoder, config).layers
    return layers[0]
