"""Shapes of models: counted parameters against published ones, FLOPs against `anypool.models.counts`, bad files."""

import json
from importlib import resources

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anypool.models import ModelConfig
from anypool.models.counts import cache_bytes_per_token, parameters, train_flops_per_token
from anypool.plan.performance import catalogue, find_shape, load_shapes, shape_of_config
from anypool.plan.performance.errors import ShapeError
from anypool.plan.performance.shape import parse_shapes

# Billions of parameters as the models' own cards state them: total, and active where the card says so.
CARDS = {
    "llama2-7b": (6.74, None),
    "llama2-13b": (13.0, None),
    "llama2-70b": (69.0, None),
    "llama3.1-8b": (8.03, None),
    "llama3.1-70b": (70.6, None),
    "llama3.1-405b": (405.9, None),
    "mistral-7b": (7.25, None),
    "qwen3-8b": (8.2, None),
    "qwen3-14b": (14.8, None),
    "qwen3-32b": (32.8, None),
    "gemma3-27b": (27.0, None),
    "gpt3-175b": (175.0, None),
    "mixtral-8x7b": (46.7, 12.9),
    "mixtral-8x22b": (141.0, 39.0),
    "deepseek-v3": (671.0, 37.0),
    "kimi-k2": (1030.0, 32.0),
    "gpt-oss-20b": (20.9, 3.6),
    "gpt-oss-120b": (116.8, 5.1),
    "qwen3-30b-a3b": (30.5, 3.3),
    "qwen3-235b-a22b": (235.0, 22.0),
    "qwen3-480b-a35b": (480.0, 35.0),
    "llama4-scout": (109.0, 17.0),
    "llama4-maverick": (400.0, 17.0),
}


def test_every_model_of_the_catalogue_is_compared():
    assert set(CARDS) == set(catalogue())


@pytest.mark.parametrize("name", CARDS)
def test_parameters_are_those_of_the_card(name):
    total, active = CARDS[name]
    shape = find_shape(name, catalogue())
    assert shape.total_parameters / 1e9 == pytest.approx(total, rel=0.015)
    if active is not None:
        # Cards count the lookup table among the active ones or not.
        low, high = shape.active_parameters / 1e9, (shape.active_parameters + shape.head_parameters) / 1e9
        assert 0.98 * low <= active <= 1.02 * high


@pytest.mark.parametrize("file", ["llama-3.1-8b", "llama-3.1-70b", "qwen3-8b", "qwen3-32b"])
@pytest.mark.parametrize("length", [1, 4096])
def test_flops_and_cache_are_those_of_models_counts(file, length):
    text = (resources.files("anypool.check") / "configs" / f"{file}.json").read_text()
    config = ModelConfig.from_hf(json.loads(text))
    shape = shape_of_config(config, file)
    assert shape.train_flops_per_token(length) == pytest.approx(train_flops_per_token(config, length), rel=1e-9)
    assert shape.total_parameters == pytest.approx(parameters(config).total, rel=1e-3)  # but for norms
    assert 2 * shape.cache_elements_per_token == cache_bytes_per_token(config, 2)
    known = find_shape(file.replace("llama-", "llama"), catalogue())
    assert known.total_parameters == shape.total_parameters


@given(length=st.integers(1, 200_000), window=st.integers(1, 10_000))
def test_a_window_hides_keys_and_adds_none(length, window):
    plain = find_shape("gpt-oss-20b", catalogue())
    from dataclasses import replace

    shape = replace(plain, window=window, windowed_share=1.0)
    assert 1 <= shape.keys_seen(length) <= (length + 1) / 2 + 1e-6
    assert shape.keys_seen(length) <= window
    assert shape.keys_at(length) == min(window, length)


def test_names_and_aliases():
    assert find_shape(" DeepSeek-R1 ", catalogue()).name == "deepseek-v3"
    with pytest.raises(ShapeError, match=r"no model 'llama3.1-71b'; did you mean 'llama3.1-70b'.*known: .*--models"):
        find_shape("llama3.1-71b", catalogue())


GOOD = '["m"]\nlayers = 2\nwidth = 64\nheads = 4\nvocabulary = 100\n'


def test_a_shape_by_its_parameters():
    shape = parse_shapes(GOOD + "active = 100_000\ntotal = 110_000\n", "f")["m"]
    assert shape.active_parameters == 100_000
    assert shape.product_parameters == 100_000 - 6400
    assert shape.train_flops_per_token(1) == 3 * (2 * 100_000 + 2 * 2 * 4 * 32)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = ", "f: not valid TOML"),
        ("x = 1", 'f: x = 1: write a table ["x"]'),
        (GOOD.replace("layers = 2\n", ""), "f: m.layers = None: is missing"),
        (GOOD, "f: m.feed_forward = None: is missing: add it, or `active`"),
        (GOOD + "feed_forward = 0\n", "f: m.feed_forward = 0: must be a whole number of 1 to"),
        (GOOD + "feed_forward = 1.5\n", "f: m.feed_forward = 1.5: must be a whole number"),
        (GOOD + "feed_foward = 64\n", "f: m.feed_foward = 64: unknown key; did you mean 'feed_forward'"),
        (GOOD + "experts = 8\n", "f: m.experts = 8: a mixture also needs"),
        (GOOD + "expert_width = 8\n", "f: m.experts_per_token = None: goes with experts"),
        (GOOD + "experts = 2\nexperts_per_token = 4\nexpert_width = 8\n", "m.experts_per_token = 4: must be at most"),
        (GOOD + "active = 100000\n", "f: m.total = None: is missing"),
        (GOOD + "active = 100\ntotal = 100000\n", "f: m.active = 100: leaves nothing"),
        (GOOD + "active = 100000\ntotal = 10000\n", "f: m.total = 10000: is less than the 100,000"),
        (GOOD + "feed_forward = 64\nwindowed_share = 2\n", "f: m.windowed_share = 2: must be the share"),
        (GOOD + "feed_forward = 64\ntied = 1\n", "f: m.tied = 1: must be true or false"),
    ],
)
def test_bad_shapes(text, words):
    with pytest.raises(ShapeError) as caught:
        parse_shapes(text, "f")
    assert words in str(caught.value)


def test_a_file_of_shapes_comes_before_the_catalogue(tmp_path):
    file = tmp_path / "m.toml"
    file.write_text('["llama3.1-8b"]\nlayers = 1\nwidth = 64\nheads = 4\nvocabulary = 100\nfeed_forward = 128\n')
    assert find_shape("llama3.1-8b", load_shapes(file)).layers == 1
    assert find_shape("llama3.1-8b", load_shapes()).layers == 32
    with pytest.raises(ShapeError, match="cannot be read"):
        load_shapes(tmp_path / "none.toml")
