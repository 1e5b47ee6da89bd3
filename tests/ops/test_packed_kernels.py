"""Training's attention kernels, run by Pallas's interpreter: as the reference, in values and in gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anypool.ops.attention import PackedAttentionReference
from anypool.ops.gpu import TritonAttention
from anypool.ops.tpu import SplashAttention, packed

SPLASH = SplashAttention(interpret=True)
TRITON = TritonAttention(wide_bytes=256, widest_bytes=512, interpret=True)


def rows(T: int, *lengths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Segments and positions of packed rows, each of segments of the given lengths and padding."""
    segments, positions = np.zeros((len(lengths), T), np.int32), np.zeros((len(lengths), T), np.int32)
    for row, sizes in enumerate(lengths):
        at = 0
        for number, size in enumerate([*sizes, T - sum(sizes)], start=1):
            segments[row, at : at + size] = number if at + size < T else 0
            positions[row, at : at + size] = np.arange(size)
            at += size
    return segments, positions


def compared(kernel: Any, N: int, K: int, H: int, window: int | None, *lengths: tuple[int, ...]) -> None:
    T = 256
    rng = np.random.default_rng(N * H)
    q, bar = (rng.standard_normal((len(lengths), T, N, H), np.float32) for _ in range(2))
    k, v = (rng.standard_normal((len(lengths), T, K, H), np.float32) for _ in range(2))
    segments, positions = rows(T, *lengths)

    def both(attend: Any) -> Any:
        def weighed(q: Any, k: Any, v: Any) -> tuple[Any, Any]:
            out = attend(q, k, v, segments, positions, segments, positions, window, H**-0.5)
            return jnp.sum(out * bar), out

        (_, out), gradients = jax.jit(jax.value_and_grad(weighed, (0, 1, 2), has_aux=True))(q, k, v)
        return [out, *gradients]

    for ours, theirs in zip(both(kernel), both(PackedAttentionReference()), strict=True):
        assert np.abs(ours - theirs).max() < 3e-6 * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("N", "K", "H", "window", "lengths"),
    [
        (2, 1, 64, None, ((100, 90),)),
        (2, 2, 128, 70, ((130, 3),)),
    ],
    ids=["grouped, filled up", "window"],
)
def test_splash(N: int, K: int, H: int, window: int | None, lengths: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "LARGEST_BLOCK", 128)  # so that a row is of several blocks
    compared(SPLASH, N, K, H, window, *lengths)


@pytest.mark.parametrize(
    ("N", "K", "H", "lengths"),
    [(4, 2, 64, ((100, 90),)), (1, 1, 96, ((256,),))],
    ids=["grouped", "no power of two"],
)
def test_triton(N: int, K: int, H: int, lengths: Any) -> None:
    compared(TRITON, N, K, H, None, *lengths)


@pytest.mark.parametrize("kernel", [SPLASH, TRITON], ids=["splash", "triton"])
@pytest.mark.parametrize(("queries", "keys"), [(100, 100), (128, 256)])
def test_what_cannot_be_computed_is_refused(kernel: Any, queries: int, keys: int) -> None:
    q, k = jnp.zeros((1, queries, 2, 64)), jnp.zeros((1, keys, 2, 64))
    q_row, k_row = jnp.zeros((1, queries), jnp.int32), jnp.zeros((1, keys), jnp.int32)
    with pytest.raises(ValueError, match=f"{queries} queries and {keys} keys.* multiple of 128.*`choose` the length"):
        kernel(q, k, k, q_row, q_row, k_row, k_row, None, 1.0)


def test_triton_refuses_a_window() -> None:
    q, row = jnp.zeros((1, 128, 2, 64)), jnp.zeros((1, 128), jnp.int32)
    with pytest.raises(ValueError, match="the window 64"):
        TRITON(q, q, q, row, row, row, row, 64, 1.0)


def test_gradients_of_shared_heads_are_summed_in_f32() -> None:
    """256 heads of 1, 2^-9 of it each: bf16 would lose every one beside the first."""
    from anypool.ops.gpu.packed import _repeat

    bar = jnp.full((1, 1, 257, 1), 2.0**-9, jnp.bfloat16).at[0, 0, 0].set(1)
    (summed,) = jax.vjp(lambda x: _repeat(x, 257), jnp.zeros((1, 1, 1, 1), jnp.bfloat16))[1](bar)
    assert float(summed[0, 0, 0, 0]) == 1.5
