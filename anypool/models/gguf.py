"""GGUF files: read once, written as a Hugging Face directory.

Quantised tensors become f32 (their exact values need it); tensors stored as F32, F16 or BF16 stay as they
are. The layout follows llama.cpp's converter, undone: query and key rows of the `llama` architecture are
stored for rotary pairs that lie side by side, Hugging Face keeps the two halves of a head apart. Source:
llama.cpp, `convert_hf_to_gguf.py` (`permute`) and `gguf-py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor, dequantize

from anypool.models.config import ModelConfig
from anypool.models.errors import GGUFError, UnsupportedModelError
from anypool.models.gguf_tokenizer import tokenizer_files
from anypool.models.rope import RopeConfig
from anypool.models.weights import Pending, write_safetensors

# Raised whenever the output for the same file changes, so that directories converted earlier are not used
# again.
CONVERTER_VERSION = 1

_MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"

# Numbers that some relatives of Llama apply and this package does not.
_UNSUPPORTED_KEYS = (
    "attention.scale",
    "attention.sliding_window",
    "embedding_scale",
    "logit_scale",
    "residual_scale",
)

_FLOATS: dict[GGMLQuantizationType, np.dtype[Any]] = {
    GGMLQuantizationType.F32: np.dtype("<f4"),
    GGMLQuantizationType.F16: np.dtype("<f2"),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}


def convert(path: Path, directory: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Write the model in a GGUF file as a Hugging Face directory: config, weights, tokenizer, chat template.

    `directory` must exist and be empty. progress(done_bytes, total_bytes) is called as tensors are written.
    Raises GGUFError for a damaged file, UnsupportedModelError for an architecture, tokenizer or type not
    implemented.
    """
    reader = _open(path)
    metadata = Metadata({name: field.contents() for name, field in reader.fields.items()}, path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(metadata, tensors)
    pending = [_pending(path, tensor, config) for tensor in reader.tensors if tensor.name != _ROPE_FACTORS]
    _check_complete(path, config, {item.name: item.shape for item in pending})

    for name, content in tokenizer_files(metadata, config).items():
        _write_json(directory / name, content)
    matrices = {item.dtype for item in pending if len(item.shape) == 2}
    dtype = {np.dtype("<f2"): "float16", np.dtype(ml_dtypes.bfloat16): "bfloat16"}.get(next(iter(matrices)), "float32")
    _write_json(
        directory / "config.json",
        config.to_hf() | {"torch_dtype": dtype if len(matrices) == 1 else "float32"},
    )
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids)},
    )
    write_safetensors(directory / "model.safetensors", pending, progress)


def parameter_bytes(path: Path) -> int:
    """The size of the weights once converted, in bytes. Raises GGUFError for a damaged file."""
    return sum(
        int(np.prod(tensor.shape)) * _FLOATS.get(tensor.tensor_type, np.dtype("<f4")).itemsize
        for tensor in _open(path).tensors
    )


class Metadata:
    """The key-value pairs of a GGUF file; complaints name the file and the key."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self.values = values
        self.path = path

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def require(self, key: str, kind: type = int) -> Any:
        value = self.values.get(key)
        if not isinstance(value, kind):
            raise GGUFError(f"{self.path}: metadata {key} is {value!r}; a value of type {kind.__name__} is expected")
        return value


def _open(path: Path) -> GGUFReader:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise GGUFError(f"{path} is no GGUF file: it does not start with 'GGUF'")
    try:
        return GGUFReader(path)
    except Exception as error:  # the reader trusts the file: damage surfaces as any of its or NumPy's exceptions
        raise GGUFError(f"{path} is cut short or damaged ({error}); fetch it again") from error


def _config(metadata: Metadata, tensors: Mapping[str, ReaderTensor]) -> ModelConfig:
    path = metadata.path
    architecture = metadata.require("general.architecture", str)
    if architecture not in _MODEL_TYPES:
        raise UnsupportedModelError(
            f"{path}: the GGUF architecture {architecture!r} is not supported; supported: {', '.join(_MODEL_TYPES)}"
        )

    def own(key: str) -> str:
        return f"{architecture}.{key}"

    unsupported = [own(key) for key in _UNSUPPORTED_KEYS if metadata.get(own(key))]
    if metadata.get(own("expert_count")):
        unsupported.append(own("expert_count"))
    if unsupported:
        raise UnsupportedModelError(f"{path}: metadata {', '.join(unsupported)} is set, which is not supported")
    if "token_embd.weight" not in tensors:
        raise GGUFError(f"{path}: the tensor token_embd.weight is missing")

    hidden_size = metadata.require(own("embedding_length"))
    num_heads = metadata.require(own("attention.head_count"))
    head_dim = metadata.get(own("attention.key_length"), hidden_size // num_heads)
    rotated = metadata.get(own("rope.dimension_count"), head_dim)
    if rotated != head_dim:
        raise UnsupportedModelError(
            f"{path}: {rotated} of {head_dim} dimensions of a head are rotated; only whole heads are supported"
        )
    eos = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    max_position = metadata.require(own("context_length"))
    config: dict[str, Any] = {
        "model_type": _MODEL_TYPES[architecture],
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden_size,
        "intermediate_size": metadata.require(own("feed_forward_length")),
        "num_hidden_layers": metadata.require(own("block_count")),
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.get(own("attention.head_count_kv"), num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": max_position,
        "rms_norm_eps": _shortest(metadata.require(own("attention.layer_norm_rms_epsilon"), float)),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": architecture != "qwen2" and "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(token for token in eos if token is not None)),
        "rope_theta": _shortest(metadata.get(own("rope.freq_base"), 10000.0)),
        "rope_scaling": _rope_scaling(metadata, own, max_position),
    }
    if _ROPE_FACTORS in tensors:
        factors = np.asarray(tensors[_ROPE_FACTORS].data, np.float32)
        config["rope_scaling"] = _llama3_scaling(path, factors, config["rope_theta"], head_dim)
    return ModelConfig.from_hf(config, file=str(path))


def _rope_scaling(metadata: Metadata, own: Callable[[str], str], max_position: int) -> dict[str, Any] | None:
    kind = metadata.get(own("rope.scaling.type"), "none")
    # Files older than the key for the type have only the linear scale.
    factor = metadata.get(own("rope.scaling.factor"), metadata.get(own("rope.scale_linear"), 1.0))
    if kind == "none" and factor == 1.0:
        return None
    scaling = {"rope_type": "linear" if kind == "none" else kind, "factor": _shortest(factor)}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = metadata.get(
            own("rope.scaling.original_context_length"), max_position
        )
    return scaling


def _llama3_scaling(path: Path, factors: npt.NDArray[np.float32], theta: float, head_dim: int) -> dict[str, Any]:
    """GGUF keeps llama3 scaling as the divisor of each frequency; find the numbers that give them."""
    plain = RopeConfig(theta=theta).inverse_frequencies(head_dim)
    rope = RopeConfig(theta, "llama3", float(factors.max()), 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    if factors.shape != plain.shape or not np.allclose(plain / rope.inverse_frequencies(head_dim), factors, rtol=1e-3):
        raise UnsupportedModelError(
            f"{path}: its {_ROPE_FACTORS} are not those of Llama 3 (low 1, high 4, original context 8192); "
            "use the model's Hugging Face directory instead"
        )
    scaling: dict[str, Any] = rope.to_hf()["rope_scaling"]
    return scaling


def _pending(path: Path, tensor: ReaderTensor, config: ModelConfig) -> Pending:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    name = _hf_name(path, tensor.name)
    dtype = _FLOATS.get(tensor.tensor_type, np.dtype("<f4"))
    heads = 0
    if config.model_type == "llama":
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2], 0)

    def make() -> npt.NDArray[Any]:
        if tensor.tensor_type in _FLOATS:
            values: npt.NDArray[Any] = np.asarray(tensor.data).view(dtype).reshape(shape)
        else:
            try:
                values = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
            except NotImplementedError as error:
                raise UnsupportedModelError(
                    f"{path}: {tensor.name} is of type {tensor.tensor_type.name}, which cannot be dequantised"
                ) from error
        return unpermute(values, heads) if heads else values

    return Pending(name, dtype, shape, make)


def unpermute(rows: npt.NDArray[Any], num_heads: int) -> npt.NDArray[Any]:
    """From rotary pairs (2i, 2i+1) to pairs (i, i + head_dim/2); the first axis is num_heads * head_dim."""
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _hf_name(path: Path, name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER and parts[3] in ("weight", "bias"):
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"
    raise UnsupportedModelError(f"{path}: the tensor {name} has no place in the Llama family")


def _check_complete(path: Path, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Whether every layer has its matrices. Biases and exact shapes are checked when weights are loaded."""
    per_layer = [name for gguf, name in _LAYER.items() if config.qk_norm or gguf not in ("attn_q_norm", "attn_k_norm")]
    needed = ["model.embed_tokens.weight", "model.norm.weight"]
    needed += [f"model.layers.{i}.{name}.weight" for i in range(config.num_layers) for name in per_layer]
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise GGUFError(f"{path} lacks {len(missing)} tensors of the model, among them {missing[0]}")


def _shortest(value: float) -> float:
    """1e-05 for the f32 nearest to it, as the f32 in a GGUF file was 1e-05 when it was written."""
    return float(str(np.float32(value)))


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
