"""How a run is spread over a mesh: rules from logical axes to mesh axes, and from them every array's sharding.

Four mesh axes, each of any size:

    data       rows of the batch; parameters are copied. For the slowest network.
    fsdp       rows of the batch; parameters, gradients and optimizer state are divided, and gathered layer by layer.
    sequence   positions of each row; keys and values are gathered for attention. Divides parameters like fsdp.
    tensor     heads, MLP width and vocabulary; between the products, positions. For the fastest network.

A mesh is divided in this order, so that neighbours in it are neighbours along `tensor`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from difflib import get_close_matches
from typing import Any

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from anypool.models import ModelConfig
from anypool.models.params import Spec
from anypool.train.errors import MeshError

ROWS = ("data", "fsdp")
PARAMETER_AXES: dict[str, tuple[str, ...]] = {
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "embed": ("fsdp", "sequence"),
    "head_dim": (),
    "rank": (),
    "layers": (),
}
ACTIVATION_AXES: dict[str, tuple[str, ...]] = {
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "embed": (),
    "head_dim": (),
}


@dataclass(frozen=True)
class MeshShape:
    """Devices along each mesh axis."""

    data: int = 1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1

    @classmethod
    def parse(cls, text: str) -> MeshShape:
        """From "fsdp=8,tensor=4"; axes left out are 1. Raises MeshError."""
        names = [f.name for f in fields(cls)]
        sizes: dict[str, int] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, _, size = (piece.strip() for piece in part.partition("="))
            if name not in names:
                near = get_close_matches(name, names, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise MeshError(f"mesh {text!r}: there is no axis {name!r}, only {', '.join(names)}{hint}")
            if name in sizes:
                raise MeshError(f"mesh {text!r}: {name} is given twice")
            if not size.isdecimal() or int(size) < 1:
                raise MeshError(f"mesh {text!r}: {name} is {size!r}; a whole number of at least 1 is expected")
            sizes[name] = int(size)
        return cls(**sizes)

    @property
    def devices(self) -> int:
        return math.prod(astuple(self))

    def __str__(self) -> str:
        parts = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) > 1]
        return ",".join(parts) or "one device"


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with all four axes, over `devices` (this process's own, or those of a chip that is not here).

    Raises MeshError if their number is another.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) != shape.devices:
        raise MeshError(f"the mesh {shape} has {shape.devices} devices, and there are {len(devices)}")
    names = tuple(f.name for f in fields(MeshShape))
    types = (AxisType.Auto,) * len(names)
    try:
        return jax.make_mesh(astuple(shape), names, axis_types=types, devices=devices)
    except NotImplementedError:
        # An axis that is no product of the torus's own, such as 4 of an 8x8x8, takes a part of one of them.
        placed = mesh_utils.create_device_mesh(astuple(shape), devices, allow_split_physical_axes=True)
        return Mesh(placed, names, axis_types=types)


def single_device() -> Mesh:
    """The mesh of one device."""
    return make_mesh(MeshShape(), jax.devices()[:1])


def check_divides(config: ModelConfig, mesh: Mesh, rows: int, length: int) -> None:
    """Whether the mesh divides a model and a micro-batch of `rows` x `length`.

    Raises MeshError naming the mesh axis, the dimension and what divides.
    """
    for axes, what, size in (
        (("tensor",), "num_attention_heads", config.num_heads),
        (("tensor",), "num_key_value_heads", config.num_kv_heads),
        (("tensor",), "intermediate_size", config.intermediate_size),
        (("tensor",), "vocab_size", config.vocab_size),
        (("fsdp", "sequence"), "hidden_size", config.hidden_size),
        (ROWS, "the rows of a micro-batch,", rows),
        (("sequence", "tensor"), "the sequence length", length),
    ):
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            used = [axis for axis in axes if mesh.shape[axis] > 1]
            product = f" = {parts}" if len(used) > 1 else ""
            divisors = ", ".join(str(n) for n in range(1, min(size, 1024) + 1) if size % n == 0)
            raise MeshError(
                f"mesh axis {' x '.join(used)} = {' x '.join(str(mesh.shape[axis]) for axis in used)}{product} "
                f"does not divide {what} {size}; what divides it: {divisors}"
            )


def parameter_sharding(spec: Spec, mesh: Mesh) -> NamedSharding:
    """Of a parameter, its gradient, and whatever the optimizer keeps for it."""
    matrix = len([axis for axis in spec.axes if axis != "layers"]) > 1
    # Vectors are too small to be worth gathering; those along heads or MLP width stay with their matrix.
    divided = [PARAMETER_AXES[axis] if matrix or axis != "embed" else () for axis in spec.axes]
    return NamedSharding(mesh, PartitionSpec(*divided))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of every array of a `Batch`."""
    return NamedSharding(mesh, PartitionSpec(None, ROWS, "sequence"))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


# B row  T position  N query head  K key-value head  H head width


@dataclass(frozen=True)
class Sharder:
    """Marks activations (`models.decoder.Mark`): their names for remat, and how a mesh divides them."""

    mesh: Mesh

    def __call__(self, x: Array, name: str, *axes: str) -> Array:
        # Between the products every device of `tensor` would hold the same, so there it divides the positions.
        positions = ("sequence", "tensor") if name in ("middle", "residual") else ("sequence",)
        x = self.constrain(x, ROWS, positions, *(ACTIVATION_AXES[axis] for axis in axes))
        named: Array = checkpoint_name(x, name)
        return named

    def constrain(self, x: Array, *divided: tuple[str, ...] | None) -> Array:
        """x, divided over the given mesh axes along each dimension."""
        if self.mesh.size == 1:
            return x
        sharded: Array = jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*divided)))
        return sharded


@dataclass(frozen=True)
class PackedAttend:
    """Attention of a training step (`models.decoder.Attend`); the context is (segments_BT, positions_BT).

    Every device attends with its rows, positions and heads to all keys of its rows: keys and values are gathered along
    `sequence`, which costs little beside the products when a model has few key-value heads.
    """

    kernel: Any
    window: int | None
    mesh: Mesh

    def __call__(self, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, cache: None, context: Any) -> tuple[Array, None]:
        if self.mesh.size == 1:
            return self._local(q_BTNH, k_BTKH, v_BTKH, *context), cache
        heads = PartitionSpec(ROWS, "sequence", "tensor", None)
        row = PartitionSpec(ROWS, "sequence")
        attend = jax.shard_map(
            self._local, mesh=self.mesh, in_specs=(heads, heads, heads, row, row), out_specs=heads, check_vma=False
        )
        return attend(q_BTNH, k_BTKH, v_BTKH, *context), cache

    def _local(self, q: Array, k: Array, v: Array, segments: Array, positions: Array) -> Array:
        keys = (k, v, segments, positions)
        if self.mesh.shape["sequence"] > 1:
            keys = jax.tree.map(lambda x: jax.lax.all_gather(x, "sequence", axis=1, tiled=True), keys)
        k, v, k_segments, k_positions = keys
        scale = q.shape[-1] ** -0.5
        out: Array = self.kernel(q, k, v, segments, positions, k_segments, k_positions, self.window, scale)
        return out
