"""Adapters: the same training in PyTorch with PEFT (tests/goldens/make_lora.py), their files, what must not change."""

import json
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from anypool.models import Checkpoint, ModelConfig
from anypool.models.params import all_specs, initial, load, stack, unstack
from anypool.train import Batch, LoraConfig, OptimizerConfig, Schedule, StepConfig, TrainError
from anypool.train.lora import MODULES, adapter_config, load_adapter, merge, save_adapter, specs
from tests.goldens import tiny
from tests.goldens.training import LORA, LORA_RUN, VARIANT, adapter, answers, batch
from tests.models.conftest import GOLDENS
from tests.train.conftest import MODEL, assert_close, one_device, packed_rows, step_config

RUNS = json.loads((GOLDENS / "lora.json").read_text())["runs"]


@pytest.fixture(scope="module")
def base_directory(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("model"), VARIANT)


def as_peft_writes(directory, name, **changes):
    """The adapter of a golden run, with such a configuration as PEFT 0.21 writes."""
    settings = LORA[name]
    told = {
        "alora_invocation_tokens": None, "alpha_pattern": {}, "base_model_name_or_path": "base", "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "layer_replication": None,
        "layers_to_transform": None, "loftq_config": {}, "lora_alpha": settings["alpha"], "lora_bias": False,
        "lora_dropout": 0.0, "modules_to_save": None, "peft_type": "LORA", "r": settings["rank"], "rank_pattern": {},
        "target_modules": settings["modules"], "task_type": "CAUSAL_LM", "use_dora": False, "use_rslora": False,
    }  # fmt: skip
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(told | changes))
    save_file(adapter(name), directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(("name", "layers"), [("all", "scan"), ("attention", "unrolled")])
def test_twenty_steps_as_with_peft(name, layers, base_directory, tmp_path):
    model = ModelConfig.load(base_directory)
    lora, adapters = load_adapter(as_peft_writes(tmp_path, name), model, stacked=layers == "scan")
    assert (lora.rank, lora.alpha, list(lora.modules)) == tuple(LORA[name].values())
    schedule = Schedule(*(LORA_RUN[k] for k in ("learning_rate", "total_steps")), warmup_steps=LORA_RUN["warmup_steps"])
    optimizer = OptimizerConfig(schedule, **{k: LORA_RUN[k] for k in ("beta1", "beta2", "eps", "weight_decay")})
    config = StepConfig(model, optimizer, "float32", clip_norm=LORA_RUN["clip_norm"], layers=layers, lora=lora)
    step = one_device(config)
    state = step.place(adapters, load(config.model_specs, Checkpoint.open(base_directory), lambda _, a: np.array(a)))
    seen = []
    for i in range(LORA_RUN["steps"]):
        learned = answers(i) if name == "attention" else None
        state, metrics = step(state, Batch.from_rows(batch(i), learned_RT=learned, micro_batches=2))
        seen.append(metrics)
    for part, theirs in RUNS[name].items():
        ours = np.array([float(getattr(metrics, part)) for metrics in seen])
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, err_msg=part)


def lora_config(**changes):
    return step_config(lora=LoraConfig(rank=4, alpha=6.0), **changes)


def first_state(config, seed=0):
    """Adapters that have moved: B is no longer zero."""
    adapters = initial(config.specs, seed)
    moved = jax.tree.map(lambda a: a + np.float32(0.02), adapters)
    return one_device(config).place(moved, initial(config.model_specs, seed))


def test_a_merged_model_is_the_model_with_its_adapters():
    config = lora_config()
    state = first_state(config)
    rows = Batch.from_rows(**packed_rows(), micro_batches=2)
    entropy, tokens = one_device(config).evaluate(state, rows)
    whole = replace(config, lora=None)
    merged = merge(jax.tree.map(np.asarray, state.frozen), jax.tree.map(np.asarray, state.params), config.lora)
    expected, same = one_device(whole).evaluate(one_device(whole).place(merged), rows)
    assert float(entropy) == pytest.approx(float(expected), rel=1e-5)
    assert float(tokens) == float(same)
    plain, _ = one_device(whole).evaluate(one_device(whole).place(initial(whole.specs, 0)), rows)
    assert abs(float(entropy) - float(plain)) > 1e-4 * float(plain)  # the adapters do something


def test_a_new_adapter_changes_nothing_and_then_learns_with_its_base_untouched():
    config = lora_config()
    step, base = one_device(config), initial(config.model_specs, 0)
    rows = Batch.from_rows(**packed_rows(), micro_batches=2)
    state = step.place(initial(config.specs, 0), base)
    whole = one_device(replace(config, lora=None))
    assert float(step.evaluate(state, rows)[0]) == float(whole.evaluate(whole.place(base), rows)[0])
    frozen, losses = state.frozen, []
    for _ in range(12):
        before = state
        state, metrics = step(state, rows)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.95 * losses[0]
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before.params, before.moments)))
    assert state.frozen is frozen
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (frozen, base)), strict=True))
    assert len(jax.tree.leaves(state.params)) == len(jax.tree.leaves(state.moments.mu)) == 2 * len(MODULES)


def test_gradients_of_adapters_are_those_of_the_merged_weights():
    """With W' = W + s B A the chain rule gives dA = s B^T dW' and dB = s dW' A^T."""
    config = replace(lora_config(clip_norm=None), optimizer=replace(step_config().optimizer, beta1=0.0))
    whole = replace(config, lora=None)
    state = first_state(config)
    params, base = jax.tree.map(np.array, (state.params, state.frozen))
    rows = Batch.from_rows(**packed_rows(), micro_batches=2)
    found = one_device(config)(state, rows)[0].moments.mu
    full = one_device(whole)(one_device(whole).place(merge(base, params, config.lora)), rows)[0].moments.mu
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        adapter, of, w = (getattr(tree.layers, name) for tree in (params, found, full))
        scale = config.lora.scale
        assert_close(of.a, scale * adapter.b.swapaxes(1, 2) @ np.asarray(w), 1e-4)
        assert_close(of.b, scale * np.asarray(w) @ adapter.a.swapaxes(1, 2), 1e-4)


def test_the_base_has_no_gradient_and_no_moments():
    """Less is alive in a step than one gradient of the base would take; f32, as the CPU copies what is bf16."""
    config = lora_config(model=replace(MODEL, vocab_size=1024, hidden_size=64, intermediate_size=256))
    base = sum(np.prod(spec.shape) * 4 for spec in all_specs(config.model_specs))
    jax.config.update("jax_disable_most_optimizations", False)
    used = one_device(config).lower(rows=1, length=16).compile().memory_analysis()
    jax.config.update("jax_disable_most_optimizations", True)
    assert base < used.argument_size_in_bytes < 1.2 * base
    assert used.temp_size_in_bytes < 0.6 * base


def test_what_is_declared():
    lora = LoraConfig(rank=3, alpha=6.0, modules=("q_proj", "down_proj"))
    apart, stacked = specs(MODEL, lora), specs(MODEL, lora, stacked=True)
    assert lora.scale == 2.0
    assert {spec.name: spec.shape for spec in all_specs(apart)} == {
        f"base_model.model.model.layers.{i}.{module}.{half}.weight": shape
        for i in range(2)
        for module, half, shape in (
            ("self_attn.q_proj", "lora_A", (3, 32)), ("self_attn.q_proj", "lora_B", (64, 3)),
            ("mlp.down_proj", "lora_A", (3, 48)), ("mlp.down_proj", "lora_B", (32, 3)),
        )
    }  # fmt: skip
    q = stacked.layers.q
    assert (q.a.axes, q.b.axes) == (("layers", "rank", "embed"), ("layers", "heads", "rank"))
    first, again, other = (initial(apart, seed) for seed in (0, 0, 1))
    assert_close(first, again, 0)
    assert_close(jax.tree.leaves(unstack(initial(stacked, 0))), jax.tree.leaves(first), 0)
    a, b = first.layers[0].q.a, first.layers[0].q.b
    assert not np.array_equal(a, other.layers[0].q.a) and not np.array_equal(a, first.layers[1].q.a)
    assert a.dtype == np.float32 and not b.any()
    drawn = initial(specs(replace(MODEL, hidden_size=4096), lora), 0).layers[0].q.a  # uniform within 1 / sqrt(4096)
    assert np.abs(drawn).max() <= 1 / 64 and drawn.std() == pytest.approx(1 / 64 / 3**0.5, rel=0.02)


@pytest.mark.parametrize("stacked", [True, False])
def test_an_adapter_is_saved_and_loaded(stacked, tmp_path):
    lora = LoraConfig(rank=2, alpha=4.5, modules=("o_proj", "up_proj"))
    adapters = initial(specs(MODEL, lora, stacked), 0)
    save_adapter(tmp_path / "new", MODEL, lora, adapters, base="org/name")
    told, read = load_adapter(tmp_path / "new", MODEL, stacked)
    assert told == lora
    assert_close(read, adapters, 0)
    _, other = load_adapter(tmp_path / "new", MODEL, not stacked)
    assert_close(jax.tree.leaves(other), jax.tree.leaves((unstack if stacked else stack)(adapters)), 0)
    written = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert written == adapter_config(lora, "org/name")
    assert (written["base_model_name_or_path"], written["lora_alpha"]) == ("org/name", 4.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', and only 'LORA' is supported; merge it with PEFT"),
        ({"use_dora": True}, "use_dora is True, and only False is supported; merge it with PEFT"),
        ({"use_rslora": True}, "use_rslora is True, and only False is supported; merge it with PEFT"),
        ({"bias": "all"}, "bias is 'all', and only 'none' is supported; merge it with PEFT"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is {'q_proj': 8}, which is not supported; merge it with PEFT"),
        (
            {"modules_to_save": ["lm_head"]},
            "modules_to_save is ['lm_head'], which is not supported; merge it with PEFT",
        ),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base; convert the adapter"),
        ({"r": 0}, "r and lora_alpha must be numbers above 0"),
        ({"lora_alpha": None}, "r and lora_alpha must be numbers above 0"),
        ({"r": 3}, "is (2, 32), and of rank 3 beside q_proj, v_proj of every layer it is (3, 32)"),
    ],
)
def test_adapters_of_another_kind(changes, message, base_directory, tmp_path):
    with pytest.raises(TrainError, match=re.escape(message)):
        load_adapter(as_peft_writes(tmp_path, "attention", **changes), ModelConfig.load(base_directory))


def test_adapters_that_are_damaged(base_directory, tmp_path):
    model = ModelConfig.load(base_directory)
    with pytest.raises(TrainError, match=r"adapter_config.json cannot be read .*; save the adapter again with PEFT"):
        load_adapter(tmp_path, model)
    file = as_peft_writes(tmp_path, "attention") / "adapter_model.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    file.write_bytes(whole[:-1])
    with pytest.raises(TrainError, match=r"adapter_model.safetensors cannot be read"):
        load_adapter(tmp_path, model)
    save_file({"model.norm.weight": np.ones(3)}, file)
    with pytest.raises(TrainError, match="adapts none of q_proj, k_proj, v_proj"):
        load_adapter(tmp_path, model)
    lost = min(tensors)
    save_file({name: array for name, array in tensors.items() if name != lost}, file)
    with pytest.raises(TrainError, match=f"does not fit: {lost} is missing, and of rank 2"):
        load_adapter(tmp_path, model)
    save_file(tensors | {"base_model.model.lm_head.lora_A.weight": np.ones((2, 32), np.float32)}, file)
    with pytest.raises(TrainError, match=r"lm_head.lora_A.weight is \(2, 32\), .* it is not known"):
        load_adapter(tmp_path, model)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(TrainError, match="is no object of settings"):
        load_adapter(tmp_path, model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "the rank of LoRA is 0; a whole number of at least 1 is expected"),
        ({"alpha": 0.0}, "alpha of LoRA is 0.0; a number above 0 is expected"),
        ({"modules": ()}, "modules of LoRA is empty; there are q_proj, k_proj, v_proj, o_proj"),
        ({"modules": ("q_prj",)}, "modules of LoRA has 'q_prj'; there are .*; did you mean 'q_proj'?"),
        ({"modules": ("lm_head",)}, "modules of LoRA has 'lm_head'; there are q_proj"),
        ({"modules": ("q_proj", "q_proj")}, "modules of LoRA has 'q_proj' twice; name it once"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(TrainError, match=message):
        LoraConfig(**changes)


def test_a_base_belongs_to_lora():
    config = lora_config()
    whole = replace(config, lora=None)
    adapters, base = initial(config.specs, 0), initial(whole.specs, 0)
    with pytest.raises(TrainError, match=re.escape("lora is set, and the base is missing: place(adapters, base)")):
        one_device(config).place(adapters)
    with pytest.raises(TrainError, match="there is a base, and lora is None: set lora in StepConfig"):
        one_device(whole).place(base, base)
