"""The step with the compiled CPU kernels: what the references give, and the same bits twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anypool.models.params import initial
from anypool.ops import choose, cpu
from anypool.train import Batch, TrainState, TrainStep, single_device
from anypool.train.defaults import step_defaults
from tests.train.conftest import MODEL, assert_close, one_device, packed_rows, step_config

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


def three_steps(step: TrainStep) -> tuple[TrainState, list[float]]:
    state, losses = step.place(initial(step.config.specs, seed=0)), []
    for i in range(3):
        state, metrics = step(state, Batch.from_rows(**packed_rows(seed=i), micro_batches=2))
        losses.append(float(metrics.loss))
    return state, losses


@pytest.mark.parametrize("settings", [step_defaults("cpu"), {"layers": "scan", "remat": "projections"}])
def test_a_step_with_the_cpu_kernels(settings: dict[str, str]) -> None:
    config = step_config(**settings)
    kernels = choose("cpu", jnp.float32, MODEL.head_dim, train=True)
    assert set(kernels.report().values()) == {"cpu"}
    step = TrainStep(config, single_device(), kernels)
    (ours, losses), (again, _), (theirs, expected) = (
        three_steps(step),
        three_steps(step),
        three_steps(one_device(config)),
    )
    assert losses == pytest.approx(expected, rel=1e-5)
    assert_close(ours.moments, theirs.moments, 1e-3)
    assert all(map(np.array_equal, jax.tree.leaves(ours), jax.tree.leaves(again)))
