"""The configuration of a model, read from a Hugging Face `config.json`.

One dataclass describes the whole Llama family: what differs between Llama, Mistral, Qwen2 and Qwen3 is a
handful of flags, decided here once from the model's type, so that the forward pass never asks for a vendor or
a model name. A key that would change the numbers and that is not implemented is refused, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from anypool.models.errors import ConfigError, UnsupportedModelError
from anypool.models.rope import RopeConfig

_REQUIRED: Any = object()


@dataclass(frozen=True)
class _Family:
    """What a model type implies when `config.json` is silent: transformers' own defaults."""

    architecture: str
    max_position: int
    num_kv_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    bos: int | None = None
    eos: int | None = None
    sliding_window: int | None = None


_FAMILIES = {
    "llama": _Family("LlamaForCausalLM", max_position=2048, bos=1, eos=2),
    "mistral": _Family("MistralForCausalLM", max_position=131072, num_kv_heads=8, bos=1, eos=2, sliding_window=4096),
    "qwen2": _Family("Qwen2ForCausalLM", max_position=32768, num_kv_heads=32, sliding_window=4096),
    "qwen3": _Family("Qwen3ForCausalLM", max_position=32768, num_kv_heads=32, head_dim=128, sliding_window=4096),
}

SUPPORTED_ARCHITECTURES = tuple(family.architecture for family in _FAMILIES.values())


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama family. Sizes are counts; positions are counted in tokens."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_embeddings: bool = False
    attention_bias: bool = False  # on the query, key and value projections
    attention_out_bias: bool = False  # on the output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm over each head of query and key, before the rotary embedding
    sliding_window: int | None = None  # keys a query sees, itself included; None: all before it
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def load(cls, directory: Path) -> ModelConfig:
        """Read `config.json`, and from `generation_config.json`, if there is one, the tokens that end a text.

        Raises ConfigError, UnsupportedModelError.
        """
        path = directory / "config.json"
        if not path.is_file():
            raise ConfigError(f"{directory} has no config.json; a Hugging Face model directory is expected")
        return replace(cls.from_hf(read_json(path)), eos_token_ids=ending_tokens(directory))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], file: str = "config.json") -> ModelConfig:
        """Check and translate the content of a `config.json`, in the spelling of transformers 4 or 5.

        file: what complaints name as the place of the fault.

        Raises UnsupportedModelError for what is not implemented, ConfigError for what makes no sense.
        """
        fields = _Fields(config, file)
        model_type = _model_type(fields)
        family = _FAMILIES[model_type]
        _refuse_unsupported(fields)

        hidden_size = fields.count("hidden_size")
        num_heads = fields.count("num_attention_heads")
        num_kv_heads = fields.count("num_key_value_heads", family.num_kv_heads, null=num_heads) or num_heads
        head_dim = fields.count("head_dim", family.head_dim, null=None)
        if head_dim is None:
            if hidden_size % num_heads:
                raise ConfigError(
                    f"{file}: hidden_size {hidden_size} is not a multiple of num_attention_heads "
                    f"{num_heads}, "
                    "and there is no head_dim"
                )
            head_dim = hidden_size // num_heads
        if head_dim % 2:
            raise ConfigError(f"{file}: head_dim is {head_dim}; the rotary embedding needs an even number")
        if num_heads % num_kv_heads:
            raise ConfigError(
                f"{file}: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
            )

        num_layers = fields.count("num_hidden_layers")
        max_position = fields.count("max_position_embeddings", family.max_position)
        optional_bias = model_type in ("llama", "qwen3") and fields.flag("attention_bias")
        return cls(
            model_type=model_type,
            vocab_size=fields.count("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.count("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position=max_position,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope=RopeConfig.from_hf(config, max_position, file),
            tie_embeddings=fields.flag("tie_word_embeddings"),
            attention_bias=optional_bias or model_type == "qwen2",
            attention_out_bias=optional_bias,
            mlp_bias=model_type == "llama" and fields.flag("mlp_bias"),
            qk_norm=model_type == "qwen3",
            sliding_window=_sliding_window(fields, model_type, num_layers, max_position),
            bos_token_id=fields.token_id("bos_token_id", family.bos),
            eos_token_ids=_token_ids(fields, family.eos),
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of this model, in the spelling that transformers 4 and 5 both read."""
        config: dict[str, Any] = {
            "architectures": [_FAMILIES[self.model_type].architecture],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids) or None,
            **self.rope.to_hf(),
        }
        if self.model_type == "llama":
            config |= {"attention_bias": self.attention_bias, "mlp_bias": self.mlp_bias}
        elif self.model_type == "mistral":
            config["sliding_window"] = self.sliding_window
        else:
            windowed = self.sliding_window is not None
            config |= {"use_sliding_window": windowed, "sliding_window": self.sliding_window}
            config["max_window_layers"] = 0 if windowed else self.num_layers
            if self.model_type == "qwen3":
                config["attention_bias"] = self.attention_bias
        return config


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ConfigError naming the file when it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a {type(value).__name__}; a JSON object is expected")
    return value


def ending_tokens(directory: Path) -> tuple[int, ...]:
    """The tokens that end a text, from `generation_config.json` or else `config.json`. Raises ConfigError."""
    # Instruct models list all of them in the former only (Llama 3: <|eot_id|>), and `generate` obeys it.
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if path.is_file():
            values = read_json(path)
            family = _FAMILIES.get(str(values.get("model_type")))
            ids = _token_ids(_Fields(values, name), default=family.eos if family else None)
            if ids:
                return ids
    return ()


@dataclass(frozen=True)
class _Fields:
    """Typed access to a JSON object; every complaint names the file, the field and the value."""

    values: Mapping[str, Any]
    file: str

    def _get(self, name: str, default: Any, null: Any) -> Any:
        if name not in self.values:
            if default is _REQUIRED:
                raise ConfigError(f"{self.file}: {name} is missing")
            return default
        value = self.values[name]
        return null if value is None and null is not _REQUIRED else value

    def count(self, name: str, default: Any = _REQUIRED, null: Any = _REQUIRED) -> Any:
        value = self._get(name, default, null)
        if value is default or value is null:
            return value
        if type(value) is not int or value < 1:
            raise ConfigError(f"{self.file}: {name} is {value!r}; a whole number of at least 1 is expected")
        return value

    def number(self, name: str, default: float) -> float:
        value = self._get(name, default, _REQUIRED)
        if type(value) not in (int, float) or not value > 0:
            raise ConfigError(f"{self.file}: {name} is {value!r}; a number above 0 is expected")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self._get(name, False, False)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.file}: {name} is {value!r}; true or false is expected")
        return value

    def token_id(self, name: str, default: int | None) -> int | None:
        value = self._get(name, default, None)
        if value is not None and (type(value) is not int or value < 0):
            raise ConfigError(f"{self.file}: {name} is {value!r}; a token id or null is expected")
        return value


def _model_type(fields: _Fields) -> str:
    supported = ", ".join(SUPPORTED_ARCHITECTURES)
    architectures = fields.values.get("architectures")
    model_type = fields.values.get("model_type")
    if architectures:
        # A reward model or classifier shares its base model's type, but not its head.
        names = architectures if isinstance(architectures, list) else [architectures]
        for known, family in _FAMILIES.items():
            if names == [family.architecture] and model_type in (None, known):
                return known
        if names[0] in SUPPORTED_ARCHITECTURES and len(names) == 1:
            raise ConfigError(f"{fields.file}: architectures {names} does not go with model_type {model_type!r}")
        raise UnsupportedModelError(
            f"{fields.file}: the architecture {', '.join(map(str, names))} is not supported; supported: {supported}"
        )
    if model_type in _FAMILIES:
        return str(model_type)
    if model_type is None:
        raise ConfigError(f"{fields.file}: neither architectures nor model_type is there; supported: {supported}")
    raise UnsupportedModelError(
        f"{fields.file}: the model_type {model_type!r} is not supported; supported: {supported}"
    )


def _refuse_unsupported(fields: _Fields) -> None:
    quantization = fields.values.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UnsupportedModelError(
            f"{fields.file}: quantization_config is set (quant_method {method!r}); quantised safetensors are "
            "not "
            "supported: use the model's unquantised directory or a GGUF file"
        )
    for name in ("hidden_act", "hidden_activation"):
        activation = fields.values.get(name)
        if activation not in (None, "silu", "swish"):
            raise UnsupportedModelError(f"{fields.file}: {name} is {activation!r}; only 'silu' is supported")


def _sliding_window(fields: _Fields, model_type: str, num_layers: int, max_position: int) -> int | None:
    """How many keys a query sees. Models in which only some layers have a window are refused."""
    default = _FAMILIES[model_type].sliding_window
    if model_type == "llama":
        return None
    window = fields.count("sliding_window", default, null=None)
    if model_type in ("qwen2", "qwen3"):
        if not fields.flag("use_sliding_window") or window is None:
            return None
        layer_types = fields.values.get("layer_types")
        if layer_types is None:
            first = fields.values.get("max_window_layers", 28)
            layer_types = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
        if set(layer_types) == {"full_attention"}:
            return None
        if set(layer_types) != {"sliding_attention"}:
            raise UnsupportedModelError(
                f"{fields.file}: use_sliding_window is true for some layers only (layer_types, "
                "max_window_layers); "
                "a window in all layers or in none is supported: set use_sliding_window to false to serve up "
                "to "
                f"{window} tokens as the model was trained"
            )
    # A window as long as the context hides nothing.
    return None if window is None or window >= max_position else int(window)


def _token_ids(fields: _Fields, default: int | None) -> tuple[int, ...]:
    value = fields.values.get("eos_token_id", default)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int or token < 0 for token in ids):
        raise ConfigError(f"{fields.file}: eos_token_id is {value!r}; a token id or a list of them is expected")
    return tuple(dict.fromkeys(ids))
