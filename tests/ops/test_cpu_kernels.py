"""The compiled CPU kernels: equal to the references, and the same bits whatever else is in the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anypool.ops import choose, cpu
from anypool.ops.kernels import REFERENCES

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


def rng(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


@pytest.mark.parametrize("shape", [(1, 48, 32), (5, 100, 7), (12, 33, 96), (31, 64, 65), (40, 17, 130)])
def test_linear(shape: tuple[int, int, int]) -> None:
    tokens, depth, outputs = shape
    x, w, other = rng(tokens, depth), rng(outputs, depth), rng(3, depth)
    op = cpu.KERNELS["linear"]
    y, z = jax.jit(op.apply)(x, op.pack(w), op.pack(other))
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    assert np.abs(y - exact).max() < 1e-5 * np.abs(exact).max()
    assert np.abs(z - x @ other.T).max() < 1e-4


def test_linear_gives_a_row_the_same_bits_in_every_batch() -> None:
    op, x, w = cpu.KERNELS["linear"], rng(40, 64), rng(96, 64)
    run = jax.jit(lambda x, w: op.apply(x, w)[0])
    alone = np.asarray(run(x[:1], op.pack(w)))[0]
    for tokens in range(2, 41):
        assert np.array_equal(np.asarray(run(x[:tokens], op.pack(w)))[0], alone), tokens


def test_embedding_reads_packed_rows_and_clips() -> None:
    op, table = cpu.KERNELS["linear"], rng(70, 24)
    ids = np.array([0, 31, 32, 69, 500])
    assert np.array_equal(op.embed(jax.device_put(op.pack(table)), ids), table[[0, 31, 32, 69, 69]])


@pytest.mark.parametrize("width", [5, 16, 50, 576])
def test_rms_norm(width: int) -> None:
    x, scale = rng(3, 4, width), rng(width)
    ours = cpu.KERNELS["rms_norm"](x, scale, 1e-5)
    assert np.allclose(ours, REFERENCES["rms_norm"](jnp.asarray(x), scale, 1e-5), rtol=2e-6, atol=1e-6)


def test_silu_mul_over_the_whole_range() -> None:
    gate = np.concatenate([np.linspace(-200, 200, 4001, dtype=np.float32), [0.0, -0.0, 3e38, -3e38]]).astype(np.float32)
    up = np.ones_like(gate)
    with np.errstate(over="ignore"):
        exact = gate / (1 + np.exp(-gate.astype(np.float64)))
    assert np.allclose(cpu.KERNELS["silu_mul"](gate, up), exact, rtol=2e-6, atol=1e-35)


def test_kernels_refuse_what_they_cannot_do_and_say_so() -> None:
    chosen = choose("cpu", jnp.bfloat16, 64)
    assert chosen.report()["linear"] == "reference (the CPU kernels compute in float32, not bfloat16)"
    assert choose("cpu", jnp.float32, 40).report()["paged_attention"].startswith("reference (head_dim 40 is not")
    assert set(choose("cpu", jnp.float32, 64).report().values()) == {"cpu"}
