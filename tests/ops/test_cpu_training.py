"""The compiled CPU kernels of a training step: values and gradients as those of the references, the same bits twice."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anypool.ops import choose, cpu
from anypool.ops.kernels import REFERENCES

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


def rng(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed + sum(shape)).standard_normal(shape, np.float32))


def value_and_gradients(function: Any, *arrays: jax.Array) -> tuple[Any, ...]:
    """The result, and the gradient in every array of its sum weighted at random."""

    def weighted(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = function(*arrays)
        return jnp.sum(out * rng(*out.shape, seed=7)), out

    gradients, out = jax.jit(jax.grad(weighted, argnums=range(len(arrays)), has_aux=True))(*arrays)
    return out, *gradients


def assert_as_reference(op: str, call: Any, *arrays: jax.Array, tolerance: float = 2e-5) -> None:
    ours, again = (value_and_gradients(lambda *a: call(cpu.TRAINING[op], *a), *arrays) for _ in range(2))
    theirs = value_and_gradients(lambda *a: call(REFERENCES[op], *a), *arrays)
    for a, b, c in zip(ours, theirs, again, strict=True):
        assert np.isfinite(a).all()
        assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())
        assert np.array_equal(a, c)


def places(rows: int, length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Segments and positions of packed rows: a few sequences in each, then padding."""
    generator = np.random.default_rng(seed)
    starts = generator.random((rows, length)) < 4 / length
    starts[:, 0] = True
    order = np.arange(length)
    segments = np.cumsum(starts, axis=1)
    segments[:, length - length // 10 :] = 0
    first = np.maximum.accumulate(np.where(starts, order, 0), axis=1)
    return segments.astype(np.int32), (order - first).astype(np.int32)


@pytest.mark.parametrize(
    ("rows", "length", "heads", "dim", "window"),
    [
        (2, 1, (1, 1), 16, None),
        (2, 33, (4, 2), 48, 1),
        (3, 70, (3, 3), 64, None),
        (1, 200, (6, 2), 128, 20),
        (1, 40, (2, 1), 256, None),
    ],
)
def test_packed_attention(rows: int, length: int, heads: tuple[int, int], dim: int, window: int | None) -> None:
    segments, positions = places(rows, length)

    def call(op: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        return op(q, k, v, segments, positions, segments, positions, window, dim**-0.5)

    keys = (rows, length, heads[1], dim)
    q, k, v = rng(rows, length, heads[0], dim), rng(*keys, seed=1), rng(*keys, seed=2)
    assert_as_reference("packed_attention", call, q, k, v)


def test_packed_attention_of_a_part_of_the_queries_and_of_some_that_see_nothing() -> None:
    segments, positions = places(2, 96)
    part = slice(48, 96)
    lost = segments[:, part].copy()
    lost[0, 3:40] = 99  # in no segment that a key is of

    def call(op: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        return op(q, k, v, lost, positions[:, part], segments, positions, None, 0.25)

    keys = (2, 96, 2, 32)
    assert_as_reference("packed_attention", call, rng(2, 48, 4, 32), rng(*keys, seed=1), rng(*keys, seed=2))


def test_packed_attention_with_large_scores() -> None:
    """The largest score is taken off before anything is raised to it, so none overflows."""
    segments, positions = places(1, 64)

    def call(op: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        return op(q, k, v, segments, positions, segments, positions, None, 1.0)

    keys = (1, 64, 1, 16)
    assert_as_reference("packed_attention", call, 40 * rng(1, 64, 1, 16), rng(*keys, seed=1), rng(*keys, seed=2))


@pytest.mark.parametrize(
    ("tokens", "width", "outputs"),
    [(1, 1, 1), (5, 300, 7), (40, 17, 130), (260, 33, 65), (700, 270, 96), (64, 576, 192)],
)
def test_linear(tokens: int, width: int, outputs: int) -> None:
    x, w, other = rng(1, tokens, width), rng(outputs, width), rng(3, width)
    assert_as_reference("linear", lambda op, *a: jnp.concatenate(op.apply(*a), axis=-1), x, w, other, tolerance=1e-5)
    op, bar = cpu.TRAINING["linear"], rng(1, tokens, outputs)
    exact = np.asarray(x, np.float64)[0] @ np.asarray(w, np.float64).T
    assert np.abs(op.logits(x, w)[0] - exact).max() <= 1e-5 * np.abs(exact).max()
    for a, b in zip(op.logits_back(bar, x, w), REFERENCES["linear"].logits_back(bar, x, w), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


def test_cross_entropy() -> None:
    logits, weights = 30 * rng(2, 9, 103), jnp.abs(rng(2, 9)).at[0, 3].set(0.0)
    targets = jnp.asarray(np.random.default_rng(0).integers(0, 103, (2, 9))).at[1, 1].set(-100)
    for z_loss in (0.0, 1e-2):
        ours, theirs = (
            kernels["cross_entropy"](logits, targets, weights, z_loss) for kernels in (cpu.TRAINING, REFERENCES)
        )
        for a, b in zip(ours, theirs, strict=True):
            assert np.abs(a - b).max() <= 1e-5 * max(1.0, np.abs(b).max())


def test_cross_entropy_over_a_large_vocabulary() -> None:
    logits = 3 * rng(8, 49152)
    _, _, bar = cpu.TRAINING["cross_entropy"](logits, jnp.full(8, -1), jnp.ones(8), 0.0)
    assert np.abs(np.asarray(bar, np.float64).sum(axis=1) - 1).max() < 5e-7


def test_what_is_not_a_number_is_not_hidden() -> None:
    bad, one = jnp.full((1, 40), jnp.nan), jnp.ones(1)
    assert np.isnan(cpu.TRAINING["cross_entropy"](bad, jnp.zeros(1, jnp.int32), one, 0.0)[0])
    some = jnp.zeros((1, 40)).at[0, 30].set(jnp.nan)
    assert np.isnan(cpu.TRAINING["cross_entropy"](some, jnp.zeros(1, jnp.int32), one, 0.0)[0])
    q, places = jnp.full((1, 8, 1, 16), jnp.nan), jnp.zeros((1, 8), jnp.int32)
    out, *bars = value_and_gradients(
        lambda *qkv: cpu.TRAINING["packed_attention"](*qkv, places, places, places, places, None, 1.0), q, q, q
    )
    assert all(np.isnan(x).all() for x in (out, *bars))


@pytest.mark.parametrize(("rows", "width"), [(1, 5), (64, 16), (65, 50), (200, 576)])
def test_rms_norm(rows: int, width: int) -> None:
    x, scale = rng(2, rows, width), rng(width)
    assert_as_reference("rms_norm", lambda op, x, scale: op(x, scale, 1e-5), x, scale)


@pytest.mark.parametrize("size", [1, 16, 100, 40001])
def test_silu_mul(size: int) -> None:
    gate, up = 8 * rng(size), rng(size, seed=1)
    assert_as_reference("silu_mul", lambda op, gate, up: op(gate, up), gate, up)


def test_silu_mul_far_out() -> None:
    gate = jnp.asarray([-3e38, -200.0, -0.0, 0.0, 200.0, 3e38], jnp.float32)
    for of_gate in value_and_gradients(lambda g: cpu.TRAINING["silu_mul"](g, jnp.ones(6)), gate):
        assert np.isfinite(of_gate).all()


def test_what_is_chosen_for_training_and_what_is_refused() -> None:
    def chosen(dtype: Any, head_dim: int, **settings: Any) -> dict[str, str]:
        return choose("cpu", dtype, head_dim, train=True, **settings).report()

    assert set(chosen(jnp.float32, 64).values()) == {"cpu"}
    assert set(chosen(jnp.float32, 64, faster=False).values()) == {"reference"}
    assert chosen(jnp.float32, 40)["packed_attention"] == "reference (head_dim 40 is not a multiple of 16 up to 256)"
    assert chosen(jnp.bfloat16, 64)["silu_mul"] == "reference (the CPU kernels compute in float32, not bfloat16)"
