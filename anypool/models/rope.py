"""Rotary position embeddings: how a model spaces its frequencies, and how it stretches them to longer
contexts.

Sources: Su et al. 2021 (RoPE); Chen et al. 2023 (linear interpolation); Meta's Llama 3.1 reference
(`llama3`); Peng et al. 2023 (YaRN). The arithmetic is done in f32 in the order of transformers'
`modeling_rope_utils`, because at position 100,000 one unit in the last place of a frequency is visible in the
logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from anypool.models.errors import ConfigError, UnsupportedModelError

SUPPORTED_SCALINGS = ("default", "linear", "llama3", "yarn")

_NUMBERS = {
    # scaling: (required numbers, optional numbers)
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (("factor",), ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")),
}


@dataclass(frozen=True)
class RopeConfig:
    """`theta` is the base of the frequencies; the rest says how they are scaled."""

    theta: float = 10000.0
    scaling: str = "default"
    factor: float = 1.0
    original_max_position: int = 0  # context length before scaling, in tokens (llama3, yarn)
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    attention_factor: float = 1.0  # multiplies cosine and sine (yarn)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], max_position: int, file: str = "config.json") -> RopeConfig:
        """From the keys `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (transformers
        5).

        Raises UnsupportedModelError for other scalings, ConfigError for values that make no sense.
        """
        parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
        where = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
        if not isinstance(parameters, Mapping):
            raise ConfigError(f"{file}: {where} is {parameters!r}; an object is expected")
        scaling = parameters.get("rope_type", parameters.get("type", "default"))
        if scaling not in SUPPORTED_SCALINGS:
            raise UnsupportedModelError(
                f"{file}: {where} has rope_type {scaling!r}; supported: {', '.join(SUPPORTED_SCALINGS)}"
            )
        partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if partial not in (None, 1, 1.0):
            raise UnsupportedModelError(
                f"{file}: partial_rotary_factor is {partial!r}; only models that rotate whole heads are supported"
            )

        def number(name: str, value: Any) -> float:
            if type(value) not in (int, float) or not value > 0:
                raise ConfigError(f"{file}: {name} is {value!r}; a number above 0 is expected")
            return float(value)

        theta = number("rope_theta", parameters.get("rope_theta", config.get("rope_theta", 10000.0)))
        required, optional = _NUMBERS[scaling]
        missing = [name for name in required if parameters.get(name) is None]
        if missing:
            raise ConfigError(f"{file}: {where} of rope_type {scaling!r} lacks {', '.join(missing)}")
        given = {
            name: number(f"{where}.{name}", parameters[name])
            for name in required + optional
            if parameters.get(name) is not None
        }
        if scaling in ("llama3", "yarn"):
            # At the top level it takes precedence, as in transformers.
            original = config.get("original_max_position_embeddings")
            original = (
                parameters.get("original_max_position_embeddings", max_position) if original is None else original
            )
            given["original_max_position"] = int(number(f"{where}.original_max_position_embeddings", original))
        if scaling == "llama3" and given["high_freq_factor"] <= given["low_freq_factor"]:
            raise ConfigError(
                f"{file}: {where}.high_freq_factor {given['high_freq_factor']} must be above "
                f"low_freq_factor {given['low_freq_factor']}"
            )
        truncate = True
        if scaling == "yarn":
            mscale, mscale_all_dim = given.pop("mscale", None), given.pop("mscale_all_dim", None)
            given.setdefault("attention_factor", _yarn_attention_factor(given["factor"], mscale, mscale_all_dim))
            truncate = bool(parameters.get("truncate", True))
        return cls(theta=theta, scaling=scaling, truncate=truncate, **given)  # type: ignore[arg-type]

    def to_hf(self) -> dict[str, Any]:
        """The keys of `config.json` from which `from_hf` makes this again."""
        if self.scaling == "default":
            return {"rope_theta": self.theta, "rope_scaling": None}
        scaling: dict[str, Any] = {"rope_type": self.scaling, "factor": self.factor}
        if self.scaling in ("llama3", "yarn"):
            scaling["original_max_position_embeddings"] = self.original_max_position
        if self.scaling == "llama3":
            scaling |= {"low_freq_factor": self.low_freq_factor, "high_freq_factor": self.high_freq_factor}
        if self.scaling == "yarn":
            scaling |= {
                "beta_fast": self.beta_fast,
                "beta_slow": self.beta_slow,
                "attention_factor": self.attention_factor,
                "truncate": self.truncate,
            }
        return {"rope_theta": self.theta, "rope_scaling": scaling}

    def inverse_frequencies(self, head_dim: int) -> npt.NDArray[np.float32]:
        """Radians per position, f32 (head_dim / 2,). Cosine and sine are then times `attention_factor`."""
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        wave = np.float32(self.theta) ** exponent
        inverse = (np.float32(1.0) / wave).astype(np.float32)
        if self.scaling == "linear":
            inverse = inverse / np.float32(self.factor)
        elif self.scaling == "llama3":
            inverse = self._llama3(inverse)
        elif self.scaling == "yarn":
            inverse = self._yarn(wave)
        return inverse.astype(np.float32)

    def _llama3(self, inverse: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Slow waves are divided by `factor`, fast ones kept, those between blended."""
        turns = np.float32(self.original_max_position) / (np.float32(2 * math.pi) / inverse)
        blend = (turns - np.float32(self.low_freq_factor)) / np.float32(self.high_freq_factor - self.low_freq_factor)
        blend = np.clip(blend, np.float32(0), np.float32(1))
        scaled: npt.NDArray[np.float32] = (1 - blend) * inverse / np.float32(self.factor) + blend * inverse
        return scaled

    def _yarn(self, wave: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """As llama3, but the blend runs over the index of the frequency, between two numbers of turns."""
        dim = 2 * wave.size

        def index_of(turns: float) -> float:
            wavelength = self.original_max_position / (turns * 2 * math.pi)
            return dim * math.log(wavelength) / (2 * math.log(self.theta))

        low, high = index_of(self.beta_fast), index_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        if low == high:
            high += 0.001
        ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
        kept = np.float32(1) - ramp.astype(np.float32)
        stretched = 1 / (np.float32(self.factor) * wave)
        scaled: npt.NDArray[np.float32] = stretched * (1 - kept) + (1 / wave) * kept
        return scaled


def _yarn_attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)
