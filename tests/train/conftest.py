"""A tiny model and a step for it, as the tests of training use them."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from anypool.models import ModelConfig, RopeConfig
from anypool.models.params import initial
from anypool.ops.kernels import reference
from anypool.train import OptimizerConfig, Schedule, StepConfig, TrainState, TrainStep, single_device

MODEL = ModelConfig(
    model_type="qwen3", vocab_size=96, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=16, max_position=256, rms_norm_eps=1e-5, rope=RopeConfig(), qk_norm=True,
)  # fmt: skip


def step_config(**changes: Any) -> StepConfig:
    """Everything on: z-loss, clipping, remat, a loop over the layers; in f32 unless told otherwise."""
    optimizer = OptimizerConfig(Schedule(1e-2, 100, warmup_steps=2), kind=changes.pop("kind", "adamw"))
    settings: dict[str, Any] = {"model": MODEL, "compute_dtype": "float32", "z_loss": 1e-3, "clip_norm": 1.0} | changes
    return StepConfig(optimizer=optimizer, **settings)


@pytest.fixture(autouse=True, scope="module")
def quick_compiler() -> Iterator[None]:
    """Compiling takes most of the time of these tests, and how fast the program is does not matter in them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@cache
def one_device(config: StepConfig) -> TrainStep:
    """The step on one device, compiled once for all tests."""
    return TrainStep(config, single_device(), reference())


def first_state(config: StepConfig) -> TrainState:
    return one_device(config).place(initial(config.specs, seed=0))


def packed_rows(rows: int = 8, length: int = 32, seed: int = 0) -> dict[str, np.ndarray]:
    """Arguments of `Batch.from_rows`: up to three sequences in a row and padding, some tokens not to be learned."""
    generator = np.random.default_rng(seed)
    ends = np.sort(generator.integers(4, length, (rows, 3)), axis=1)
    order = np.arange(length)
    segments = 1 + (order >= ends[:, :1]).astype(np.int32) + (order >= ends[:, 1:2])
    return {
        "tokens_RT": generator.integers(0, MODEL.vocab_size, (rows, length)),
        "segments_RT": np.where(order >= ends[:, 2:], 0, segments),
        "learned_RT": generator.random((rows, length)) < 0.8,
    }


def assert_close(ours: Any, theirs: Any, tolerance: float) -> None:
    """Every array of two trees, within a part of its largest value."""
    for a, b in zip(*(map(np.asarray, jax.tree.leaves(tree)) for tree in (ours, theirs)), strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-6)
