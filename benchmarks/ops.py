"""The CPU kernels beside XLA's own: a decode step's products, norms and gates of SmolLM2-135M in f32.

    python benchmarks/ops.py [--rows 1 --rows 8] [--format json]

Both compute the same step in turns on the same weights; medians of the rounds, and the ratio of the medians.
"""

import argparse
import json
import os
import statistics
import time
from functools import partial
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from anypool.ops import Kernels, choose
from anypool.ops.kernels import reference

LAYERS, WIDTH, HEADS, KV_HEADS, MLP, VOCABULARY = 30, 576, 576, 192, 1536, 49152
SHAPES = {"q": (HEADS, WIDTH), "k": (KV_HEADS, WIDTH), "v": (KV_HEADS, WIDTH), "o": (WIDTH, HEADS)}
SHAPES |= {"gate": (MLP, WIDTH), "up": (MLP, WIDTH), "down": (WIDTH, MLP)}
PARAMETERS = LAYERS * sum(a * b for a, b in SHAPES.values()) + VOCABULARY * WIDTH


def weights(kernels: Kernels) -> tuple[list[dict[str, Any]], Any]:
    generator = np.random.default_rng(0)

    def packed(shape: tuple[int, int]) -> Any:
        return jax.device_put(kernels.linear.pack(generator.standard_normal(shape, np.float32) * np.float32(0.05)))

    return [{name: packed(shape) for name, shape in SHAPES.items()} for _ in range(LAYERS)], packed((VOCABULARY, WIDTH))


@partial(jax.jit, static_argnums=0)
def step(kernels: Kernels, layers: list[dict[str, Any]], head: Any, x: jax.Array) -> jax.Array:
    """Everything of a decode step but attention."""
    scale = jnp.ones(WIDTH)
    for layer in layers:
        q, k, v = kernels.linear.apply(kernels.rms_norm(x, scale, 1e-5), layer["q"], layer["k"], layer["v"])
        mixed = q + jnp.concatenate([k, v, k], axis=-1)  # stands for attention: every product must be needed
        x = x + kernels.linear.apply(mixed, layer["o"])[0]
        gate, up = kernels.linear.apply(kernels.rms_norm(x, scale, 1e-5), layer["gate"], layer["up"])
        x = x + kernels.linear.apply(kernels.silu_mul(gate, up), layer["down"])[0]
    scores: jax.Array = kernels.linear.logits(kernels.rms_norm(x, scale, 1e-5), head)
    return scores


def measure(rows: list[int], rounds: int) -> list[dict[str, float]]:
    engines = {"cpu": choose("cpu", jnp.float32, 64), "xla": reference()}
    held = {name: weights(kernels) for name, kernels in engines.items()}
    results = []
    for count in rows:
        x = jnp.asarray(np.random.default_rng(1).standard_normal((count, WIDTH), np.float32))
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for turn in range(rounds + 1):  # the first compiles and is not counted
            for name, kernels in engines.items():
                started = time.perf_counter()
                jax.block_until_ready(step(kernels, *held[name], x))
                if turn:
                    seconds[name].append(time.perf_counter() - started)
        ours, theirs = (statistics.median(seconds[name]) for name in ("cpu", "xla"))
        results.append(
            {
                "rows": count,
                "kernel_ms": round(ours * 1e3, 1),
                "kernel_gflop_per_second": round(2 * PARAMETERS * count / ours / 1e9, 1),
                "xla_ms": round(theirs * 1e3, 1),
                "ratio": round(theirs / ours, 2),
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, action="append", help="rows of the batch; give it several times")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--format", choices=("table", "json"), default="table")
    arguments = parser.parse_args()
    results = measure(arguments.rows or [1, 8, 32, 128, 256], arguments.rounds)
    if arguments.format == "json":
        print(json.dumps(results, indent=2))
        return
    print(f"{'rows':>5}  {'kernel ms':>9}  {'GFLOP/s':>8}  {'xla ms':>8}  {'ratio':>6}")
    for row in results:
        print(
            f"{row['rows']:5}  {row['kernel_ms']:9}  {row['kernel_gflop_per_second']:8}  "
            f"{row['xla_ms']:8}  {row['ratio']:6}"
        )


if __name__ == "__main__":
    main()
