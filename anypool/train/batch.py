"""What one step learns from: packed rows of tokens, made on the host."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from anypool.train.errors import MeshError, TrainError
from anypool.train.sharding import batch_sharding

# A micro-batch  R row of the global batch  B row of a micro-batch = R/A  T position


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Arrays (A, B, T), one slice of the first axis for each micro-batch. Sequences may share a row.

    tokens: int32. targets: int32, what each position is to predict. weights: f32, 1 where that counts and 0 elsewhere.
    segments: int32, equal for the tokens of one sequence, which are neighbours; positions: int32, from 0 in each.
    """

    tokens: Any
    targets: Any
    weights: Any
    segments: Any
    positions: Any

    @classmethod
    def from_rows(
        cls,
        tokens_RT: np.ndarray,
        segments_RT: np.ndarray | None = None,
        learned_RT: np.ndarray | None = None,
        micro_batches: int = 1,
    ) -> Batch:
        """Each token predicts the next one of its segment.

        Args:
            tokens_RT: int.
            segments_RT: int, 0 for padding, which is never learned; without it each row is one sequence.
            learned_RT: bool, which tokens are to be learned (answers, not questions); without it all are.
            micro_batches: A. Row r goes into micro-batch r modulo A, so that neighbouring rows of a batch are
                neighbours in every micro-batch, and a host's part of a batch is one slice of its rows.

        Raises TrainError if the rows do not divide.
        """
        segments_RT = np.ones_like(tokens_RT) if segments_RT is None else segments_RT
        learned_RT = np.ones(tokens_RT.shape, bool) if learned_RT is None else learned_RT
        rows, length = tokens_RT.shape
        _rows_each(rows, micro_batches)
        follows = np.zeros(tokens_RT.shape, bool)
        follows[:, :-1] = (segments_RT[:, 1:] == segments_RT[:, :-1]) & (segments_RT[:, 1:] > 0) & learned_RT[:, 1:]
        first = np.ones(tokens_RT.shape, bool)
        first[:, 1:] = segments_RT[:, 1:] != segments_RT[:, :-1]
        order = np.arange(length)
        arrays = {
            "tokens": tokens_RT.astype(np.int32),
            "targets": np.roll(tokens_RT, -1, axis=1).astype(np.int32),
            "weights": follows.astype(np.float32),
            "segments": segments_RT.astype(np.int32),
            "positions": (order - np.maximum.accumulate(np.where(first, order, 0), axis=1)).astype(np.int32),
        }
        shape = (-1, micro_batches, length)
        return cls(**{name: array.reshape(shape).swapaxes(0, 1) for name, array in arrays.items()})

    @classmethod
    def abstract(cls, micro_batches: int, rows: int, length: int, sharding: Any = None) -> Batch:
        """Shapes and dtypes without memory; `rows` are those of one micro-batch."""
        shape = (micro_batches, rows, length)
        kinds = {f.name: np.float32 if f.name == "weights" else np.int32 for f in fields(cls)}
        return cls(**{name: jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for name, kind in kinds.items()})


def rows_here(mesh: Mesh, rows: int, micro_batches: int = 1) -> slice:
    """Which rows of a batch this process has to read: the smallest slice with all that its devices work on.

    rows: of the whole batch, over all micro-batches and processes.

    Raises MeshError if the mesh has no device of this process, TrainError if the rows do not divide.
    """
    first, last = _range_here(mesh, _rows_each(rows, micro_batches))
    return slice(first * micro_batches, last * micro_batches)


def place_batch(mesh: Mesh, part: Batch, rows: int) -> Batch:
    """The whole batch on the mesh, from this process's part of it; every process calls it.

    Args:
        part: made with `Batch.from_rows` of the rows that `rows_here(mesh, rows, micro_batches)` says, on the host.
        rows: of the whole batch, over all micro-batches and processes.

    Raises TrainError if the part has another number of rows.
    """
    micro_batches, given, length = part.tokens.shape
    whole = (micro_batches, _rows_each(rows, micro_batches), length)
    first, last = _range_here(mesh, whole[1])
    if given != last - first:
        raise TrainError(
            f"the part of this process has {given * micro_batches} rows; of a batch of {rows} rows it is to have "
            f"{(last - first) * micro_batches}, from row {first * micro_batches} on"
        )
    sharding = batch_sharding(mesh)

    def place(array: np.ndarray) -> jax.Array:
        def one(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[1].indices(whole[1])
            part: np.ndarray = array[index[0], start - first : stop - first, index[2]]
            return part

        return jax.make_array_from_callback(whole, sharding, one)

    placed: Batch = jax.tree.map(place, part)
    return placed


def _rows_each(rows: int, micro_batches: int) -> int:
    if rows % micro_batches:
        raise TrainError(
            f"{micro_batches} micro-batches do not divide a batch of {rows} rows; "
            f"use {', '.join(str(n) for n in range(1, rows + 1) if rows % n == 0)}"
        )
    return rows // micro_batches


def _range_here(mesh: Mesh, rows: int) -> tuple[int, int]:
    """The rows of a micro-batch that this process's devices work on: the first, and the one after the last."""
    length = mesh.shape["sequence"]  # any that divides
    try:
        held = batch_sharding(mesh).addressable_devices_indices_map((1, rows, length))
    except ValueError as error:
        parts = mesh.shape["data"] * mesh.shape["fsdp"]
        raise MeshError(f"the mesh divides rows by data x fsdp = {parts}, and a micro-batch has {rows}") from error
    ranges = [index[1].indices(rows)[:2] for index in held.values() if index is not None]
    if not ranges:
        raise MeshError("the mesh has no device of this process; give every process some of its devices")
    return min(first for first, _ in ranges), max(last for _, last in ranges)
