"""Updates and learning rates against formulas written out here; what is decayed and what is orthogonalised."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from anypool.models.decoder import Decoder
from anypool.models.params import all_specs, each, initial, specs
from anypool.train import OptimizerConfig, Schedule, TrainError
from anypool.train.optimizer import MUON_COEFFICIENTS, moments, update
from tests.train.conftest import MODEL

TREE = specs(Decoder, MODEL, stacked=True)


def updates(kind, steps=3, **changes):
    """Name -> (values before, gradients, values after) of some updates with random gradients and a constant rate."""
    config = OptimizerConfig(Schedule(0.01, 10, "constant"), kind=kind, **changes)
    generator = np.random.default_rng(0)
    params = each(TREE, lambda spec: jnp.asarray(spec.initial(0) + 0.1))
    state = moments(config, TREE, lambda spec: jnp.zeros(spec.shape, jnp.float32))
    seen, one = [], jax.jit(partial(update, config, TREE))
    for step in range(steps):
        gradients = each(TREE, lambda spec: jnp.asarray(generator.standard_normal(spec.shape, np.float32)))
        after, state = one(jnp.int32(step), params, gradients, state, jnp.array(True))
        seen.append((params, gradients, after))
        params = after
    names = [spec.name for spec in all_specs(TREE)]
    return {name: [[np.asarray(all_specs(t)[i]) for t in one] for one in seen] for i, name in enumerate(names)}, config


def test_adamw_is_the_formula():
    found, config = updates("adamw")
    for name, steps in found.items():
        m = v = 0.0
        for i, (before, gradient, after) in enumerate(steps, 1):
            m = 0.9 * m + 0.1 * gradient
            v = 0.95 * v + 0.05 * gradient**2
            direction = (m / (1 - 0.9**i)) / (np.sqrt(v / (1 - 0.95**i)) + config.eps)
            decay = 0.0 if "norm" in name else 0.1
            np.testing.assert_allclose(after, before - 0.01 * (direction + decay * before), rtol=1e-5, atol=1e-6)


def test_muon_is_optax_muon():
    found, config = updates("muon", weight_decay=0.0)
    steps = found["model.layers.{i}.mlp.down_proj.weight"]
    axes = MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
    rule = scale_by_muon(MUON_COEFFICIENTS, beta=config.momentum, weight_dimension_numbers=axes)
    state = rule.init(jnp.zeros(steps[0][0].shape))
    for before, gradient, after in steps:
        direction, state = rule.update(jnp.asarray(gradient), state)
        expected = 0.01 * 0.2 * np.sqrt(48) * np.asarray(direction)
        np.testing.assert_allclose(before - after, expected, atol=1e-4 * np.abs(expected).max())


def test_muon_turns_layer_matrices_and_leaves_the_rest_to_adamw():
    muon, _ = updates("muon", steps=1, weight_decay=0.0)
    adamw, _ = updates("adamw", steps=1, weight_decay=0.0)
    turned = set()
    for name, ((before, gradient, after),) in muon.items():
        if np.array_equal(after, adamw[name][0][2]):
            continue
        turned.add(name.removeprefix("model.layers.{i}."))
        for moved, slope in zip((before - after) / 0.01, gradient, strict=True):
            found = np.linalg.svd(moved, compute_uv=False) / (0.2 * np.sqrt(max(moved.shape)))
            assert found.min() > 0.3  # Newton-Schulz takes all singular values near 1, by design not to 1
            assert found.max() < 1.3
            u, _, vt = np.linalg.svd(slope, full_matrices=False)
            assert np.sum(moved * (u @ vt)) > 0.9 * np.linalg.norm(moved) * np.linalg.norm(u @ vt)
    parts = ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp = ("gate_proj", "up_proj", "down_proj")
    assert turned == {f"self_attn.{n}.weight" for n in parts} | {f"mlp.{n}.weight" for n in mlp}


def test_muon_keeps_half_as_much():
    config = OptimizerConfig(Schedule(0.01, 10), kind="muon")
    kept = moments(config, TREE, lambda spec: spec.name)
    assert kept.nu.layers.q is None
    assert kept.nu.embed == kept.mu.embed == "model.embed_tokens.weight"


def rates(**settings):
    schedule = Schedule(peak=2.0, total_steps=10, final_fraction=0.25, **settings)
    return [round(float(schedule(jnp.int32(step))), 4) for step in (0, 1, 2, 4, 6, 8, 9, 10, 50)]


def test_schedules():
    assert rates(kind="constant", warmup_steps=2) == [1.0, 2, 2, 2, 2, 2, 2, 2, 2]
    assert rates(kind="linear", warmup_steps=2) == [1.0, 2, 2, 1.625, 1.25, 0.875, 0.6875, 0.5, 0.5]
    assert rates(kind="wsd", warmup_steps=2, decay_steps=4) == [1.0, 2, 2, 2, 2, 1.25, 0.875, 0.5, 0.5]
    cosine = [0.5 + 1.5 * (1 + np.cos(np.pi * min(step, 10) / 10)) / 2 for step in (0, 1, 2, 4, 6, 8, 9, 10, 50)]
    assert np.allclose(rates(kind="cosine"), cosine, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "step"}, "schedule is 'step'; there are cosine, linear, wsd, constant"),
        ({"peak": 0.0}, "the peak learning rate is 0.0; a number above 0 is expected"),
        ({"final_fraction": 2.0}, "final_fraction is 2.0; a number from 0 to 1 is expected"),
        ({"total_steps": 0}, "total_steps is 0; at least 1 is expected"),
        ({"warmup_steps": 11}, "warmup_steps 11 and decay_steps 0 do not fit into total_steps 10"),
        ({"kind": "wsd"}, "decay_steps is 0 with schedule 'wsd'; it belongs to 'wsd', which needs it"),
        ({"decay_steps": 3}, "decay_steps is 3 with schedule 'cosine'; it belongs to 'wsd', which needs it"),
    ],
)
def test_bad_schedules(settings, message):
    with pytest.raises(TrainError, match=message):
        Schedule(**{"peak": 1.0, "total_steps": 10} | settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "sgd"}, "optimizer is 'sgd'; there are adamw, muon"),
        ({"beta2": 1.0}, "beta2 is 1.0; a number from 0 to below 1 is expected"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1; a number of at least 0 is expected"),
    ],
)
def test_bad_optimizers(settings, message):
    with pytest.raises(TrainError, match=message):
        OptimizerConfig(Schedule(1.0, 10), **settings)


def test_initial_values_do_not_depend_on_stacking():
    apart, together = initial(specs(Decoder, MODEL), 3), initial(TREE, 3)
    assert np.array_equal(np.stack([layer.k for layer in apart.layers]), together.layers.k)
    assert np.array_equal(apart.embed, together.embed)
