"""The shape of a model, dense or mixture of experts: what speed and memory depend on, and no weights.

Two ways in: the catalogue `data/models.toml` (or a file like it), and a `ModelConfig` of a model that Anypool runs.
Floating-point operations follow `anypool.models.counts`: causal attention once, keys outside a window not at all, the
lookup of the embedding not, the way back twice the way forward, recomputation never.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from anypool.chips import nearest
from anypool.models import ModelConfig
from anypool.plan.performance.errors import ShapeError


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one model.

    width: of the residual stream. head_dim: of queries and keys; value_dim: of values, head_dim unless given.
    feed_forward: width of a dense layer's products, 0 where every layer is a mixture. matrices: 3 with a gate, else 2.
    experts, experts_per_token, shared_experts, expert_width: 0 for a dense model. dense_layers: layers at the start
    without experts; expert_every: of the others, every how many have them.
    q_rank, kv_rank, rope_dim: of latent attention, 0 without. window, windowed_share: keys that a sliding layer sees,
    and the share of such layers. total, active: parameters, where they are given and not counted from the sizes;
    `active` are those that a token is multiplied by, output projection included, lookup table not.
    """

    name: str
    layers: int
    width: int
    heads: int
    vocabulary: int
    kv_heads: int = 0
    head_dim: int = 0
    value_dim: int = 0
    feed_forward: int = 0
    matrices: int = 3
    experts: int = 0
    experts_per_token: int = 0
    shared_experts: int = 0
    expert_width: int = 0
    dense_layers: int = 0
    expert_every: int = 1
    q_rank: int = 0
    kv_rank: int = 0
    rope_dim: int = 0
    window: int = 0
    windowed_share: float = 0.0
    tied: bool = False
    total: int = 0
    active: int = 0
    source: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def is_mixture(self) -> bool:
        return self.experts > 0

    @property
    def kind(self) -> str:
        """ "moe" or "dense"."""
        return "moe" if self.is_mixture else "dense"

    @property
    def expert_layers(self) -> int:
        return (self.layers - self.dense_layers) // self.expert_every if self.is_mixture else 0

    @property
    def head_parameters(self) -> int:
        """Of the output projection."""
        return self.width * self.vocabulary

    @property
    def attention_parameters(self) -> int:
        """Of one layer's projections."""
        if self.kv_rank:
            into_queries = self.width * self.q_rank + self.q_rank * self.heads * self.head_dim
            into_keys = self.width * (self.kv_rank + self.rope_dim)
            out_of_latent = self.kv_rank * self.heads * (self.head_dim - self.rope_dim + self.values)
            return into_queries + into_keys + out_of_latent + self.heads * self.values * self.width
        keys = self.width * self.kv_heads * (self.head_dim + self.values)
        return self.width * self.heads * (self.head_dim + self.values) + keys

    @property
    def values(self) -> int:
        """Width of a head's values."""
        return self.value_dim or self.head_dim

    @property
    def expert_parameters(self) -> int:
        """Of one expert of one layer."""
        return self.matrices * self.width * self.expert_width

    @property
    def shared_parameters(self) -> int:
        """In the layers, that every token is multiplied by: attention, dense layers, shared experts, routers."""
        if self.active:
            return self.active - self.head_parameters - self.routed_parameters
        dense = (self.layers - self.expert_layers) * self.matrices * self.width * self.feed_forward
        mixture = self.expert_layers * (self.shared_experts * self.expert_parameters + self.width * self.experts)
        return self.layers * self.attention_parameters + dense + mixture

    @property
    def routed_parameters(self) -> int:
        """In routed experts, that one token is multiplied by, over all layers."""
        return self.expert_layers * self.experts_per_token * self.expert_parameters

    @property
    def product_parameters(self) -> int:
        """In the layers, that one token is multiplied by."""
        return self.shared_parameters + self.routed_parameters

    @property
    def active_parameters(self) -> int:
        """That one token is multiplied by: the layers and the output projection."""
        return self.active or self.product_parameters + self.head_parameters

    @property
    def total_parameters(self) -> int:
        """In a checkpoint, norms and biases left out."""
        if self.total:
            return self.total
        others = self.expert_layers * (self.experts - self.experts_per_token) * self.expert_parameters
        return self.product_parameters + others + self.head_parameters * (1 if self.tied else 2)

    @property
    def cache_elements_per_token(self) -> int:
        """Of keys and values, over all layers, windows not considered."""
        if self.kv_rank:
            return self.layers * (self.kv_rank + self.rope_dim)
        return self.layers * self.kv_heads * (self.head_dim + self.values)

    def keys_seen(self, length: int) -> float:
        """Keys that a token of a causal sequence sees, itself included, on average over tokens and layers."""
        full = (length + 1) / 2
        if not self.window or self.window >= length:
            return full
        window = (self.window * (self.window + 1) / 2 + (length - self.window) * self.window) / length
        return self.windowed_share * window + (1 - self.windowed_share) * full

    def keys_at(self, position: int) -> float:
        """Keys that the token at `position` sees, on average over layers."""
        if not self.window or self.window >= position:
            return float(position)
        return self.windowed_share * self.window + (1 - self.windowed_share) * position

    def attention_flops(self, keys: float) -> float:
        """Of one token that sees `keys` keys, over all layers, on the way forward."""
        return 2.0 * self.layers * self.heads * (self.head_dim + self.values) * keys

    def forward_flops_per_token(self, length: int) -> float:
        return 2.0 * self.active_parameters + self.attention_flops(self.keys_seen(length))

    def train_flops_per_token(self, length: int) -> float:
        """Forward and back, nothing computed again."""
        return 3.0 * self.forward_flops_per_token(length)


def shape_of_config(config: ModelConfig, name: str) -> ModelShape:
    """The shape of a model that Anypool runs."""
    return ModelShape(
        name=name,
        layers=config.num_layers,
        width=config.hidden_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        feed_forward=config.intermediate_size,
        vocabulary=config.vocab_size,
        tied=config.tie_embeddings,
        window=config.sliding_window or 0,
        windowed_share=1.0 if config.sliding_window else 0.0,
    )


@functools.cache
def catalogue() -> Mapping[str, ModelShape]:
    """The models of `data/models.toml`, by name."""
    text = (resources.files("anypool.plan") / "data" / "models.toml").read_text(encoding="utf-8")
    return parse_shapes(text, "models.toml")


def load_shapes(path: Path | None = None) -> Mapping[str, ModelShape]:
    """The catalogue, and the models of a file like it, which come first. Raises ShapeError."""
    if path is None:
        return catalogue()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ShapeError(f"models file {path} cannot be read: {error}") from None
    return {**catalogue(), **parse_shapes(text, str(path))}


def find_shape(name: str, shapes: Mapping[str, ModelShape]) -> ModelShape:
    """The model of this name or alias. Raises ShapeError: which exist, and how to give a shape."""
    wanted = name.strip().lower()
    names = {alias: shape for shape in shapes.values() for alias in (shape.name, *shape.aliases)}
    if wanted in names:
        return names[wanted]
    hint = nearest(wanted, names) or ""
    raise ShapeError(
        f"there is no model {name!r}{hint}; known: {', '.join(shapes)}. For another, write its layers, width, heads, "
        "vocabulary and so on into a TOML file like anypool/plan/data/models.toml and give it with --models"
    )


def parse_shapes(text: str, file: str) -> dict[str, ModelShape]:
    """A file of shapes, each checked. Raises ShapeError: file, model, field, value and fix."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ShapeError(f"{file}: not valid TOML: {error}") from None
    sources = data.pop("sources", {})
    return {name: _read(name, table, file, sources) for name, table in data.items()}


_COUNTS = [field.name for field in fields(ModelShape) if field.type == "int"]
_KEYS = [field.name for field in fields(ModelShape) if field.name != "name"]
_LARGEST = {"total": 10**14, "active": 10**14, "vocabulary": 10**8}


def _read(name: str, table: Any, file: str, sources: Mapping[str, Any]) -> ModelShape:
    if not isinstance(table, dict):
        raise ShapeError(f'{file}: {name} = {table!r}: write a table ["{name}"] with its sizes')

    def wrong(key: str, fix: str) -> ShapeError:
        return ShapeError(f"{file}: {name}.{key} = {table.get(key)!r}: {fix}")

    for key in table:
        if key not in _KEYS:
            raise wrong(key, f"unknown key{nearest(key, _KEYS) or ': remove it'}")
    for key in ("layers", "width", "heads", "vocabulary"):
        if key not in table:
            raise wrong(key, "is missing: add it")
    for key in _COUNTS:
        value = table.get(key, 1)
        least = 0 if key == "dense_layers" else 1
        if type(value) is not int or not least <= value <= _LARGEST.get(key, 10**7):
            raise wrong(key, f"must be a whole number of {least} to {_LARGEST.get(key, 10**7):,}")
    share = table.get("windowed_share", 0.0)
    if not isinstance(share, int | float) or not 0 <= share <= 1:
        raise wrong("windowed_share", "must be the share of layers with a window, 0 to 1")
    if not isinstance(table.get("tied", False), bool):
        raise wrong("tied", "must be true or false")
    source = table.get("source", "")
    values = dict(table)
    values["aliases"] = tuple(table.get("aliases", ()))
    values["source"] = sources[source]["where"] if source in sources else source or file
    values.setdefault("head_dim", table["width"] // table["heads"])
    values.setdefault("kv_heads", table["heads"])
    return _checked(ModelShape(name=name.lower(), **values), wrong)


def _checked(shape: ModelShape, wrong: Any) -> ModelShape:
    """Sizes that go together."""
    if shape.is_mixture:
        if not shape.experts_per_token or not shape.expert_width:
            raise wrong("experts", "a mixture also needs experts_per_token and expert_width")
        if shape.experts_per_token > shape.experts:
            raise wrong("experts_per_token", f"must be at most experts, {shape.experts}")
    elif shape.expert_width or shape.experts_per_token:
        raise wrong("experts_per_token", "goes with experts: say how many there are")
    elif not shape.feed_forward and not shape.active:
        raise wrong("feed_forward", "is missing: add it, or `active`, the parameters that a token is multiplied by")
    if not shape.is_mixture and shape.active and not shape.total:
        raise wrong("total", "is missing: with `active` goes `total`, the parameters of the checkpoint")
    if shape.shared_parameters <= 0:
        raise wrong("active", "leaves nothing for attention and dense layers: correct it")
    if shape.total_parameters < shape.active_parameters and not shape.tied:
        raise wrong("total", f"is less than the {shape.active_parameters:,} that a token is multiplied by")
    return shape
