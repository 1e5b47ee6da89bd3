"""A model changed to use what Trainium refuses is rejected with the rule and the line; our own programs pass."""

import inspect
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from anypool.check import Finding, errors, lint, lint_traced
from anypool.check.neuron_rules import BY_ID, RULES
from anypool.check.stablehlo import trip_count, walk
from anypool.engine.runner import step_logits
from anypool.models import ModelConfig, RopeConfig
from anypool.models.decoder import Decoder, forward_dense, logits
from anypool.models.params import abstract, specs
from anypool.ops.kernels import reference
from anypool.ops.sampling import Sampler, SamplingRows, sample

CONFIG = ModelConfig(
    model_type="qwen3", vocab_size=96, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=16, max_position=256, rms_norm_eps=1e-5, rope=RopeConfig(), qk_norm=True,
)  # fmt: skip
X = jax.ShapeDtypeStruct((4, 8), jnp.float32)


def findings(function: Any, *args: Any, chip: str = "trn2") -> list[Finding]:
    return lint_traced(jax.jit(function).trace(*args), chip)[1]


def model(change: Any) -> Any:
    """The scores of a model with `change` made to them, as somebody's edit of the forward pass would."""
    kernels = reference()

    def scored(params: Decoder, tokens: Any, segments: Any) -> Any:
        return change(logits(params, forward_dense(params, tokens, segments, CONFIG, kernels), kernels))

    return scored


def with_top_k(scores: Any) -> Any:
    return lax.top_k(scores, 4)[0]


def with_cond(scores: Any) -> Any:
    return lax.cond(scores[0, 0, 0] > 0, lambda x: x, lambda x: -x, scores)


def with_argmax(scores: Any) -> Any:
    return jnp.argmax(scores, axis=-1)


def with_print(scores: Any) -> Any:
    jax.debug.print("peak {}", scores.max())
    return scores


def with_f64(scores: Any) -> Any:
    return scores.astype(jnp.float64) * 2.0


def with_sort(scores: Any) -> Any:
    return jnp.sort(scores, axis=-1)


def with_while(scores: Any) -> Any:
    return lax.while_loop(lambda x: x.sum() < 10, lambda x: x + 1, scores)


def with_bincount(scores: Any) -> Any:
    return jnp.bincount(scores[0, 0].astype(jnp.int32), length=5)


def with_integer_product(scores: Any) -> Any:
    return scores[0].astype(jnp.int8) @ scores[0].astype(jnp.int8).T


def with_fft(scores: Any) -> Any:
    return jnp.fft.fft(scores)


def with_cholesky(scores: Any) -> Any:
    return jnp.linalg.cholesky(scores[0, :4, :4])


def with_precision(scores: Any) -> Any:
    return lax.reduce_precision(scores, 5, 10)


def with_approximate(scores: Any) -> Any:
    return lax.approx_max_k(scores, 2)[0]


def with_f8(scores: Any) -> Any:
    return scores.astype(jnp.float8_e4m3fn).astype(jnp.float32)


def with_shift(scores: Any) -> Any:
    return scores.astype(jnp.int16) >> 2


def with_qr(scores: Any) -> Any:
    return jnp.linalg.qr(scores[0, :4, :4])[0]


CHANGES = [
    (with_top_k, "top-k", "lax.top_k"),
    (with_cond, "branch", "lax.cond"),
    (with_argmax, "variadic-reduce", "jnp.argmax"),
    (with_print, "host-transfer", "jax.debug.print"),
    (with_sort, "sort", "jnp.sort"),
    (with_while, "dynamic-loop", "lax.while_loop"),
    (with_bincount, "integer-scatter", "jnp.bincount"),
    (with_integer_product, "integer-dot", " @ "),
    (with_fft, "complex", "fft"),
    (with_cholesky, "unsupported-operation", "cholesky"),
    (with_precision, "unsupported-operation", "reduce_precision"),
    (with_approximate, "custom-call", "approx_max_k"),
    (with_f8, "f8-kind", "astype"),
    (with_shift, "arithmetic-shift", ">>"),
]


@pytest.mark.parametrize(("change", "rule", "text"), CHANGES, ids=[rule for _, rule, _ in CHANGES])
def test_a_changed_model_is_rejected_with_the_rule_and_the_line(change: Any, rule: str, text: str) -> None:
    params = abstract(specs(Decoder, CONFIG), jnp.float32)
    tokens = jax.ShapeDtypeStruct((2, 24), jnp.int32)
    found = [f for f in errors(findings(model(change), params, tokens, tokens)) if f.rule == rule]
    assert found, rule
    lines, first = inspect.getsourcelines(change)
    line = first + next(i for i, source in enumerate(lines) if text in source and i > 0)
    assert f"{__file__}:{line}" in (found[0].where, *found[0].called_from)
    assert found[0].fix == BY_ID[rule].fix


def test_a_model_changed_to_f64_is_rejected_with_the_line() -> None:
    params = abstract(specs(Decoder, CONFIG), jnp.float32)
    tokens = jax.ShapeDtypeStruct((2, 24), jnp.int32)
    with jax.enable_x64(True):
        found = [f for f in errors(findings(model(with_f64), params, tokens, tokens)) if f.rule == "f64"]
    line = inspect.getsourcelines(with_f64)[1] + 1
    assert any(f"{__file__}:{line}" in (f.where, *f.called_from) for f in found)


def test_f64_is_rejected() -> None:
    with jax.enable_x64(True):
        found = findings(lambda x: x.astype(jnp.float64) * 2.0, X)
    assert {f.rule for f in errors(found)} == {"f64"}


def test_what_has_no_lowering_is_rejected_where_it_stands() -> None:
    from jax.experimental import pallas as pl

    def double(x_ref: Any, o_ref: Any) -> None:
        o_ref[...] = x_ref[...] * 2

    def kernel(x: Any) -> Any:
        return pl.pallas_call(double, out_shape=X)(x)

    (found,) = findings(kernel, X)
    assert found.rule == "no-lowering"
    assert found.operation == "pallas_call"
    assert found.where.startswith(__file__)


def test_warnings_do_not_reject() -> None:
    def warned(x: Any) -> Any:
        taken = jnp.take(x, jnp.array([0, 3, 9]), axis=0)
        return taken.sum() + (x**x).sum() + (x.astype(jnp.int32) // 3).sum() + jax.scipy.special.erf(x).sum()

    found = findings(warned, X)
    assert not errors(found)
    assert {"fill-gather", "power", "integer-division", "erf"} <= {f.rule for f in found}


def test_draws_from_jax_random_are_warned_of() -> None:
    key = jax.eval_shape(lambda: jax.random.key(0))
    found = findings(lambda k: jax.random.randint(k, (8,), 0, 7), key)
    assert "randint" in {f.rule for f in found}


def test_a_kind_that_only_the_newest_chip_takes() -> None:
    assert not errors(findings(with_f8, X, chip="trn3"))


def test_a_line_is_reported_once() -> None:
    def twice(x: Any) -> Any:
        return [lax.sort(row) for row in (x, x * 2, x * 3)]

    (found,) = errors(findings(twice, X))
    assert found.count == 3


def test_the_user_of_a_library_is_named() -> None:
    """A finding deep in the model says who called it."""
    (found,) = errors(findings(lambda x: with_sort(jnp.tanh(x)), X))
    assert found.where.startswith(__file__)
    assert any(line.startswith(__file__) for line in found.called_from)


def test_our_own_steps_pass() -> None:
    kernels, params = reference(), abstract(specs(Decoder, CONFIG), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct(kernels.paged_attention.cache_shape(9, 2, 16), jnp.bfloat16)

    def i32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    for decode, tiles in ((4, 0), (0, 2), (3, 2)):
        rows = decode + tiles
        step = partial(step_logits, decode=decode, config=CONFIG, kernels=kernels)
        arrays = (i32(decode + 16 * tiles), i32(rows), i32(rows), i32(rows, 8), i32(4))
        assert errors(findings(step, params, (cache,) * 2, *arrays)) == []
    neutral = SamplingRows.neutral(4, 8)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), neutral)
    sampler = Sampler(draw=True, filters=True, edits=8, logprobs=True)
    assert errors(findings(partial(sample, sampler=sampler), jax.ShapeDtypeStruct((4, 96), jnp.float32), shapes)) == []


@pytest.mark.parametrize(
    ("loop", "trips"),
    [
        (lambda x: lax.fori_loop(0, 7, lambda i, y: y * 2, x), 7),
        (lambda x: lax.fori_loop(2, 7, lambda i, y: y + i, x), 5),
        (lambda x: lax.scan(lambda c, row: (c + row, None), x[0], x)[0], 4),
        (lambda x: lax.scan(lambda c, row: (c + row, None), x[0], x, reverse=True)[0], 4),
        (lambda x: lax.while_loop(lambda s: s[0] < 9, lambda s: (s[0] + 2, s[1] * 2), (jnp.int32(1), x))[1], 4),
        (lambda x: lax.while_loop(lambda s: s[0] > 0, lambda s: (s[0] - 3, s[1] * 2), (jnp.int32(7), x))[1], 3),
        (lambda x: lax.while_loop(lambda y: y.sum() < 9, lambda y: y + 1, x), None),
    ],
)
def test_trip_counts(loop: Any, trips: int | None) -> None:
    module = jax.jit(loop).lower(X).compiler_ir("stablehlo")
    loops = [visit.op for visit in walk(module) if visit.op.name == "stablehlo.while"]
    assert [trip_count(op) for op in loops] == [trips]


def test_a_bound_known_only_at_run_time_is_no_trip_count() -> None:
    def loop(x: Any, n: Any) -> Any:
        return lax.fori_loop(0, n, lambda i, y: y * 2, x)

    found = errors(findings(loop, X, jax.ShapeDtypeStruct((), jnp.int32)))
    assert [f.rule for f in found] == ["dynamic-loop"]


def test_every_rule_says_what_to_write_instead_and_where_it_is_from() -> None:
    assert len(BY_ID) == len(RULES)
    for rule in RULES:
        assert rule.what and rule.fix and rule.source
        assert rule.grade in ("P", "S", "V")
        assert rule.severity in ("error", "warning")


def test_modules_from_jax_are_accepted_as_they_come() -> None:
    module = jax.jit(jnp.sort).lower(np.zeros((2, 3), np.float32)).compiler_ir("stablehlo")
    assert [f.rule for f in lint(module)] == ["sort"]
