"""Paged attention over a mesh: every device attends with its own heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec


# T token  R row  M block of a table  N query head  K key-value head  H head width
@dataclass(frozen=True)
class DividedPagedAttention:
    """A paged attention kernel on each device of a mesh, whose axis `tensor` divides the heads; other axes hold copies.

    kernel: of one device, written for its share of the heads.
    """

    kernel: Any
    mesh: Mesh

    @property
    def name(self) -> str:
        """The kernel's own."""
        name: str = self.kernel.name
        return name

    @property
    def bounded_by_table(self) -> bool:
        """The kernel's own."""
        bounded: bool = self.kernel.bounded_by_table
        return bounded

    def cache_shape(self, blocks: int, kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """Shape of one layer's cache, all devices together."""
        shape: tuple[int, ...] = self.kernel.cache_shape(blocks, kv_heads, head_dim)
        return shape

    def cache_spec(self) -> PartitionSpec:
        """How a layer's cache is divided: along its heads, whichever axis holds them."""
        one, two = self.cache_shape(1, 1, 1), self.cache_shape(1, 2, 1)
        return PartitionSpec(*("tensor" if a != b else None for a, b in zip(one, two, strict=True)))

    def new_cache(self, blocks: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> Array:
        """One layer's cache, ready to be written."""
        sharding = jax.sharding.NamedSharding(self.mesh, self.cache_spec())
        return jnp.zeros(self.cache_shape(blocks, kv_heads, head_dim), dtype, device=sharding)

    def apply(
        self,
        q_TNH: Array,
        k_TKH: Array,
        v_TKH: Array,
        cache: Array,
        start_R: Array,
        count_R: Array,
        table_RM: Array,
        decode: int,
        scale: float,
        window: int | None,
    ) -> tuple[Array, Array]:
        """As `PagedAttentionReference.apply`."""

        def local(q: Array, k: Array, v: Array, cache: Array, start: Array, count: Array, table: Array) -> Any:
            return self.kernel.apply(q, k, v, cache, start, count, table, decode, scale, window)

        heads, same, kept = PartitionSpec(None, "tensor", None), PartitionSpec(), self.cache_spec()
        attended: tuple[Array, Array] = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(heads, heads, heads, kept, same, same, same),
            out_specs=(heads, kept),
            check_vma=False,
        )(q_TNH, k_TKH, v_TKH, cache, start_R, count_R, table_RM)
        return attended
