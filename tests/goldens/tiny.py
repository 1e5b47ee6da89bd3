"""Tiny models with weights of fixed random bits: one for each variant of the Llama family.

The weights are never stored: they are made from a seed by integer arithmetic that gives the same bits
everywhere (the raw stream of a NumPy bit generator is guaranteed never to change; its normal distribution is
not).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

VOCAB = 96
LENGTH = 48  # tokens of each golden text: three times the context before rope scaling

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
}
_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
_MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
_QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rope_theta": 1e6}
_QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "rope_theta": 1e6}
_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN_SCALING = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}

# Each is the content of a config.json, in the spelling of transformers 4 unless its name says otherwise.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama2": _BASE | _LLAMA | {"num_key_value_heads": 4},
    "llama3": _BASE | _LLAMA | {"rope_theta": 5e5, "rope_scaling": _LLAMA3_SCALING},
    "llama3_tied": _BASE | _LLAMA | {"rope_theta": 5e5, "rope_scaling": _LLAMA3_SCALING, "tie_word_embeddings": True},
    "llama_linear": _BASE | _LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama_yarn": _BASE | _LLAMA | {"rope_scaling": _YARN_SCALING},
    "llama_biases": _BASE | _LLAMA | {"attention_bias": True, "mlp_bias": True},
    "llama_new_spelling": {key: value for key, value in (_BASE | _LLAMA).items() if key != "rope_theta"}
    | {"rope_parameters": _LLAMA3_SCALING | {"rope_theta": 5e5}},
    "smollm2": _BASE
    | _LLAMA
    | {
        "hidden_size": 48,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "rope_theta": 1e5,
        "tie_word_embeddings": True,
    },
    "mistral": _BASE | _MISTRAL | {"sliding_window": None, "head_dim": 16},
    "mistral_window": _BASE | _MISTRAL | {"sliding_window": 8},
    "qwen2": _BASE | _QWEN2,
    "qwen2_tied": _BASE | _QWEN2 | {"tie_word_embeddings": True},
    "qwen3": _BASE | _QWEN3 | {"head_dim": 16},
    "qwen3_tied": _BASE | _QWEN3 | {"head_dim": 16, "tie_word_embeddings": True},
}


def tokens(variant: str) -> np.ndarray:
    """The golden text of a variant: int64 (LENGTH,)."""
    return (_bits(f"{variant}/tokens", LENGTH) % np.uint64(VOCAB)).astype(np.int64)


def tensors(variant: str) -> dict[str, np.ndarray]:
    """All weights of a variant in f32, by their Hugging Face names.

    Matrices are larger than in a trained model, so that attention is far from uniform and a wrong angle
    shows.
    """
    config = VARIANTS[variant]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    q_size, kv_size = heads * head_dim, kv_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, hidden)
    for i in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (q_size, hidden),
            "self_attn.k_proj": (kv_size, hidden),
            "self_attn.v_proj": (kv_size, hidden),
            "self_attn.o_proj": (hidden, q_size),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        if config["model_type"] == "qwen3":
            layer |= {"self_attn.q_norm": (head_dim,), "self_attn.k_norm": (head_dim,)}
        biased = ["q_proj", "k_proj", "v_proj"] if config["model_type"] == "qwen2" else []
        biased += ["q_proj", "k_proj", "v_proj", "o_proj"] if config.get("attention_bias") else []
        biased += ["gate_proj", "up_proj", "down_proj"] if config.get("mlp_bias") else []
        for name, shape in layer.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
            if name.split(".")[-1] in biased:
                shapes[f"model.layers.{i}.{name}.bias"] = shape[:1]
    return {name: _values(f"{variant}/{name}", shape) for name, shape in shapes.items()}


def write(directory: Path, variant: str) -> Path:
    """Make the Hugging Face directory of a variant; returns it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(VARIANTS[variant], indent=2))
    save_file(tensors(variant), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform: matrices with a deviation of 1.6 / sqrt(inputs), norms in [0.5, 1.5], biases in ±0.5."""
    uniform = (_bits(name, int(np.prod(shape))) >> np.uint64(40)).astype(np.float64) / 2**24 * 2 - 1  # [-1, 1)
    if name.endswith("norm.weight"):
        values = 1 + 0.5 * uniform
    elif len(shape) == 1:
        values = 0.5 * uniform
    else:
        values = uniform * 1.6 * np.sqrt(3 / shape[1])
    return values.astype(np.float32).reshape(shape)


def _bits(name: str, count: int) -> np.ndarray:
    seed = int.from_bytes(name.encode(), "little")
    return np.asarray(np.random.Philox(np.random.SeedSequence(seed)).random_raw(count))
