"""Serving's attention on a TPU. The package's kernel does not run on a CPU, not even interpreted (JAX 0.10.2: the
interpreter knows no reshape of a reference), so its own reference computes in its place: what is tested is ours, the
cache's layout and update, the lengths, tables and calls that the package is given.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as package
from jax.sharding import AxisType

from anypool.ops.divided import DividedPagedAttention
from anypool.ops.kernels import reference
from anypool.ops.paged_attention import BLOCK
from anypool.ops.tpu import RaggedPagedAttention, paged

N, K, H, BLOCKS, WIDTH = 4, 2, 8, 24, 5
OURS, REFERENCE = RaggedPagedAttention(), reference().paged_attention


class Package:
    """In place of the package: its reference, behind the checks of its kernel."""

    @staticmethod
    def ragged_paged_attention(*arrays: Any, **options: Any) -> Any:
        check: Any = package.dynamic_validate_inputs
        check(*arrays, **options)
        for name in ("num_kv_pages_per_block", "num_queries_per_block"):
            del options[name]
        return package.ref_ragged_paged_attention(*arrays, **options)


DECODE, TILES = 3, 3
PLACES = (0, 15, 37, WIDTH * BLOCK - 1)
"""Positions that a step's rows start at: few, because what stands in for the package compiles for every length."""


@st.composite
def steps(draw: st.DrawFn) -> dict[str, Any]:
    """A step: decode rows at any place or empty, and a prompt's chunk in tiles, its last one perhaps not full."""
    free = iter(range(1, BLOCKS))
    starts, counts, tables = [], [], []

    def add(start: int, count: int, table: list[int]) -> None:
        starts.append(start)
        counts.append(count)
        tables.append(table + [0] * (WIDTH - len(table)))

    for _ in range(DECODE):
        live = draw(st.booleans())
        start = draw(st.sampled_from(PLACES)) if live else 0
        add(start, int(live), [next(free) for _ in range(start // BLOCK + 1)] if live else [])
    start = draw(st.sampled_from(PLACES[:2]))
    length = draw(st.sampled_from((1, 33, TILES * BLOCK)))
    table = [next(free) for _ in range(-(-(start + length) // BLOCK))]
    for at in range(start, start + length, BLOCK):
        add(at, min(BLOCK, start + length - at), table)
    for _ in range(DECODE + TILES - len(starts)):
        add(0, 0, [])
    return {
        "start": np.array(starts, np.int32),
        "count": np.array(counts, np.int32),
        "table": np.array(tables, np.int32),
        "decode": DECODE,
    }


@cache
def jitted(kernel: Any) -> Any:
    return jax.jit(kernel.apply, static_argnums=(7, 8, 9))


def run(kernel: Any, kept: Any, step: dict[str, Any], window: int | None) -> tuple[np.ndarray, np.ndarray]:
    rows, decode = len(step["start"]), step["decode"]
    rng = np.random.default_rng(rows)
    q, k, v = (
        jnp.asarray(rng.standard_normal((decode + BLOCK * (rows - decode), heads, H), np.float32))
        for heads in (N, K, K)
    )
    arrays = (jnp.asarray(step[name]) for name in ("start", "count", "table"))
    apply: Any = kernel.apply if kernel is OURS else jitted(kernel)
    out, kept = apply(q, k, v, kept, *arrays, decode, H**-0.5, window)
    return np.asarray(out), np.asarray(kept)


def paired(blocks: np.ndarray) -> np.ndarray:
    """The reference's cache (blocks, 16, 2, K, H) as ours holds it: keys and values of a head are neighbours."""
    return blocks.transpose(0, 1, 3, 2, 4).reshape(len(blocks), BLOCK, 2 * K, H)


def agree(kernel: Any, step: dict[str, Any], window: int | None) -> None:
    before = np.random.default_rng(0).standard_normal((BLOCKS, BLOCK, 2, K, H)).astype(np.float32)
    theirs, their_cache = run(REFERENCE, jnp.asarray(before), step, window)
    ours, ours_cache = run(kernel, jnp.asarray(paired(before)), step, window)
    widths = [1] * step["decode"] + [BLOCK] * (len(step["start"]) - step["decode"])
    real = np.concatenate([np.arange(width) < count for width, count in zip(widths, step["count"], strict=True)])
    assert np.abs(ours[real] - theirs[real]).max(initial=0) < 1e-5
    assert np.isfinite(ours).all()
    # All but the scratch block, to which padding is written in any order.
    assert np.array_equal(ours_cache[1:], paired(their_cache)[1:])


@given(step=steps(), window=st.sampled_from([None, 20]))
@settings(max_examples=6, deadline=None)
def test_any_step_is_the_references(step: dict[str, Any], window: int | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged, "_package", lambda: Package)
        agree(OURS, step, window)


STEP: dict[str, Any] = {
    "start": np.array([70, 0, 0, 16, 32], np.int32),
    "count": np.array([1, 0, 16, 16, 5], np.int32),
    "table": np.array([[1, 2, 3, 4, 5], [0] * 5, *[[6, 7, 8, 0, 0]] * 3], np.int32),
    "decode": 2,
}


def test_tables_too_large_for_one_call_go_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    class Counted(Package):
        @staticmethod
        def ragged_paged_attention(*arrays: Any, **options: Any) -> Any:
            calls.append(arrays[3].size)
            return Package.ragged_paged_attention(*arrays, **options)

    monkeypatch.setattr(paged, "_package", lambda: Counted)
    monkeypatch.setattr(paged, "MOST_TABLE_ENTRIES", 2 * WIDTH)
    agree(OURS, STEP, None)
    assert calls == [2 * WIDTH, 2 * WIDTH, WIDTH]


def test_a_tile_may_end_beyond_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last real token is in the table, its padding is not; only the check of arguments minds that."""
    monkeypatch.setattr(package, "dynamic_validate_inputs", package.static_validate_inputs)
    monkeypatch.setattr(paged, "_package", lambda: Package)
    tile = {"start": np.array([65], np.int32), "count": np.array([5], np.int32), "decode": 0}
    agree(OURS, tile | {"table": np.array([[1, 2, 3, 4, 5]], np.int32)}, None)


def test_over_a_mesh_the_cache_is_divided_along_its_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = jax.make_mesh((1, 1), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    for kernel, axis in ((OURS, 2), (REFERENCE, 3)):
        divided = DividedPagedAttention(kernel, mesh)
        assert divided.name == kernel.name
        assert divided.bounded_by_table == kernel.bounded_by_table
        shape = divided.cache_shape(9, K, H)
        assert shape == kernel.cache_shape(9, K, H)
        assert [i for i, name in enumerate(divided.cache_spec()) if name == "tensor"] == [axis]
        assert divided.new_cache(9, K, H, jnp.dtype(jnp.float32)).shape == shape


def test_over_a_mesh_every_device_attends_with_its_own_heads() -> None:
    """With the reference for kernel, on a mesh of as many devices as there are, up to 2."""
    wide = min(2, len(jax.devices()))
    mesh = jax.make_mesh((1, wide), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:wide])
    before = jnp.asarray(np.random.default_rng(0).standard_normal((BLOCKS, BLOCK, 2, K, H)).astype(np.float32))
    alone = run(REFERENCE, before, STEP, None)
    spread = run(DividedPagedAttention(REFERENCE, mesh), before, STEP, None)
    for ours, theirs in zip(spread, alone, strict=True):
        assert np.abs(ours - theirs).max() < 1e-6
