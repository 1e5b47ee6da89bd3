"""Serving's attention on a TPU: the live context is read from its pages in place, whatever the table's width.

The kernel is `jax.experimental.pallas.ops.tpu.ragged_paged_attention`, for which every row of a step (see
`ops.paged_attention`) is a sequence of a fixed number of queries: 1 of a decode row, 16 of a tile. A tile's padding is
attended for like any token, after those that are real; no real token sees it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from anypool.ops.need import Need, lacks
from anypool.ops.paged_attention import BLOCK, token_positions

LANES = 128
MOST_TABLE_ENTRIES = 2**16
"""Of block tables in one call: they are held in scalar memory, of which the smallest chip has 1 MiB."""
BUFFER_BYTES = 2**22
"""Of the keys and values that a call holds in vector memory, twice: read ahead while computed on."""
QUERIES = 32
"""Queries in a block."""
_MODULE = "jax.experimental.pallas.ops.tpu.ragged_paged_attention"


# T token  R row  M block of a table  N query head  K key-value head  H head width
@dataclass(frozen=True)
class RaggedPagedAttention:
    """`PagedAttentionReference` that reads the context where it lies. Keys and values of a head are neighbours."""

    name: str = "pallas ragged paged"
    bounded_by_table: bool = False
    """False: a step costs what its live context is."""

    def refuses(self, need: Need) -> str | None:
        """Why it cannot serve this model, or None."""
        if (lacking := lacks(_MODULE)) is not None:
            return lacking
        if need.dtype not in (jnp.bfloat16, jnp.float32):
            return f"ragged paged attention computes in bfloat16 or float32, not {need.dtype}"
        if need.head_dim % LANES:
            return f"ragged paged attention takes heads of a multiple of {LANES} wide, not {need.head_dim}"
        if need.kv_heads is not None:
            packed, odd = divmod(2 * need.kv_heads, 4 // need.dtype.itemsize)
            if odd or (packed not in (1, 2, 4, 8) and packed % 8):
                return f"ragged paged attention cannot tile {need.kv_heads} key-value heads of {need.dtype} a device"
        return None

    def cache_shape(self, blocks: int, kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """Shape of one layer's cache."""
        return (blocks, BLOCK, 2 * kv_heads, head_dim)

    def new_cache(self, blocks: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> Array:
        """One layer's cache, ready to be written."""
        return jnp.zeros(self.cache_shape(blocks, kv_heads, head_dim), dtype)

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
        widths = np.array([1] * decode + [BLOCK] * (start_R.shape[0] - decode))
        cache = _append(k_TKH, v_TKH, cache, start_R, count_R, table_RM, decode, widths)
        # A padding row has queries too; what they see is the scratch block, and means nothing. The padding of a last
        # tile may lie beyond the table: there the kernel reads the row's first page, which no real query sees twice.
        lengths_R = jnp.where(count_R > 0, start_R, 0) + jnp.asarray(widths, jnp.int32)
        ends = np.concatenate([[0], np.cumsum(widths)])
        rows = max(1, MOST_TABLE_ENTRIES // table_RM.shape[1])
        out = []
        for first in range(0, len(widths), rows):
            last = min(first + rows, len(widths))
            out.append(
                _attend(
                    q_TNH[ends[first] : ends[last]],
                    cache,
                    lengths_R[first:last],
                    table_RM[first:last],
                    ends[first : last + 1] - ends[first],
                    scale,
                    window,
                )
            )
        return jnp.concatenate(out), cache


def _append(
    k_TKH: Array,
    v_TKH: Array,
    cache: Array,
    start_R: Array,
    count_R: Array,
    table_RM: Array,
    decode: int,
    widths: np.ndarray,
) -> Array:
    """The cache with a step's keys and values; those of padding go to the scratch block."""
    row_T = np.repeat(np.arange(len(widths)), widths)
    offset_T = np.concatenate([np.arange(width) for width in widths])
    position_T = token_positions(start_R, decode)
    live_T = offset_T < count_R[row_T]
    column_T = jnp.clip(position_T // BLOCK, 0, table_RM.shape[1] - 1)
    block_T = jnp.where(live_T, table_RM[row_T, column_T], 0)
    slot_T = jnp.where(live_T, position_T % BLOCK, 0)
    pairs = jnp.stack([k_TKH, v_TKH], axis=2).reshape(len(row_T), *cache.shape[2:])
    return cache.at[block_T, slot_T].set(pairs, mode="promise_in_bounds")


def _attend(
    q_TNH: Array,
    cache: Array,
    lengths_R: Array,
    table_RM: Array,
    ends: np.ndarray,
    scale: float,
    window: int | None,
) -> Array:
    """Attention of rows whose queries are `ends[i]` to `ends[i + 1]` and see `lengths_R[i]` tokens, themselves last."""
    page_bytes = cache.dtype.itemsize * int(np.prod(cache.shape[1:]))
    attended: Array = _package().ragged_paged_attention(
        q_TNH,
        cache,
        lengths_R,
        table_RM,
        jnp.asarray(ends, jnp.int32),
        jnp.array([len(ends) - 1], jnp.int32),
        sm_scale=scale,
        sliding_window=window,
        # Said here, because the package would look at the machine's own devices to find them.
        num_kv_pages_per_block=max(1, min(table_RM.shape[1], BUFFER_BYTES // (2 * page_bytes))),
        num_queries_per_block=min(q_TNH.shape[0], QUERIES),
    )
    return attended


def _package() -> Any:
    from jax.experimental.pallas.ops.tpu import ragged_paged_attention

    return ragged_paged_attention
