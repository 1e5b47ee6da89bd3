"""The references lower to the portable subset: what Trainium's compiler refuses is not in them (design, law 3)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from anypool.engine.runner import step_logits
from anypool.models import ModelConfig, RopeConfig
from anypool.models.decoder import Decoder, forward_dense, logits
from anypool.models.params import abstract, specs
from anypool.ops.kernels import reference
from anypool.ops.sampling import Sampler, SamplingRows, sample
from tests.ops.portable import refused

CONFIG = ModelConfig(
    model_type="qwen3", vocab_size=96, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=16, max_position=256, rms_norm_eps=1e-5, rope=RopeConfig(), qk_norm=True,
)  # fmt: skip


def lowered(function: Any, *args: Any) -> str:
    text: str = jax.jit(function).trace(*args).lower(lowering_platforms=("neuron",)).as_text()
    return text


def i32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def programs() -> dict[str, str]:
    kernels, params = reference(), abstract(specs(Decoder, CONFIG), jnp.float32)
    cache = jax.ShapeDtypeStruct(kernels.paged_attention.cache_shape(9, 2, 16), jnp.float32)
    step = partial(step_logits, decode=3, config=CONFIG, kernels=kernels)
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), SamplingRows.neutral(4, 8))
    scores = jax.ShapeDtypeStruct((4, 96), jnp.float32)
    sampler = Sampler(draw=True, filters=True, edits=8, logprobs=True)
    return {
        "dense": lowered(
            lambda p, t, s: logits(p, forward_dense(p, t, s, CONFIG, kernels), kernels), params, i32(2, 24), i32(2, 24)
        ),
        "step": lowered(step, params, (cache,) * 2, i32(35), i32(5), i32(5), i32(5, 8), i32(4)),
        "sample": lowered(partial(sample, sampler=sampler), scores, rows),
    }


PROGRAMS = programs()


@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_is_refused(name: str) -> None:
    assert refused(PROGRAMS[name]) == []


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (lambda x: jax.lax.top_k(x, 2)[0], "top-k"),
        (lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y, lambda y: -y, x), "branch"),
        (lambda x: jnp.argmax(x, axis=-1), "variadic-reduce"),
        (lambda x: x.astype(jnp.int32) @ x.astype(jnp.int32).T, "integer-dot"),
    ],
)
def test_the_rules_find_what_they_should(function: Any, rule: str) -> None:
    found = refused(lowered(function, jax.ShapeDtypeStruct((4, 8), jnp.float32)))
    assert [line.partition(":")[0] for line in found] == [rule]
