"""Cross-entropy by chunks against the plain formula; the products and the lookup that it and the model rest on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anypool.ops.attention import PackedAttentionReference, attention, causal_mask
from anypool.ops.contract import contract
from anypool.ops.linear import LinearReference
from anypool.train.loss import LOGITS_BYTES, chunks_for, cross_entropy
from tests.train.conftest import assert_close

Z = 1e-2


def arrays(*shapes, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(shape, np.float32) for shape in shapes]


def plain(hidden, table, targets, weights):
    logits = jnp.einsum("btd,vd->btv", hidden, table)
    z = jax.nn.logsumexp(logits, -1)
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    entropy, penalty = jnp.sum(weights * (z - chosen)), jnp.sum(weights * Z * z**2)
    return entropy + penalty, (entropy, penalty)


@pytest.mark.parametrize(("chunks", "shards"), [(1, 1), (4, 1), (2, 3), (1, 4)])
def test_cross_entropy_is_the_formula(chunks, shards):
    hidden, table = arrays((2, 24, 8), (50, 8))
    hidden *= 4
    generator = np.random.default_rng(1)
    targets, weights = generator.integers(0, 50, (2, 24)), (generator.random((2, 24)) < 0.7).astype(np.float32)

    def ours(hidden, table, targets, weights):
        return cross_entropy(hidden, table, targets, weights, Z, chunks, shards)

    found, expected = (
        jax.jit(jax.value_and_grad(lambda h, t, of=of: of(h, t, targets, weights), (0, 1), has_aux=True))(hidden, table)
        for of in (ours, plain)
    )
    assert_close(found, expected, 1e-5)
    assert_close(ours(hidden, table, targets, weights), expected[0], 1e-5)


def test_cross_entropy_of_extreme_logits_is_finite():
    hidden, table = np.full((1, 2, 1), 1e4, np.float32), np.array([[1.0], [-1.0]], np.float32)
    value, bars = jax.value_and_grad(lambda h: cross_entropy(h, table, np.array([[0, 1]]), np.ones((1, 2)), 0.0)[0])(
        hidden
    )
    assert float(value) == 2e4
    assert np.isfinite(bars).all()


def test_chunks_divide_the_length_and_keep_logits_small():
    assert chunks_for(1, 4096, 32000) == 2
    assert chunks_for(8, 96, 50) == 1
    for rows, length, vocab in ((4, 4096, 128256), (1, 3 * 512, 151936), (1, 7, 10**9)):
        chunks = chunks_for(rows, length, vocab)
        assert length % chunks == 0
        assert 4 * rows * (length // chunks) * vocab <= LOGITS_BYTES or chunks == length


def test_products_of_bf16_multiply_bf16_both_ways():
    x, w = (jnp.asarray(a, jnp.bfloat16) for a in arrays((4, 8), (6, 8)))
    text = jax.jit(jax.grad(lambda x, w: jnp.sum(contract("ax,yx->ay", x, w) ** 2), (0, 1))).lower(x, w).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) == 3
    assert all("bf16>, tensor" in line and "bf16>) -> tensor" in line and "xf32>" in line for line in products)


def test_products_have_the_gradient_of_einsum():
    a, b = arrays((2, 3, 4, 5), (2, 7, 4, 5))
    subscripts = "btnh,bsnh->bnts"
    ours, theirs = (
        jax.grad(lambda a, b, of=of: jnp.sum(jnp.sin(of(subscripts, a, b))), (0, 1))(a, b)
        for of in (contract, jnp.einsum)
    )
    assert_close(ours, theirs, 1e-5)


def test_a_frequent_row_of_a_bf16_table_loses_no_gradient():
    table, ids = jnp.zeros((3, 2), jnp.bfloat16), jnp.array([1] * 3072 + [2])
    bar = jax.grad(lambda t: jnp.sum(LinearReference().embed(t, ids).astype(jnp.float32)))(table)
    assert bar.astype(jnp.float32).tolist() == [[0, 0], [3072, 3072], [1, 1]]


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("queries", [64, 256])
def test_packed_attention_is_dense_attention(window, queries):
    q, k, v = arrays((2, 192, 4, 8), (2, 192, 2, 8), (2, 192, 2, 8))
    segments = np.repeat([[1, 2, 3], [1, 1, 2]], 64, axis=1)
    first = np.array([[0, 64, 128], [0, 0, 128]])
    positions = np.arange(192) - np.repeat(first, 64, axis=1)
    op = PackedAttentionReference(queries=queries)

    def ours(q, k, v):
        return op(q, k, v, segments, positions, segments, positions, window, 0.3)

    def dense(q, k, v):
        return attention(q, k, v, causal_mask(segments, window), 0.3)

    found, expected = (
        jax.jit(jax.value_and_grad(lambda *x, of=of: jnp.sum(jnp.sin(of(*x))), (0, 1, 2)))(q, k, v)
        for of in (ours, dense)
    )
    assert_close(found, expected, 1e-5)
    part = op(q[:, 64:128], k, v, segments[:, 64:128], positions[:, 64:128], segments, positions, window, 0.3)
    assert_close(part, dense(q, k, v)[:, 64:128], 1e-5)
