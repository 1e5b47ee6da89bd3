"""Looking up rows of an embedding that a mesh divides.

Left to the partitioner, the lookup gathers the table or the whole batch. Here tokens go to where the columns are and
rows come back, so what moves is as large as the activations, and gradients of the table are summed in place, in f32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from anypool.train.sharding import ROWS

# B row  T position  V vocabulary  D model width
TABLE = PartitionSpec("tensor", ("fsdp", "sequence"))
IDS = PartitionSpec(ROWS, "sequence")
FIRST = PartitionSpec("tensor")
LOOKED_UP = PartitionSpec(ROWS, ("sequence", "tensor"), None)


@dataclass(frozen=True)
class ShardedLinear:
    """The projections of another op, and the lookup for a table divided over a mesh."""

    inner: Any
    mesh: Mesh

    @property
    def name(self) -> str:
        return str(self.inner.name)

    def apply(self, x_D: Array, *weights: Any) -> tuple[Array, ...]:
        projected: tuple[Array, ...] = self.inner.apply(x_D, *weights)
        return projected

    def embed(self, table_VD: Array, ids_BT: Array) -> Array:
        """(B, T, D), its positions divided over `tensor` too."""
        return _lookup(self.mesh, table_VD, ids_BT)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(mesh: Mesh, table_VD: Array, ids_BT: Array) -> Array:
    def local(table: Array, ids: Array, first: Array) -> Array:
        ids, mine = _own(_tokens(mesh, ids), first, len(table))
        rows = jnp.where(mine[..., None], jnp.take(table, ids, axis=0, mode="clip"), jnp.zeros((), table.dtype))
        # Columns for rows and positions: the parts of `sequence` are neighbours within those of `fsdp`.
        for axis, divided in (("sequence", 1), ("fsdp", 0)):
            if mesh.shape[axis] > 1:
                rows = lax.all_to_all(rows, axis, split_axis=divided, concat_axis=2, tiled=True)
        if mesh.shape["tensor"] > 1:
            rows = lax.psum_scatter(rows, "tensor", scatter_dimension=1, tiled=True)
        return rows

    looked_up: Array = _mapped(mesh, local, (TABLE, IDS, FIRST), LOOKED_UP)(
        table_VD, ids_BT, _first_rows(mesh, table_VD)
    )
    return looked_up


def _lookup_forward(mesh: Mesh, table_VD: Array, ids_BT: Array) -> tuple[Array, tuple[Array, Array]]:
    return _lookup(mesh, table_VD, ids_BT), (table_VD, ids_BT)


def _lookup_backward(mesh: Mesh, kept: tuple[Array, Array], bar_BTD: Array) -> tuple[Array, None]:
    table_VD, ids_BT = kept

    def local(table: Array, ids: Array, first: Array, bar: Array) -> Array:
        if mesh.shape["tensor"] > 1:
            bar = lax.all_gather(bar, "tensor", axis=1, tiled=True)
        for axis, divided in (("fsdp", 0), ("sequence", 1)):
            if mesh.shape[axis] > 1:
                bar = lax.all_to_all(bar, axis, split_axis=2, concat_axis=divided, tiled=True)
        ids, mine = _own(_tokens(mesh, ids), first, len(table))
        bar = jnp.where(mine[..., None], bar.astype(jnp.float32), 0.0)
        summed = jnp.zeros(table.shape, jnp.float32).at[ids].add(bar, mode="promise_in_bounds")
        summed = lax.psum(summed, "data") if mesh.shape["data"] > 1 else summed
        return summed.astype(table.dtype)

    back = _mapped(mesh, local, (TABLE, IDS, FIRST, LOOKED_UP), TABLE)
    return back(table_VD, ids_BT, _first_rows(mesh, table_VD), bar_BTD), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def _tokens(mesh: Mesh, ids: Array) -> Array:
    """The tokens of all devices that share this one's rows of the table but hold other columns."""
    for axis, divided in (("sequence", 1), ("fsdp", 0)):
        if mesh.shape[axis] > 1:
            ids = lax.all_gather(ids, axis, axis=divided, tiled=True)
    return ids


def _own(ids: Array, first: Array, rows: int) -> tuple[Array, Array]:
    """Tokens as rows of this device's part of the table, and whether they are in it; if not, they are some row."""
    ids = ids - first[0]
    return jnp.clip(ids, 0, rows - 1), (ids >= 0) & (ids < rows)


def _first_rows(mesh: Mesh, table_VD: Array) -> Array:
    """The first row of each part of the table, one for each device along `tensor`."""
    parts = mesh.shape["tensor"]
    return jnp.arange(0, table_VD.shape[0], table_VD.shape[0] // parts, dtype=jnp.int32)


def _mapped(mesh: Mesh, local: Any, of: Any, to: Any) -> Any:
    return jax.shard_map(local, mesh=mesh, in_specs=of, out_specs=to, check_vma=False)
