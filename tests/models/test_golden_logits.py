"""The forward pass against transformers: a tiny model of each variant, and the bundled model.

How the goldens came about: tests/goldens/README.md.
"""

import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anypool.models import Checkpoint, ModelConfig
from anypool.models.decoder import Decoder, forward_dense, logits
from anypool.models.params import all_specs, load, specs
from anypool.ops.kernels import Kernels, choose
from tests.goldens import tiny
from tests.models.conftest import GOLDENS

RELATIVE_TOLERANCE = 2e-4

FASTER = pytest.mark.parametrize("faster", [False, True], ids=["reference", "fastest"])


def kernels_for(config: ModelConfig, faster: bool, dtype=jnp.float32) -> Kernels:
    return choose(jax.default_backend(), dtype, config.head_dim, faster=faster)


def load_model(directory: Path, faster: bool, dtype=jnp.float32):
    config = ModelConfig.load(directory)
    kernels = kernels_for(config, faster, dtype)

    def place(spec, array):
        array = np.asarray(array).astype(dtype)
        return jax.tree.map(jnp.asarray, kernels.linear.pack(array) if array.ndim == 2 else array)

    return load(specs(Decoder, config), Checkpoint.open(directory), place), config, kernels


def all_logits(model, ids, last: int | None = None) -> np.ndarray:
    """Logits f32 (T, V) of one text, or of its last positions."""
    params, config, kernels = model
    length = len(ids)
    # Tokens after a text change nothing in it, and few lengths are few programs to compile.
    tokens = np.zeros((1, -(-length // 64) * 64), np.int32)
    tokens[0, :length] = ids
    hidden = forward_dense(params, jnp.asarray(tokens), jnp.zeros_like(tokens), config, kernels)
    scores = np.asarray(logits(params, hidden, kernels)[0])
    return scores[length - (last or length) : length]


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a part of the largest logit of its position."""
    return float((np.abs(actual - expected).max(-1) / np.abs(expected).max(-1)).max())


@FASTER
@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_tiny(tmp_path, variant, faster):
    expected = np.load(GOLDENS / "tiny.npz")[variant]
    actual = all_logits(load_model(tiny.write(tmp_path, variant), faster), tiny.tokens(variant))
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape == (tiny.LENGTH, tiny.VOCAB)
    assert relative_error(actual, expected) < RELATIVE_TOLERANCE


def test_variants_differ_where_they_should(tmp_path):
    """A golden is worth something only if ignoring what makes its variant special would fail its test."""
    goldens = np.load(GOLDENS / "tiny.npz")
    ignoring = {
        "llama3": {"rope_scaling": None},
        "llama_linear": {"rope_scaling": None},
        "llama_yarn": {"rope_scaling": None},
        "mistral_window": {"sliding_window": None},
    }
    for variant, change in ignoring.items():
        directory = tiny.write(tmp_path / variant, variant)
        config = json.loads((directory / "config.json").read_text()) | change
        (directory / "config.json").write_text(json.dumps(config))
        actual = all_logits(load_model(directory, faster=False), tiny.tokens(variant))
        assert relative_error(actual, goldens[variant]) > 100 * RELATIVE_TOLERANCE, variant


@pytest.mark.parametrize("variant", ["llama3", "qwen2_tied", "qwen3"])
def test_bf16(tmp_path, variant):
    """bf16 keeps 8 bits of every number, so the logits agree with f32's to a few per cent."""
    model = load_model(tiny.write(tmp_path, variant), faster=True, dtype=jnp.bfloat16)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(model[0]))
    actual = all_logits(model, tiny.tokens(variant))
    expected = np.load(GOLDENS / "tiny.npz")[variant]
    assert actual.dtype == np.float32
    assert np.sqrt(np.mean((actual - expected) ** 2)) < 0.05 * expected.std()


def test_every_tensor_of_the_checkpoint_is_declared(smollm2):
    declared = {spec.name: spec.shape for spec in all_specs(specs(Decoder, ModelConfig.load(smollm2)))}
    assert Checkpoint.open(smollm2).check(declared) == ()


@cache
def bundled_model(directory: Path, faster: bool):
    return load_model(directory, faster)


@FASTER
@pytest.mark.parametrize("text", range(5))
def test_smollm2(smollm2, text, faster):
    goldens = np.load(GOLDENS / "smollm2_logits.npz")
    ids, positions = goldens[f"ids_{text}"], goldens[f"positions_{text}"]
    actual = all_logits(bundled_model(smollm2, faster), ids, last=len(positions))
    np.testing.assert_array_equal(positions, np.arange(len(ids))[-len(positions) :])
    for kept, columns in (
        ("top_values", goldens[f"top_ids_{text}"]),
        ("column_values", np.broadcast_to(goldens["columns"], (len(positions), len(goldens["columns"])))),
    ):
        expected = goldens[f"{kept}_{text}"]
        error = np.abs(np.take_along_axis(actual, columns, -1) - expected).max(-1)
        assert (error / np.abs(goldens[f"top_values_{text}"]).max(-1)).max() < RELATIVE_TOLERANCE
    np.testing.assert_array_equal(actual.argmax(-1), goldens[f"top_ids_{text}"][:, 0])
    peak = actual.max(-1, keepdims=True)
    logsumexp = np.log(np.exp((actual - peak).astype(np.float64)).sum(-1)) + peak[:, 0]
    np.testing.assert_allclose(logsumexp, goldens[f"logsumexp_{text}"], rtol=RELATIVE_TOLERANCE)


def test_smollm2_greedy_choices(smollm2):
    """At every position of transformers' greedy texts, the next token is our first choice too.

    By induction that is what generating token by token gives, at the price of one pass per text.
    """
    model = bundled_model(smollm2, True)
    for case in json.loads((GOLDENS / "smollm2_greedy.json").read_text()):
        output = case["output_ids"]
        scores = all_logits(model, case["prompt_ids"] + output[:-1], last=len(output))
        assert scores.argmax(-1).tolist() == output, case["prompt"]
