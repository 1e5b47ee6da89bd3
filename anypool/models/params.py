"""Parameters declared once: from one line follow a tensor's shape, sharding, initial value and name in a checkpoint.

    @parameters
    class Layer:
        q: Array = param("heads", "embed", hf="self_attn.q_proj.weight")

`specs(Model, config)` is the same tree with a `Spec` in place of every array; `load`, `initial` and `abstract` map it
to arrays from a checkpoint, to fresh ones, and to shapes without memory. With `stacked=True` the layers are one module
whose tensors have a leading axis "layers", for programs that loop over them; `stack` and `unstack` turn the arrays of
one tree into those of the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from operator import itemgetter
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from anypool.models.config import ModelConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Spec:
    """What is declared of one tensor. `axes` names each dimension's logical axis; `shape` is its size in a model.

    members: what a stack is made of, layer by layer. Their names are in a checkpoint; the stack's own has `{i}` for the
    layer's number.
    """

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    init: str
    members: tuple[Spec, ...] = ()

    def initial(self, seed: int, std: float = 0.02) -> np.ndarray:
        """The tensor's first value in f32: a pure function of the seed and the tensor's name."""
        if self.members:
            return np.stack([member.initial(seed, std) for member in self.members])
        if self.init != "normal":
            return np.full(self.shape, 1.0 if self.init == "ones" else 0.0, np.float32)
        return generator(seed, self.name).standard_normal(self.shape, np.float32) * np.float32(std)

    def read(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """The tensor from a checkpoint."""
        return np.stack([m.read(tensors) for m in self.members]) if self.members else tensors[self.name]


def generator(seed: int, name: str) -> np.random.Generator:
    """What draws a tensor's first values: a pure function of the seed and the tensor's name."""
    key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Size of every logical axis in a model."""
    return {
        "vocab": config.vocab_size,
        "embed": config.hidden_size,
        "mlp": config.intermediate_size,
        "heads": config.num_heads * config.head_dim,
        "kv_heads": config.num_kv_heads * config.head_dim,
        "head_dim": config.head_dim,
    }


def param(*axes: str, hf: str, init: str = "normal", when: Callable[[ModelConfig], bool] = lambda config: True) -> Any:
    """Declares a tensor: logical axes, Hugging Face name, first value (normal, ones, zeros), which models have it."""
    return field(metadata={"axes": axes, "hf": hf, "init": init, "when": when})


def repeated(module: type, hf: str) -> Any:
    """Declares a tuple with one `module` for each layer; `{i}` in `hf` is the layer's number."""
    return field(metadata={"module": module, "hf": hf})


@dataclass_transform(frozen_default=True, field_specifiers=(param, repeated))
def parameters(cls: type[T]) -> type[T]:
    """Makes a class of declarations a frozen dataclass that JAX treats as a tree."""
    made = dataclass(frozen=True)(cls)
    return jax.tree_util.register_dataclass(made, [f.name for f in fields(made)], [])  # type: ignore[arg-type]


def specs(module: type[T], config: ModelConfig, prefix: str = "", stacked: bool = False) -> T:
    """The tree of a module with a `Spec` for every tensor that this model has, and None for those it has not."""
    sizes = axis_sizes(config)
    values: dict[str, Any] = {}
    for item in fields(module):  # type: ignore[arg-type]
        declared = item.metadata
        if "module" in declared:
            one = partial(specs, declared["module"], config)
            layers = tuple(one(prefix + declared["hf"].format(i=i)) for i in range(config.num_layers))
            values[item.name] = _stack_of(one(prefix + declared["hf"]), layers) if stacked else layers
        elif declared["when"](config):
            shape = tuple(sizes[axis] for axis in declared["axes"])
            values[item.name] = Spec(prefix + declared["hf"], declared["axes"], shape, declared["init"])
        else:
            values[item.name] = None
    return module(**values)


def _stack_of(named: T, layers: tuple[T, ...]) -> T:
    def one(spec: Spec, *members: Spec) -> Spec:
        return replace(spec, axes=("layers", *spec.axes), shape=(len(members), *spec.shape), members=members)

    made: T = jax.tree.map(one, named, *layers, is_leaf=lambda leaf: isinstance(leaf, Spec))
    return made


def each(tree: T, function: Callable[[Spec], Any]) -> T:
    """The tree with `function(spec)` in place of every spec."""
    mapped: T = jax.tree.map(function, tree, is_leaf=lambda leaf: isinstance(leaf, Spec))
    return mapped


def all_specs(tree: Any) -> list[Spec]:
    """Every spec of a tree, in the order of declaration."""
    return jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, Spec))


def stack(tree: T) -> T:
    """The arrays of a tree with its layers in one: each tensor a stack over a leading axis."""
    return _change_layers(tree, lambda layers: jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers))


def unstack(tree: T) -> T:
    """The arrays of a stacked tree, layer by layer again."""

    def apart(layers: Any) -> tuple[Any, ...]:
        count = len(jax.tree.leaves(layers)[0])
        return tuple(jax.tree.map(itemgetter(i), layers) for i in range(count))

    return _change_layers(tree, apart)


def _change_layers(tree: T, change: Callable[[Any], Any]) -> T:
    repeats = [item.name for item in fields(tree) if "module" in item.metadata]  # type: ignore[arg-type]
    changed: T = replace(tree, **{name: change(getattr(tree, name)) for name in repeats})  # type: ignore[type-var]
    return changed


def abstract(tree: T, dtype: Any) -> T:
    """Shapes and dtypes without memory."""
    return each(tree, lambda spec: jax.ShapeDtypeStruct(spec.shape, dtype))


def load(
    tree: T,
    tensors: Mapping[str, np.ndarray],
    place: Callable[[Spec, np.ndarray], Any],
    progress: Callable[[int, int], None] | None = None,
) -> T:
    """Every tensor of a tree from a checkpoint, each handed to `place(spec, array)` as it is read.

    Args:
        tensors: by Hugging Face name, for instance `Checkpoint.open(directory)`; `Checkpoint.check` compares their
            shapes with `shapes(tree)` beforehand.
        place: makes the array that goes into the tree: converts, packs, moves to a device.
        progress: called with (tensors done, tensors in all).
    """
    total, done = len(all_specs(tree)), 0

    def one(spec: Spec) -> Any:
        nonlocal done
        placed = place(spec, spec.read(tensors))
        done += 1
        if progress is not None:
            progress(done, total)
        return placed

    return each(tree, one)


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by Hugging Face name."""
    single = [member for spec in all_specs(tree) for member in spec.members or (spec,)]
    return {spec.name: spec.shape for spec in single}


def initial(tree: T, seed: int) -> T:
    """Fresh f32 values on the host."""
    return each(tree, lambda spec: spec.initial(seed))
