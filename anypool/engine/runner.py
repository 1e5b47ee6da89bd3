"""The model on a pool's device: weights, paged caches, and compiled programs for every shape.

State lives here and nowhere else on the device side: `params` never change, `caches` are donated to each step and
replaced by its result.
"""

import fcntl
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anypool.engine.batch import EDIT_BUCKETS, Batch
from anypool.engine.shapes import Shape, ShapeSet
from anypool.models import Checkpoint, ModelConfig
from anypool.models.decoder import Decoder, forward, logits
from anypool.models.params import Spec, load, shapes, specs
from anypool.ops import Kernels, choose
from anypool.ops.paged_attention import BLOCK, last_tokens, token_positions
from anypool.ops.sampling import Sampled, Sampler, SamplingRows, sample
from anypool.paths import cache_dir

Progress = Callable[[str, int, int, str], None]
"""Called with (phase, done, total, detail)."""


WARM_SAMPLERS = (
    Sampler(),
    Sampler(draw=True),
    Sampler(draw=True, filters=True, edits=EDIT_BUCKETS[0]),
)
"""Compiled before the first request; one with log-probabilities, or that edits more logits, is compiled when asked for."""


@dataclass(frozen=True)
class Limits:
    """What a pool holds. Sizes in tokens, but `cache_bytes` of device memory for the paged cache."""

    max_num_seqs: int
    token_budget: int
    max_model_len: int
    cache_bytes: int


def persistent_compilation_cache() -> Path:
    """Makes JAX keep every compiled program on disk, so that the next start loads instead of compiling."""
    folder = cache_dir() / "compiled"
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


@partial(jax.jit, static_argnames=("decode", "config", "kernels"), donate_argnames=("caches",))
def step_logits(
    params: Decoder,
    caches: tuple[Any, ...],
    tokens_T: jax.Array,
    start_R: jax.Array,
    count_R: jax.Array,
    table_RM: jax.Array,
    *,
    decode: int,
    config: ModelConfig,
    kernels: Kernels,
) -> tuple[jax.Array, tuple[Any, ...]]:
    """One step of the model: the logits after each row's last token, f32 (R, V), and the caches with the step's tokens."""

    def attend(q: Any, k: Any, v: Any, cache: Any) -> tuple[Any, Any]:
        scale = config.head_dim**-0.5
        paged = kernels.paged_attention.apply
        return paged(q, k, v, cache, start_R, count_R, table_RM, decode, scale, config.sliding_window)

    positions = token_positions(start_R, decode)
    hidden, caches = forward(params, tokens_T, positions, caches, attend, config, kernels)
    return logits(params, hidden[last_tokens(count_R, decode)], kernels), caches


sample_rows = jax.jit(sample, static_argnames=("sampler",))


class Runner:
    """Runs steps of one model on one device.

    Raises ValueError when the paged cache would hold less than one sequence of `max_model_len` tokens.
    """

    def __init__(self, config: ModelConfig, params: Decoder, kernels: Kernels, limits: Limits, dtype: Any) -> None:
        self.config, self.params, self.kernels, self.limits = config, params, kernels, limits
        attention = kernels.paged_attention
        per_block = attention.cache_shape(1, config.num_kv_heads, config.head_dim)
        block_bytes = config.num_layers * int(np.prod(per_block)) * jnp.dtype(dtype).itemsize
        self.num_blocks = limits.cache_bytes // block_bytes
        if (self.num_blocks - 1) * BLOCK < limits.max_model_len:
            need = (-(-limits.max_model_len // BLOCK) + 1) * block_bytes
            raise ValueError(
                f"a cache of {limits.cache_bytes} bytes holds {max(0, self.num_blocks - 1) * BLOCK} tokens, "
                f"fewer than max_model_len {limits.max_model_len}: "
                f"give at least {need} bytes, or lower max_model_len"
            )
        shape = attention.cache_shape(self.num_blocks, config.num_kv_heads, config.head_dim)
        self.caches: tuple[Any, ...] = tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))
        self.shapes = ShapeSet.make(
            limits.max_num_seqs, limits.token_budget, limits.max_model_len, attention.bounded_by_table
        )
        self.warm_shapes = 0
        self.total_shapes = len(self.shapes.all())

    @classmethod
    def load(
        cls,
        directory: Path,
        limits: Limits,
        dtype: str = "float32",
        faster: bool = True,
        progress: Progress = lambda *_: None,
    ) -> "Runner":
        """Reads a Hugging Face directory onto the default device.

        Raises ModelError for a configuration or weights that are missing, damaged or of another shape.
        """
        config = ModelConfig.load(directory)
        kind = jnp.dtype(dtype)
        kernels = choose(jax.default_backend(), kind, config.head_dim, faster)

        def place(spec: Spec, array: np.ndarray) -> Any:
            array = np.asarray(array, kind)
            packed = kernels.linear.pack(array) if len(spec.shape) == 2 else array
            return jax.tree.map(jnp.asarray, packed)

        tree = specs(Decoder, config)
        tensors = Checkpoint.open(directory)
        tensors.check(shapes(tree))
        params = load(tree, tensors, place, lambda done, total: progress("load", done, total, ""))
        return cls(config, params, kernels, limits, kind)

    def warm(self, progress: Progress = lambda *_: None) -> None:
        """Compiles every shape by running it on padding; programs compiled before are read from disk.

        Workers that start together share the work: each shape is compiled by whoever locks it first, and the others
        come back for it when it is on disk.
        """
        folder = persistent_compilation_cache()
        queue = deque(self.shapes.all())
        postponed = 0
        while queue:
            shape = queue.popleft()
            with _lock(folder / f"{_lock_name(shape)}.lock", wait=postponed >= len(queue)) as ours:
                if not ours:
                    queue.append(shape)
                    postponed += 1
                    continue
                postponed = 0
                self._warm(shape)
            self.warm_shapes += 1
            progress("warmup", self.warm_shapes, self.total_shapes, str(shape))

    def _warm(self, shape: Shape) -> None:
        zeros = partial(np.zeros, dtype=np.int32)
        tables = zeros((shape.rows, shape.blocks))
        scores = self._forward(zeros(shape.tokens), zeros(shape.rows), zeros(shape.rows), tables, shape)
        for sampler in WARM_SAMPLERS:
            rows = SamplingRows.neutral(shape.rows, sampler.edits)
            jax.block_until_ready(sample_rows(scores, rows, sampler=sampler))

    def run(self, batch: Batch) -> Sampled:
        """Runs one step; returns what each row drew, as NumPy arrays."""
        scores = self._forward(batch.tokens_T, batch.start_R, batch.count_R, batch.table_RM, batch.shape)
        if not batch.samples:
            jax.block_until_ready(scores)
            return Sampled(np.zeros(batch.shape.rows, np.int32))
        drawn: Sampled = jax.device_get(sample_rows(scores, batch.sampling, sampler=batch.sampler))
        return drawn

    def _forward(
        self, tokens_T: np.ndarray, start_R: np.ndarray, count_R: np.ndarray, table_RM: np.ndarray, shape: Shape
    ) -> jax.Array:
        scores, self.caches = step_logits(
            self.params,
            self.caches,
            tokens_T,
            start_R,
            count_R,
            table_RM,
            decode=shape.decode,
            config=self.config,
            kernels=self.kernels,
        )
        return scores


def _lock_name(shape: Shape) -> str:
    return f"{shape.decode}-{shape.tiles}-{shape.blocks}"


@contextmanager
def _lock(path: Path, wait: bool) -> Iterator[bool]:
    """Holds a lock file; yields False if another process holds it and we are not to wait. Freed when we die."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)
