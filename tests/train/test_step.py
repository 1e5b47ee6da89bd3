"""The train step against f64 NumPy and against itself: what must not change the numbers does not."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anypool.models.decoder import Decoder
from anypool.models.params import all_specs, initial, specs, stack, unstack
from anypool.ops.kernels import reference
from anypool.train import Batch, TrainError, TrainStep, single_device
from anypool.train.remat import KEPT, kept_bytes_per_token
from tests.train import numpy_model
from tests.train.conftest import MODEL, assert_close, first_state, one_device, packed_rows, step_config


def unclipped(**changes):
    """A first moment that starts at 0 and forgets everything is the gradient."""
    config = step_config(clip_norm=None, **changes)
    return replace(config, optimizer=replace(config.optimizer, beta1=0.0))


def gradients(batch, **changes):
    """Of the first step, and its metrics."""
    config = unclipped(**changes)
    state, metrics = one_device(config)(first_state(config), batch)
    return state.moments.mu, metrics


@pytest.fixture(scope="module")
def expected(quick_compiler):
    return gradients(Batch.from_rows(**packed_rows()))


def test_gradients_are_those_of_the_f64_model(expected):
    """Along random directions, the slope that finite differences find in the f64 loss of each sequence by itself."""
    rows = packed_rows() | {"learned_RT": None}
    bar, metrics = gradients(Batch.from_rows(**rows))
    tree = specs(Decoder, MODEL)
    names = [spec.name for spec in all_specs(tree)]
    tensors = dict(zip(names, (a.astype(np.float64) for a in jax.tree.leaves(initial(tree, 0))), strict=True))
    slopes = dict(zip(names, (np.asarray(a, np.float64) for a in jax.tree.leaves(unstack(bar))), strict=True))
    sequences = [
        row[segments == number]
        for row, segments in zip(rows["tokens_RT"], rows["segments_RT"], strict=True)
        for number in range(1, 4)
        if (segments == number).any()
    ]
    found = numpy_model.objective(MODEL, tensors, sequences, 1e-3)
    assert float(metrics.loss + metrics.z_loss) == pytest.approx(found, rel=1e-6)
    generator, size = np.random.default_rng(0), 1e-5
    for moved in (names, ["model.embed_tokens.weight"], ["lm_head.weight"], [n for n in names if "norm" in n]):
        along = {n: generator.standard_normal(tensors[n].shape) for n in moved}
        ends = [tensors | {n: tensors[n] + sign * size * along[n] for n in along} for sign in (1, -1)]
        up, down = (numpy_model.objective(MODEL, end, sequences, 1e-3) for end in ends)
        slope = sum((slopes[n] * along[n]).sum() for n in along)
        norm = np.sqrt(sum((slopes[n] ** 2).sum() for n in along))
        assert abs((up - down) / (2 * size) - slope) < 1e-4 * norm


def test_accumulation_is_one_large_batch(expected):
    bar, metrics = gradients(Batch.from_rows(**packed_rows(), micro_batches=4))
    assert_close(bar, expected[0], 1e-5)
    assert_close(metrics, expected[1], 1e-5)


def test_packed_segments_are_separate_sequences():
    rows = packed_rows(rows=2)

    def batch(rows):
        """As many rows as the other tests have; those added are padding."""
        return Batch.from_rows(**{name: np.pad(array, ((0, 8 - len(array)), (0, 0))) for name, array in rows.items()})

    alone = {name: np.zeros((6, 32), array.dtype) for name, array in rows.items()}
    for row, number in np.ndindex(2, 3):
        mine = rows["segments_RT"][row] == number + 1
        for name, array in rows.items():
            alone[name][3 * row + number, : mine.sum()] = array[row][mine]
    (packed, told), (separate, also_told) = gradients(batch(rows)), gradients(batch(alone))
    assert 0 < float(told.tokens) < rows["learned_RT"].sum()
    assert_close(packed, separate, 1e-5)
    assert_close(told, also_told, 1e-5)


def test_remat_changes_only_what_is_kept():
    """Equal gradients, and the memory that the compiler needs grows by what a policy says it keeps."""
    batch = Batch.from_rows(**packed_rows(length=64))
    model = replace(MODEL, num_layers=16)
    found, others = {}, {}
    for policy in KEPT:
        config = unclipped(remat=policy, model=model)
        compiled = one_device(config).lower(rows=8, length=64).compile()
        arguments = one_device(config).arguments(first_state(config), batch)
        found[policy] = compiled(*arguments)[0].moments.mu
        assert_close(found[policy], found["none"], 1e-5)
        kept = kept_bytes_per_token(model, policy, itemsize=4)
        if kept is not None:
            others[policy] = compiled.memory_analysis().temp_size_in_bytes - 8 * 64 * kept
    assert max(others.values()) - min(others.values()) < 0.25 * max(others.values())


def test_unrolled_is_scan(expected):
    bar, _ = gradients(Batch.from_rows(**packed_rows()), layers="unrolled")
    assert_close(stack(bar), expected[0], 1e-5)
    assert_close(bar, unstack(expected[0]), 1e-5)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_it_learns_and_twice_is_equal_in_every_bit(kind):
    same = Batch.from_rows(**packed_rows(), micro_batches=2)

    def run(dtype):
        config = step_config(kind=kind, compute_dtype=dtype)
        state, losses = first_state(config), []
        for _ in range(12):
            state, metrics = one_device(config)(state, same)
            losses.append(float(metrics.loss))
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((state.params, state.moments)))
        return state, losses

    (once, losses), (twice, same_losses) = run("bfloat16"), run("bfloat16")
    assert losses == same_losses
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (once, twice)), strict=True))
    assert losses[-1] < 0.8 * losses[0]
    if kind == "adamw":
        assert np.allclose(losses, run("float32")[1], rtol=0.03)


def test_the_state_is_donated_and_the_callers_arrays_are_not():
    config = unclipped()
    mine = jax.tree.map(jnp.asarray, initial(config.specs, 0))
    state = one_device(config).place(mine)
    one_device(config)(state, Batch.from_rows(**packed_rows()))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(mine))


def host(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same_bits(ours, theirs):
    assert all(a.tobytes() == b.tobytes() for a, b in zip(host(ours), host(theirs), strict=True))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_bad_step_is_skipped_and_changes_no_bit(kind):
    class Counted(TrainStep):
        def run(self, *arguments):
            traced.append(arguments)
            return super().run(*arguments)

    config = step_config(kind=kind)
    traced, step = [], Counted(config, single_device(), reference())
    good, other = (Batch.from_rows(**packed_rows(seed=seed)) for seed in (0, 1))
    state, first = step(first_state(config), good)
    assert float(first.skipped) == 0
    before, norm = host(state), float(first.gradient_norm)
    bad = {
        "a loss that is not a number": (replace(good, weights=np.where(good.weights > 0, np.nan, 0)), np.inf),
        "an infinite loss": (replace(good, weights=good.weights * np.float32(3e38)), np.inf),
        "a gradient above the limit": (good, 1e-3 * norm),
        "no limit but a broken one": (good, np.nan),
    }
    for i, (what, (batch, limit)) in enumerate(bad.items(), 2):
        state, metrics = step(state, batch, limit)
        assert float(metrics.skipped) == 1, what
        assert int(state.step) == i
        assert_same_bits(host((state.params, state.moments)), before[1:])
    counted = int(state.step)
    state, metrics = step(state, other, 100 * norm)
    assert float(metrics.skipped) == 0
    assert len(traced) == 1  # a new limit compiles nothing
    # As if the steps before had been made: only the count is another.
    again = jax.tree.unflatten(jax.tree.structure(state), [jnp.asarray(a) for a in [np.int32(counted), *before[1:]]])
    assert_same_bits(step(again, other)[0], state)


def test_a_broken_parameter_skips_every_step():
    config = unclipped()
    state = first_state(config)
    state = replace(state, params=replace(state.params, norm=state.params.norm.at[3].set(jnp.inf)))
    _, metrics = one_device(config)(state, Batch.from_rows(**packed_rows()))
    assert float(metrics.skipped) == 1


def test_losses_without_gradient(expected):
    config = unclipped()
    batch = Batch.from_rows(**packed_rows(), micro_batches=2)
    state = first_state(config)
    one_device(config).evaluate(state, batch)
    entropy, tokens = one_device(config).evaluate(state, batch)  # nothing was donated
    assert float(tokens) == float(expected[1].tokens)
    assert float(entropy / tokens) == pytest.approx(float(expected[1].loss), rel=1e-6)


def test_a_batch_with_nothing_to_learn_gives_no_gradient():
    rows = packed_rows()
    bar, metrics = gradients(Batch.from_rows(**rows | {"learned_RT": np.zeros_like(rows["learned_RT"])}))
    assert float(metrics.tokens) == float(metrics.loss) == float(metrics.gradient_norm) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(bar))


def test_a_batch_of_padding_alone_gives_numbers():
    rows = {name: np.zeros((8, 32), np.int64) for name in ("tokens_RT", "segments_RT")}
    config = unclipped()
    state, metrics = one_device(config)(first_state(config), Batch.from_rows(**rows))
    assert float(metrics.tokens) == float(metrics.loss) == float(metrics.gradient_norm) == float(metrics.skipped) == 0
    assert all(np.isfinite(leaf).all() for leaf in host(state))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"remat": "half"}, "remat is 'half'; there are none, projections, attention, full"),
        ({"layers": "loop"}, "layers is 'loop'; there are scan, unrolled"),
        ({"compute_dtype": "float16"}, "compute_dtype is 'float16'; there are bfloat16, float32"),
        ({"z_loss": -1.0}, "z_loss is -1.0; a number of at least 0 is expected"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0; a number above 0 is expected"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(TrainError, match=message):
        step_config(**changes)


def test_a_sequence_longer_than_the_model():
    with pytest.raises(TrainError, match="the sequence length 512 is more than max_position_embeddings 256"):
        one_device(step_config()).lower(rows=1, length=512)


def test_rows_that_do_not_divide():
    with pytest.raises(TrainError, match="3 micro-batches do not divide a batch of 8 rows; use 1, 2, 4, 8"):
        Batch.from_rows(**packed_rows(), micro_batches=3)
