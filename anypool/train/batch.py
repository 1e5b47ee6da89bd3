"""What one step learns from: packed rows of tokens, made on the host."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np

from anypool.train.errors import TrainError

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
            micro_batches: how many parts the rows are divided into, one after the other.

        Raises TrainError if the rows do not divide.
        """
        segments_RT = np.ones_like(tokens_RT) if segments_RT is None else segments_RT
        learned_RT = np.ones(tokens_RT.shape, bool) if learned_RT is None else learned_RT
        rows, length = tokens_RT.shape
        if rows % micro_batches:
            raise TrainError(
                f"{micro_batches} micro-batches do not divide a batch of {rows} rows; "
                f"use {', '.join(str(n) for n in range(1, rows + 1) if rows % n == 0)}"
            )
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
        return cls(**{name: array.reshape(micro_batches, -1, length) for name, array in arrays.items()})

    @classmethod
    def abstract(cls, micro_batches: int, rows: int, length: int, sharding: Any = None) -> Batch:
        """Shapes and dtypes without memory; `rows` are those of one micro-batch."""
        shape = (micro_batches, rows, length)
        kinds = {f.name: np.float32 if f.name == "weights" else np.int32 for f in fields(cls)}
        return cls(**{name: jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for name, kind in kinds.items()})
