"""Dense attention against the formula in f64; paged attention against dense attention, for both implementations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anypool.ops import choose
from anypool.ops.attention import attention, causal_mask
from anypool.ops.kernels import Kernels, reference
from anypool.ops.paged_attention import BLOCK, token_positions

KERNELS = {"reference": reference(), "cpu": choose("cpu", jnp.float32, 16)}


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    chosen = KERNELS[request.param]
    if request.param == "cpu" and chosen.paged_attention.name != "cpu":
        pytest.skip(chosen.report()["paged_attention"])
    return chosen


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, scale: float) -> np.ndarray:
    """Attention in f64, one head at a time."""
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(*q.shape[:3]):
        head = n // (q.shape[2] // k.shape[2])
        seen = mask[b, t]
        if seen.any():
            scores = k[b, seen, head].astype(np.float64) @ q[b, t, n] * scale
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ v[b, seen, head] / weights.sum()
    return out


def arrays(*shapes: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(shape, np.float32) for shape in shapes]


def test_dense_attention_is_the_formula() -> None:
    q, k, v = arrays((2, 7, 6, 8), (2, 9, 2, 8), (2, 9, 2, 8))
    mask = np.random.default_rng(1).random((2, 7, 9)) < 0.6
    mask[0, 3] = False
    out = attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(mask), 0.3)
    assert np.allclose(out, exact(q, k, v, mask, 0.3), atol=1e-5)
    assert not np.asarray(out)[0, 3].any()


def test_dense_attention_has_finite_gradients_where_nothing_is_seen() -> None:
    q, k, v = arrays((1, 3, 2, 8), (1, 3, 2, 8), (1, 3, 2, 8))
    mask = jnp.zeros((1, 3, 3), bool)
    gradients = jax.grad(lambda q, k, v: attention(q, k, v, mask, 1.0).sum(), argnums=(0, 1, 2))(q, k, v)
    assert all(np.isfinite(g).all() for g in gradients)


def test_causal_mask_keeps_segments_and_windows_apart() -> None:
    mask = np.asarray(causal_mask(jnp.array([[0, 0, 0, 1, 1]]), window=2))[0]
    assert mask.astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def run_rows(
    kernels: Kernels,
    cache: jax.Array,
    parts: list[tuple[int, int, int]],
    sequences: list[list[np.ndarray]],
    tables: np.ndarray,
    decode: int,
    tiles: int,
    window: int | None,
) -> tuple[np.ndarray, jax.Array, list[int]]:
    """One step; `parts` are (sequence, start, count) for each row, `sequences` their q, k, v."""
    rows, tokens = decode + tiles, decode + BLOCK * tiles
    width = tables.shape[1]
    start, count = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    table = np.zeros((rows, width), np.int32)
    packed = [np.zeros((tokens, *one.shape[1:]), np.float32) for one in sequences[0]]
    for one in packed:
        one[...] = 7.0  # padding must not matter
    where: list[int] = []
    for row, (sequence, first, length) in enumerate(parts):
        start[row], count[row], table[row] = first, length, tables[sequence]
        offset = row if row < decode else decode + BLOCK * (row - decode)
        for target, source in zip(packed, sequences[sequence], strict=True):
            target[offset : offset + length] = source[first : first + length]
        where.extend(range(offset, offset + length))
    out, cache = jax.jit(kernels.paged_attention.apply, static_argnums=(7, 8, 9))(
        *packed, cache, start, count, table, decode, 0.25, window
    )
    return np.asarray(out), cache, where


@pytest.mark.parametrize("window", [None, 5, 16, 40])
def test_paged_attention_is_dense_attention(kernels: Kernels, window: int | None) -> None:
    lengths, heads, kv_heads, dim = (70, 33), 6, 2, 16
    sequences = [arrays((n, heads, dim), (n, kv_heads, dim), (n, kv_heads, dim), seed=n) for n in lengths]
    dense = []
    for length, (q, k, v) in zip(lengths, sequences, strict=True):
        mask = np.asarray(causal_mask(jnp.zeros((1, length), jnp.int32), window))
        dense.append(exact(q[None], k[None], v[None], mask, 0.25)[0])
    tables = np.array([[4, 9, 2, 7, 5], [3, 8, 1, 0, 0]], np.int32)
    cache = jnp.zeros(kernels.paged_attention.cache_shape(10, kv_heads, dim))

    # A chunk of each, then the rest of one beside the other's decoding, then both decoding with a padding row.
    steps = [
        ([(0, 0, 16), (0, 16, 16), (1, 0, 16), (1, 16, 16)], 0, 4),
        ([(1, 32, 1), (0, 32, 16), (0, 48, 16), (0, 64, 5)], 1, 3),
        ([(0, 69, 1), (1, 32, 1), (0, 0, 0), (0, 0, 0)], 4, 0),
    ]
    for parts, decode, tiles in steps:
        out, cache, where = run_rows(kernels, cache, parts, sequences, tables, decode, tiles, window)
        expected = np.concatenate([dense[s][first : first + n] for s, first, n in parts])
        assert np.allclose(out[where], expected, atol=2e-6)


def test_every_token_has_a_position() -> None:
    positions = token_positions(jnp.array([5, 9, 16]), decode=2)
    assert positions.tolist() == [5, 9, *range(16, 32)]
