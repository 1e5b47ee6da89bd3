"""LoRA: small trained matrices beside frozen ones (Hu et al. 2021).

A projection by W (O, I) becomes  W x + alpha / rank  B (A x)  with A (rank, I) and B (O, rank), which alone are
trained. They are a tree like the model's own, with an `Adapter` where a projection is adapted and None elsewhere, so
that the optimizer, checkpoints and meshes treat them as any other parameters. Files are those of Hugging Face's PEFT.

There is no dropout.

On a mesh A is divided along its inputs and B along its outputs, as W is; the rank is never divided.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors import SafetensorError
from safetensors.numpy import load_file

from anypool.models import ModelConfig
from anypool.models.decoder import Decoder, Layer
from anypool.models.params import Spec, each, generator, load, shapes
from anypool.models.params import specs as model_specs
from anypool.models.weights import Pending, write_safetensors
from anypool.train.errors import TrainError

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""All projections of a layer, by the names of their Hugging Face modules."""

PREFIX = "base_model.model."
"""What PEFT writes before a module's name."""


CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

_PLAIN = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "use_rslora": False,
}
"""What PEFT says of adapters such as ours."""
_FOREIGN = (
    "use_qalora", "use_bdlora", "lora_bias", "alpha_pattern", "rank_pattern", "modules_to_save", "layer_replication",
    "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "monteclora_config", "velora_config",
)  # fmt: skip
"""Fields of PEFT's configuration that, if set, make another adapter of it."""
_INITIAL = (True, False, "gaussian", "orthogonal")
"""First values that leave the base as it is."""


@dataclass(frozen=True)
class LoraConfig:
    """rank: of the adapters. alpha: their product is scaled by alpha / rank. modules: projections, of `MODULES`."""

    rank: int = 8
    alpha: float = 16.0
    modules: tuple[str, ...] = MODULES

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise TrainError(f"the rank of LoRA is {self.rank}; a whole number of at least 1 is expected")
        if not 0 < self.alpha < math.inf:
            raise TrainError(f"alpha of LoRA is {self.alpha}; a number above 0 is expected")
        if not self.modules:
            raise TrainError(f"modules of LoRA is empty; there are {', '.join(MODULES)}")
        for name in self.modules:
            if name not in MODULES:
                near = get_close_matches(name, MODULES, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise TrainError(f"modules of LoRA has {name!r}; there are {', '.join(MODULES)}{hint}")
            if self.modules.count(name) > 1:
                raise TrainError(f"modules of LoRA has {name!r} twice; name it once")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapter:
    """What is trained beside one projection, or beside a stack of them. a: (R, I). b: (O, R)."""

    a: Any
    b: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapted:
    """A weight that `LoraLinear` multiplies by. weight: as the inner op wants it; a, b: as in `Adapter`."""

    weight: Any
    a: Any
    b: Any


@dataclass(frozen=True)
class AdapterSpec(Spec):
    """A declared half of an adapter."""

    def initial(self, seed: int, std: float = 0.02) -> np.ndarray:
        """The first value in f32: of A uniform within 1 / sqrt(I), as PEFT's, whatever `std` is; of B zeros.

        A pure function of the seed and the tensor's name.
        """
        if self.members or self.init == "zeros":
            return super().initial(seed, std)
        unit = generator(seed, self.name).random(self.shape, np.float32)
        return (unit * 2 - 1) * np.float32(self.shape[-1] ** -0.5)


def specs(model: ModelConfig, lora: LoraConfig, stacked: bool = False) -> Decoder:
    """The declared adapters of a model. Their names are those of PEFT."""

    def one(spec: Spec) -> Adapter | None:
        module, _, kind = spec.name.rpartition(".")
        return _adapter(spec, lora.rank) if kind == "weight" and module.rpartition(".")[2] in lora.modules else None

    # A tree of another kind of leaf: where a spec of a matrix was there is an adapter's two.
    made: Decoder = each(model_specs(Decoder, model, stacked=stacked), one)
    return made


def _adapter(spec: Spec, rank: int) -> Adapter:
    *lead, out, inner = spec.axes
    *count, outputs, inputs = spec.shape
    module = PREFIX + spec.name.removesuffix(".weight")
    members = tuple(_adapter(member, rank) for member in spec.members)
    return Adapter(
        a=AdapterSpec(
            name=f"{module}.lora_A.weight",
            axes=(*lead, "rank", inner),
            shape=(*count, rank, inputs),
            init="uniform",
            members=tuple(member.a for member in members),
        ),
        b=AdapterSpec(
            name=f"{module}.lora_B.weight",
            axes=(*lead, out, "rank"),
            shape=(*count, outputs, rank),
            init="zeros",
            members=tuple(member.b for member in members),
        ),
    )


def adapt(base: Decoder, adapters: Decoder) -> Decoder:
    """The base with an `Adapted` in place of every weight that has an adapter: what `LoraLinear` computes with."""
    return _beside(base, adapters, lambda weight, adapter: Adapted(weight, adapter.a, adapter.b))


def merge(base: Decoder, adapters: Decoder, lora: LoraConfig) -> Decoder:
    """The base with every adapter added to its weight in f32: a model as any other, in the base's dtypes.

    Both trees are stacked or both are not; their arrays are NumPy's or JAX's.
    """

    def one(weight: Any, adapter: Adapter) -> Any:
        return (weight.astype(np.float32) + lora.scale * (adapter.b @ adapter.a)).astype(weight.dtype)

    return _beside(base, adapters, one)


def _beside(base: Decoder, adapters: Decoder, function: Callable[[Any, Adapter], Any]) -> Decoder:
    def one(adapter: Adapter | None, weight: Any) -> Any:
        return weight if adapter is None else function(weight, adapter)

    made: Decoder = jax.tree.map(one, adapters, base, is_leaf=lambda leaf: leaf is None or isinstance(leaf, Adapter))
    return made


# D input width  O output width  V vocabulary
@dataclass(frozen=True)
class LoraLinear:
    """The projections of another op, with adapters beside those weights that have some."""

    inner: Any
    scale: float

    @property
    def name(self) -> str:
        return str(self.inner.name)

    def apply(self, x_D: Array, *weights: Any) -> tuple[Array, ...]:
        """One projection (..., O_i) for each weight, which may be an `Adapted`."""
        plain = self.inner.apply(x_D, *(w.weight if isinstance(w, Adapted) else w for w in weights))
        return tuple(
            y + self._beside(x_D, w) if isinstance(w, Adapted) else y for y, w in zip(plain, weights, strict=True)
        )

    def logits(self, x_D: Array, weight: Any) -> Array:
        """(..., D) -> (..., V) in f32."""
        scores: Array = self.inner.logits(x_D, weight)
        return scores

    def embed(self, table_VD: Any, ids: Array) -> Array:
        """Rows of the table: int (...) -> (..., D)."""
        rows: Array = self.inner.embed(table_VD, ids)
        return rows

    def _beside(self, x_D: Array, weight: Adapted) -> Array:
        (low,) = self.inner.apply(x_D, weight.a)
        (high,) = self.inner.apply(low, weight.b)
        return jnp.asarray(self.scale * high, x_D.dtype)


def adapter_config(lora: LoraConfig, base: str) -> dict[str, Any]:
    """What goes into PEFT's adapter_config.json. base: name or directory of the model that the adapter belongs to."""
    return _PLAIN | {
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.modules),
        "init_lora_weights": True,
        "inference_mode": True,
    }


def save_adapter(directory: Path, model: ModelConfig, lora: LoraConfig, adapters: Decoder, base: str) -> None:
    """Writes the files that PEFT reads into a directory, which is made. adapters: a tree of either form."""
    stacked = isinstance(adapters.layers, Layer)
    tensors: list[Pending] = []

    def add(spec: Spec, array: Any) -> None:
        values = np.asarray(array)
        for one, part in zip(spec.members, values, strict=True) if spec.members else ((spec, values),):
            tensors.append(Pending(one.name, part.dtype, part.shape, partial(np.asarray, part)))

    jax.tree.map(add, specs(model, lora, stacked), adapters, is_leaf=lambda leaf: isinstance(leaf, Spec))
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / WEIGHTS_FILE, tensors)
    text = json.dumps(adapter_config(lora, base), indent=2)
    (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def load_adapter(directory: Path, model: ModelConfig, stacked: bool = False) -> tuple[LoraConfig, Decoder]:
    """An adapter that we or PEFT saved, and its f32 values on the host. Dropout that it was trained with is left out.

    Raises TrainError for files that are missing or damaged, for another kind of adapter, and for one that does not fit
    the model.
    """
    told = _read_config(directory / CONFIG_FILE)
    file = directory / WEIGHTS_FILE
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise TrainError(f"{file} cannot be read ({error}); save the adapter again, as safetensors") from error
    adapted = {name.rpartition(".lora_A.")[0].rpartition(".")[2] for name in tensors}
    modules = tuple(name for name in MODULES if name in adapted)
    if not modules:
        raise TrainError(f"{file} adapts none of {', '.join(MODULES)}; there is nothing to load")
    try:
        lora = LoraConfig(told["r"], told["lora_alpha"], modules)
    except (KeyError, TypeError, TrainError) as error:
        raise TrainError(f"{directory / CONFIG_FILE}: r and lora_alpha must be numbers above 0 ({error!r})") from error
    tree = specs(model, lora, stacked)
    expected, found = shapes(tree), {name: array.shape for name, array in tensors.items()}
    if expected != found:
        name = min(expected.items() ^ found.items())[0]
        raise TrainError(
            f"{file} does not fit: {name} is {found.get(name, 'missing')}, and of rank {lora.rank} beside "
            f"{', '.join(modules)} of every layer it is {expected.get(name, 'not known')}; is it of another model, "
            "or of some layers only?"
        )
    return lora, load(tree, tensors, lambda spec, array: np.asarray(array, np.float32))


def _read_config(file: Path) -> dict[str, Any]:
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainError(f"{file} cannot be read ({error}); save the adapter again with PEFT") from error
    if not isinstance(told, dict):
        raise TrainError(f"{file} is no object of settings; save the adapter again with PEFT")
    for name, plain in _PLAIN.items():
        if told.get(name, plain) != plain:
            raise TrainError(f"{file}: {name} is {told[name]!r}, and only {plain!r} is supported; merge it with PEFT")
    for name in _FOREIGN:
        if told.get(name):
            raise TrainError(f"{file}: {name} is {told[name]!r}, which is not supported; merge it with PEFT")
    if told.get("init_lora_weights", True) not in _INITIAL:
        raise TrainError(
            f"{file}: init_lora_weights is {told['init_lora_weights']!r}, which changes the base; convert the adapter "
            "with save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    return told
