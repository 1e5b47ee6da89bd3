"""Attention over a paged key-value cache: append a step's keys and values, then attend.

The cache of a layer is an array of blocks of 16 tokens; a sequence's block table names its blocks in order. A step is
a flat batch of T tokens made of rows: first D decode rows of one token each, then P tiles of 16 tokens, so that
T = D + 16 P. The tokens of a row follow each other in one sequence:

    start_R  absolute position of the row's first token
    count_R  how many of its tokens are real (0: a padding row)
    table_RM block table of the row's sequence, padded with block 0, which is scratch

The tiles of one prompt's chunk are rows like any other; since all rows append before any attends, they see each other.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from anypool.ops.attention import attention

BLOCK = 16
"""Tokens in a cache block, and query tokens in a tile."""


# T token  R row  D decode row  P tile  M block of a table  N query head  K key-value head  H head width
def token_positions(start_R: Array, decode: int) -> Array:
    """Absolute position of every token of a step, (T,); those of padding follow on and mean nothing."""
    tiles = start_R[decode:, None] + jnp.arange(BLOCK, dtype=start_R.dtype)
    return jnp.concatenate([start_R[:decode], tiles.reshape(-1)])


@dataclass(frozen=True)
class PagedAttentionReference:
    """Gathers each row's whole table of blocks and attends densely. The table's width is the cost: keep it bucketed."""

    name: str = "reference"
    bounded_by_table: bool = True
    """True: a step's cost grows with the width of the block table rather than with the live context."""

    def cache_shape(self, blocks: int, kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """Shape of one layer's cache."""
        return (blocks, BLOCK, 2, kv_heads, head_dim)

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
        """Returns the attention output (T, N, H), whose padding tokens mean nothing, and the cache with k, v appended.

        decode: how many of the rows are decode rows. window: keys a query sees, itself included; None: all before it.
        """
        row_T, offset_T = _rows(start_R.shape[0], decode)
        position_T = token_positions(start_R, decode)
        live_T = jnp.asarray(offset_T) < jnp.take(count_R, jnp.asarray(row_T), mode="clip")
        column_T = jnp.clip(position_T // BLOCK, 0, table_RM.shape[1] - 1)
        block_T = jnp.where(live_T, table_RM.at[jnp.asarray(row_T), column_T].get(mode="clip"), 0)
        slot_T = jnp.where(live_T, position_T % BLOCK, 0)
        cache = cache.at[block_T, slot_T].set(jnp.stack([k_TKH, v_TKH], axis=1), mode="promise_in_bounds")
        outputs = []
        for rows, tokens, width in (
            (slice(0, decode), slice(0, decode), 1),
            (slice(decode, None), slice(decode, None), BLOCK),
        ):
            if start_R[rows].shape[0] == 0:
                continue
            outputs.append(
                _attend_rows(q_TNH[tokens], cache, start_R[rows], count_R[rows], table_RM[rows], width, scale, window)
            )
        return jnp.concatenate(outputs), cache


def _rows(rows: int, decode: int) -> tuple[list[int], list[int]]:
    """For every token of a step its row and its offset within the row."""
    pairs = [(r, 0) for r in range(decode)] + [(r, i) for r in range(decode, rows) for i in range(BLOCK)]
    return [p[0] for p in pairs], [p[1] for p in pairs]


def _attend_rows(
    q_TNH: Array,
    cache: Array,
    start_R: Array,
    count_R: Array,
    table_RM: Array,
    width: int,
    scale: float,
    window: int | None,
) -> Array:
    rows, columns = table_RM.shape
    kv = jnp.take(cache, table_RM.reshape(-1), axis=0, mode="clip")
    kv = kv.reshape(rows, columns * BLOCK, 2, *cache.shape[3:])
    query_RQ = start_R[:, None] + jnp.arange(width, dtype=start_R.dtype)
    live_RQ = jnp.arange(width, dtype=start_R.dtype) < count_R[:, None]
    keys_S = jnp.arange(columns * BLOCK, dtype=start_R.dtype)
    mask_RQS = (keys_S <= query_RQ[:, :, None]) & live_RQ[:, :, None]
    if window is not None:
        mask_RQS &= keys_S > query_RQ[:, :, None] - window
    q_RQNH = q_TNH.reshape(rows, width, *q_TNH.shape[1:])
    out = attention(q_RQNH, kv[:, :, 0], kv[:, :, 1], mask_RQS, scale)
    return jax.lax.reshape(out, q_TNH.shape)
