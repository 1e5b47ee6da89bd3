"""The same training in PyTorch: a golden of 50 steps (tests/goldens/make_training.py)."""

import json

import jax
import numpy as np
import pytest

from anypool.models import Checkpoint, ModelConfig
from anypool.models.params import load
from anypool.ops.kernels import reference
from anypool.train import Batch, OptimizerConfig, Schedule, StepConfig, TrainStep, single_device
from tests.goldens import tiny
from tests.goldens.training import RUN, VARIANT, answers, batch
from tests.models.conftest import GOLDENS

RUNS = json.loads((GOLDENS / "training.json").read_text())["runs"]


@pytest.fixture(scope="module")
def step_and_params(tmp_path_factory):
    directory = tiny.write(tmp_path_factory.mktemp("model"), VARIANT)
    schedule = Schedule(
        RUN["learning_rate"], RUN["total_steps"], warmup_steps=RUN["warmup_steps"], final_fraction=RUN["final_fraction"]
    )
    optimizer = OptimizerConfig(schedule, **{k: RUN[k] for k in ("beta1", "beta2", "eps", "weight_decay")})
    config = StepConfig(
        ModelConfig.load(directory), optimizer, compute_dtype="float32", clip_norm=RUN["clip_norm"], remat="projections"
    )
    params = load(config.specs, Checkpoint.open(directory), lambda spec, array: np.array(array))
    return TrainStep(config, single_device(), reference()), params


@pytest.mark.parametrize("name", RUNS)
def test_fifty_steps_as_in_pytorch(name, step_and_params):
    step, params = step_and_params
    state = step.place(params)
    ours = []
    for i in range(RUN["steps"]):
        learned = answers(i) if name == "answers" else None
        state, metrics = step(state, Batch.from_rows(batch(i), learned_RT=learned, micro_batches=2))
        ours.append(metrics)
    for part in ("loss", "gradient_norm", "learning_rate"):
        found = np.array([float(getattr(metrics, part)) for metrics in ours])
        np.testing.assert_allclose(found, RUNS[name][part], rtol=1e-4, err_msg=part)
    assert int(state.step) == RUN["steps"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
