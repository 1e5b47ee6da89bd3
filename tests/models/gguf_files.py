"""GGUF files for tests: a tiny Llama-like model written as llama.cpp's converter writes one."""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quantize

from tests.goldens import tiny

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

# 3 special tokens, the letters of a small alphabet (Ġ is the space, Ċ the line feed), merges, and one added
# word.
SPECIAL = ["<unk>", "<s>", "</s>"]
LETTERS = [chr(i) for i in range(33, 108)] + ["Ġ", "Ċ", *"lmnoprstuvw"]
MERGES = ["h e", "Ġ h", "1 2"]
TOKENS = [*SPECIAL, *LETTERS, "he", "Ġh", "12", "<tool>"]
TOKENS = [*TOKENS, *(f"[PAD{i}]" for i in range(len(TOKENS), tiny.VOCAB))]
KINDS = [3 if t in SPECIAL else 4 if t == "<tool>" else 5 if t.startswith("[PAD") else 1 for t in TOKENS]


def gguf_name(name: str) -> str:
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, kind = name.rsplit(".", 1)
    if stem in top:
        return f"{top[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{kind}"


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """As in llama.cpp's convert_hf_to_gguf.py."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def write_gguf(
    path: Path,
    variant: str = "llama2",
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    metadata: dict[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    extra: dict[str, np.ndarray] | None = None,
) -> Path:
    """A tiny variant as a GGUF file.

    kind: of its matrices. metadata: keys to set or, with None, to leave out. drop: tensors to leave out, by
    their name in the file. extra: more tensors.
    """
    config, tensors = tiny.VARIANTS[variant], tiny.tensors(variant)
    architecture = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    keys: dict[str, Any] = {
        f"{architecture}.block_count": config["num_hidden_layers"],
        f"{architecture}.context_length": config["max_position_embeddings"],
        f"{architecture}.embedding_length": config["hidden_size"],
        f"{architecture}.feed_forward_length": config["intermediate_size"],
        f"{architecture}.attention.head_count": heads,
        f"{architecture}.attention.head_count_kv": kv_heads,
        f"{architecture}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{architecture}.rope.freq_base": float(config["rope_theta"]),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": KINDS,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}</s>{% endfor %}",
    }
    if "head_dim" in config:
        keys[f"{architecture}.attention.key_length"] = config["head_dim"]
    keys |= metadata or {}
    writer = GGUFWriter(path, keys.pop("general.architecture", architecture))
    for key, value in keys.items():
        match value:
            case None:
                pass
            case str():
                writer.add_string(key, value)
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case list():
                writer.add_array(key, value)
    if architecture == "llama":
        for name in tensors:
            if ".q_proj." in name or ".k_proj." in name:
                tensors[name] = permute(tensors[name], heads if ".q_proj." in name else kv_heads)
    for name, values in tensors.items():
        if gguf_name(name) in drop:
            continue
        used = kind if values.ndim == 2 else GGMLQuantizationType.F32
        if used == GGMLQuantizationType.F32:
            writer.add_tensor(gguf_name(name), values)
        elif used == GGMLQuantizationType.F16:
            writer.add_tensor(gguf_name(name), values.astype(np.float16))
        else:
            writer.add_tensor(gguf_name(name), quantize(values, used), raw_dtype=used)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
