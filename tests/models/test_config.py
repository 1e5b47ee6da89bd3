"""config.json: what is accepted and what it becomes; what is refused and with which words."""

import json
from dataclasses import replace

import numpy as np
import pytest

from anypool.models import ConfigError, ModelConfig, RopeConfig, UnsupportedModelError
from tests.goldens import tiny

LLAMA = tiny.VARIANTS["llama2"]
QWEN2 = tiny.VARIANTS["qwen2"]
QWEN3 = tiny.VARIANTS["qwen3"]
MISTRAL = tiny.VARIANTS["mistral_window"]
LLAMA3_SCALING = tiny.VARIANTS["llama3"]["rope_scaling"]
SUPPORTED = "supported: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"


def without(config, *names):
    return {key: value for key, value in config.items() if key not in names}


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_what_is_written_is_read_back(variant):
    config = ModelConfig.from_hf(tiny.VARIANTS[variant])
    assert ModelConfig.from_hf(config.to_hf()) == config
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_flags_of_each_family():
    def flags(config):
        made = ModelConfig.from_hf(config)
        return (made.attention_bias, made.attention_out_bias, made.mlp_bias, made.qk_norm)

    assert flags(LLAMA) == (False, False, False, False)
    assert flags(LLAMA | {"attention_bias": True, "mlp_bias": True}) == (True, True, True, False)
    assert flags(MISTRAL) == (False, False, False, False)
    assert flags(QWEN2) == (True, False, False, False)
    assert flags(QWEN3) == (False, False, False, True)
    assert flags(QWEN3 | {"attention_bias": True}) == (True, True, False, True)
    # Keys of another family mean nothing here, as in transformers.
    assert flags(MISTRAL | {"attention_bias": True, "mlp_bias": True}) == (False, False, False, False)


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (without(LLAMA, "num_key_value_heads"), "num_kv_heads", 4),
        (LLAMA | {"num_key_value_heads": None}, "num_kv_heads", 4),
        (LLAMA | {"head_dim": None}, "head_dim", 8),
        (LLAMA | {"head_dim": 64}, "head_dim", 64),
        (without(LLAMA, "max_position_embeddings"), "max_position", 2048),
        (without(QWEN2, "max_position_embeddings"), "max_position", 32768),
        (without(QWEN3, "head_dim"), "head_dim", 128),
        (without(LLAMA, "tie_word_embeddings"), "tie_embeddings", False),
        (LLAMA | {"rms_norm_eps": 1}, "rms_norm_eps", 1.0),
        (without(LLAMA, "eos_token_id", "bos_token_id"), "eos_token_ids", (2,)),
        (without(QWEN2, "eos_token_id", "bos_token_id"), "eos_token_ids", ()),
        (LLAMA | {"eos_token_id": [5, 7, 5]}, "eos_token_ids", (5, 7)),
        (LLAMA | {"bos_token_id": None}, "bos_token_id", None),
        (without(LLAMA, "model_type"), "model_type", "llama"),
        (without(LLAMA, "architectures"), "model_type", "llama"),
        (MISTRAL, "sliding_window", 8),
        (MISTRAL | {"sliding_window": None}, "sliding_window", None),
        (MISTRAL | {"sliding_window": 64}, "sliding_window", None),  # as long as the context
        (without(MISTRAL, "sliding_window") | {"max_position_embeddings": 8192}, "sliding_window", 4096),
        (LLAMA | {"sliding_window": 8}, "sliding_window", None),
        (QWEN2 | {"sliding_window": 8}, "sliding_window", None),
        (QWEN2 | {"sliding_window": 8, "use_sliding_window": False}, "sliding_window", None),
        (QWEN2 | {"sliding_window": 8, "use_sliding_window": True}, "sliding_window", None),  # from layer 28
        (
            QWEN2 | {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0},
            "sliding_window",
            8,
        ),
        (
            QWEN3
            | {
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "full_attention"],
            },
            "sliding_window",
            None,
        ),
    ],
)
def test_accepted(config, field, value):
    assert getattr(ModelConfig.from_hf(config), field) == value


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (
            LLAMA | {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
            UnsupportedModelError,
            f"config.json: the architecture GPT2LMHeadModel is not supported; {SUPPORTED}",
        ),
        (
            LLAMA | {"architectures": ["LlamaForSequenceClassification"]},
            UnsupportedModelError,
            f"config.json: the architecture LlamaForSequenceClassification is not supported; {SUPPORTED}",
        ),
        (
            without(LLAMA, "architectures") | {"model_type": "mamba"},
            UnsupportedModelError,
            f"config.json: the model_type 'mamba' is not supported; {SUPPORTED}",
        ),
        (
            without(LLAMA, "architectures", "model_type"),
            ConfigError,
            f"config.json: neither architectures nor model_type is there; {SUPPORTED}",
        ),
        (
            LLAMA | {"model_type": "qwen3"},
            ConfigError,
            "config.json: architectures ['LlamaForCausalLM'] does not go with model_type 'qwen3'",
        ),
        (without(LLAMA, "hidden_size"), ConfigError, "config.json: hidden_size is missing"),
        (
            LLAMA | {"num_hidden_layers": "12"},
            ConfigError,
            "config.json: num_hidden_layers is '12'; a whole number of at least 1 is expected",
        ),
        (
            LLAMA | {"vocab_size": 0},
            ConfigError,
            "config.json: vocab_size is 0; a whole number of at least 1 is expected",
        ),
        (
            LLAMA | {"vocab_size": True},
            ConfigError,
            "config.json: vocab_size is True; a whole number of at least 1 is expected",
        ),
        (
            LLAMA | {"rms_norm_eps": -1e-5},
            ConfigError,
            "config.json: rms_norm_eps is -1e-05; a number above 0 is expected",
        ),
        (
            LLAMA | {"tie_word_embeddings": "yes"},
            ConfigError,
            "config.json: tie_word_embeddings is 'yes'; true or false is expected",
        ),
        (
            LLAMA | {"eos_token_id": ["2"]},
            ConfigError,
            "config.json: eos_token_id is ['2']; a token id or a list of them is expected",
        ),
        (
            LLAMA | {"bos_token_id": -1},
            ConfigError,
            "config.json: bos_token_id is -1; a token id or null is expected",
        ),
        (
            LLAMA | {"hidden_size": 30},
            ConfigError,
            ("config.json: hidden_size 30 is not a multiple of num_attention_heads 4, and there is no head_dim"),
        ),
        (
            LLAMA | {"head_dim": 7},
            ConfigError,
            "config.json: head_dim is 7; the rotary embedding needs an even number",
        ),
        (
            LLAMA | {"num_key_value_heads": 3},
            ConfigError,
            "config.json: num_attention_heads 4 is not a multiple of num_key_value_heads 3",
        ),
        (
            LLAMA | {"hidden_act": "gelu"},
            UnsupportedModelError,
            "config.json: hidden_act is 'gelu'; only 'silu' is supported",
        ),
        (
            LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            UnsupportedModelError,
            (
                "config.json: quantization_config is set (quant_method 'gptq'); quantised safetensors are "
                "not supported: use the model's unquantised directory or a GGUF file"
            ),
        ),
        (
            QWEN2 | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            UnsupportedModelError,
            (
                "config.json: use_sliding_window is true for some layers only (layer_types, "
                "max_window_layers); a window in all layers or in none is supported: set use_sliding_window "
                "to false to serve up to 8 tokens as the model was trained"
            ),
        ),
        (
            LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            UnsupportedModelError,
            "config.json: rope_scaling has rope_type 'dynamic'; supported: default, linear, llama3, yarn",
        ),
        (
            LLAMA | {"rope_parameters": {"rope_type": "longrope"}},
            UnsupportedModelError,
            "config.json: rope_parameters has rope_type 'longrope'; supported: default, linear, llama3, yarn",
        ),
        (
            LLAMA | {"rope_scaling": "linear"},
            ConfigError,
            "config.json: rope_scaling is 'linear'; an object is expected",
        ),
        (
            LLAMA | {"rope_scaling": without(LLAMA3_SCALING, "factor", "low_freq_factor")},
            ConfigError,
            "config.json: rope_scaling of rope_type 'llama3' lacks factor, low_freq_factor",
        ),
        (
            LLAMA | {"rope_scaling": {"type": "linear", "factor": 0}},
            ConfigError,
            "config.json: rope_scaling.factor is 0; a number above 0 is expected",
        ),
        (
            LLAMA | {"rope_scaling": LLAMA3_SCALING | {"high_freq_factor": 1.0}},
            ConfigError,
            "config.json: rope_scaling.high_freq_factor 1.0 must be above low_freq_factor 1.0",
        ),
        (
            LLAMA | {"rope_theta": None},
            ConfigError,
            "config.json: rope_theta is None; a number above 0 is expected",
        ),
        (
            LLAMA | {"partial_rotary_factor": 0.5},
            UnsupportedModelError,
            "config.json: partial_rotary_factor is 0.5; only models that rotate whole heads are supported",
        ),
    ],
)
def test_refused(config, error, message):
    with pytest.raises(error) as raised:
        ModelConfig.from_hf(config)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON: Expecting property name"),
        ("[]", "holds a list; a JSON object is expected"),
    ],
)
def test_broken_file(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError) as raised:
        ModelConfig.load(tmp_path)
    assert str(tmp_path / "config.json") in str(raised.value)
    assert message in str(raised.value)


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.json; a Hugging Face model directory is expected"):
        ModelConfig.load(tmp_path)


def test_generation_config_names_the_ending_tokens(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert ModelConfig.load(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert ModelConfig.load(tmp_path).eos_token_ids == (7, 9)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    assert ModelConfig.load(tmp_path).eos_token_ids == (2,)


def test_old_and_new_spelling_of_rope_are_the_same():
    old = tiny.VARIANTS["llama3"]
    new = tiny.VARIANTS["llama_new_spelling"]
    assert ModelConfig.from_hf(new).rope == ModelConfig.from_hf(old).rope
    top_level = old | {
        "original_max_position_embeddings": 16,
        "rope_scaling": without(LLAMA3_SCALING, "original_max_position_embeddings"),
    }
    assert ModelConfig.from_hf(top_level).rope == ModelConfig.from_hf(old).rope


def test_frequencies_by_hand():
    """The numbers of the formulas, computed on paper for a head of width 4."""
    plain = RopeConfig(theta=100.0)
    np.testing.assert_allclose(plain.inverse_frequencies(4), [1.0, 0.1], rtol=1e-6)
    linear = replace(plain, scaling="linear", factor=4.0)
    np.testing.assert_allclose(linear.inverse_frequencies(4), [0.25, 0.025], rtol=1e-6)
    # Over 32 positions the waves turn 32 / 2 pi = 5.09 and 0.509 times: the first is fast, the second slow.
    llama3 = replace(plain, scaling="llama3", factor=8.0, original_max_position=32)
    np.testing.assert_allclose(llama3.inverse_frequencies(4), [1.0, 0.1 / 8], rtol=1e-6)
    # Over 128 positions the second turns 2.037 times: (2.037 - 1) / (4 - 1) of it is kept.
    llama3 = replace(llama3, original_max_position=128)
    kept = (128 / (2 * np.pi / 0.1) - 1) / 3
    np.testing.assert_allclose(llama3.inverse_frequencies(4), [1.0, 0.1 * kept + 0.1 / 8 * (1 - kept)], rtol=1e-6)


def test_yarn_multiplies_cosine_and_sine():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    made = ModelConfig.from_hf(LLAMA | {"rope_scaling": yarn}).rope
    assert made.attention_factor == pytest.approx(0.1 * np.log(4.0) + 1)
    made = ModelConfig.from_hf(LLAMA | {"rope_scaling": yarn | {"attention_factor": 1.25}}).rope
    assert made.attention_factor == 1.25
    made = ModelConfig.from_hf(LLAMA | {"rope_scaling": yarn | {"mscale": 1.0, "mscale_all_dim": 1.0}}).rope
    assert made.attention_factor == 1.0
