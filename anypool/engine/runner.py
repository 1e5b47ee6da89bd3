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

from anypool.engine.batch import LEAST_EDITS, Batch
from anypool.engine.shapes import Shape, ShapeSet
from anypool.models import Checkpoint, ModelConfig
from anypool.models.decoder import Decoder, forward, logits
from anypool.models.params import Spec, load, shapes, specs
from anypool.ops import Kernels, choose
from anypool.ops.paged_attention import BLOCK, token_positions
from anypool.ops.sampling import Sampled, Sampler, SamplingRows, sample
from anypool.paths import cache_dir

Progress = Callable[[str, int, int, str], None]
"""Called with (phase, done, total, detail)."""


WARM_SAMPLERS = (
    Sampler(),
    Sampler(draw=True),
    Sampler(draw=True, filters=True, edits=LEAST_EDITS),
)
"""Compiled before the first request; one with log-probabilities, or more edits, is compiled when asked for."""


@dataclass(frozen=True)
class Limits:
    """What a pool holds. Sizes in tokens, but `cache_bytes` of device memory for the paged cache."""

    max_num_seqs: int
    token_budget: int
    max_model_len: int
    cache_bytes: int


def block_bytes(config: ModelConfig, dtype: Any) -> int:
    """Bytes of one cache block over all layers: keys and values of 16 tokens."""
    return config.num_layers * 2 * BLOCK * config.num_kv_heads * config.head_dim * int(jnp.dtype(dtype).itemsize)


def cache_bytes(config: ModelConfig, tokens: int, dtype: Any) -> int:
    """Bytes of a cache that holds `tokens` tokens, the scratch block included."""
    return (-(-tokens // BLOCK) + 1) * block_bytes(config, dtype)


def cache_blocks(config: ModelConfig, limits: Limits, dtype: Any) -> int:
    """Blocks of the cache, the scratch block included.

    Raises ValueError if they hold less than one sequence of `max_model_len` tokens.
    """
    blocks = limits.cache_bytes // block_bytes(config, dtype)
    if (blocks - 1) * BLOCK < limits.max_model_len:
        need = cache_bytes(config, limits.max_model_len, dtype)
        raise ValueError(
            f"a cache of {limits.cache_bytes} bytes holds {max(0, blocks - 1) * BLOCK} tokens, "
            f"fewer than max_model_len {limits.max_model_len}: give at least {need} bytes, or lower max_model_len"
        )
    return blocks


def persistent_compilation_cache() -> Path:
    """Makes JAX keep every compiled program on disk, so that the next start loads instead of compiling."""
    folder = cache_dir() / "compiled"
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


# T token  R row  M block of a table  S sample  V vocabulary
@dataclass(frozen=True)
class PagedAttend:
    """Attention of a step over the paged cache; the context is its (start_R, count_R, table_RM)."""

    decode: int
    window: int | None
    kernels: Kernels

    def __call__(self, q_TNH: Any, k_TKH: Any, v_TKH: Any, cache: Any, context: Any) -> tuple[Any, Any]:
        scale = q_TNH.shape[-1] ** -0.5
        paged = self.kernels.paged_attention.apply
        attended: tuple[Any, Any] = paged(q_TNH, k_TKH, v_TKH, cache, *context, self.decode, scale, self.window)
        return attended


def step_logits(
    params: Decoder,
    caches: tuple[Any, ...],
    tokens_T: jax.Array,
    start_R: jax.Array,
    count_R: jax.Array,
    table_RM: jax.Array,
    sample_S: jax.Array,
    *,
    decode: int,
    config: ModelConfig,
    kernels: Kernels,
) -> tuple[jax.Array, tuple[Any, ...]]:
    """One step of the model: logits after the tokens `sample_S`, f32 (S, V), and the caches with the step's tokens."""
    attend = PagedAttend(decode, config.sliding_window, kernels)
    context = (start_R, count_R, table_RM)
    positions = token_positions(start_R, decode)
    hidden, caches = forward(params, tokens_T, positions, caches, context, attend, config, kernels)
    return logits(params, jnp.take(hidden, sample_S, axis=0, mode="clip"), kernels), caches


class Runner:
    """Runs steps of one model on one device.

    Raises ValueError when the paged cache would hold less than one sequence of `max_model_len` tokens.
    """

    def __init__(self, config: ModelConfig, params: Decoder, kernels: Kernels, limits: Limits, dtype: Any) -> None:
        self.config, self.params, self.kernels, self.limits = config, params, kernels, limits
        attention = kernels.paged_attention
        self.num_blocks = cache_blocks(config, limits, dtype)
        self.caches: tuple[Any, ...] = tuple(
            attention.new_cache(self.num_blocks, config.num_kv_heads, config.head_dim, jnp.dtype(dtype))
            for _ in range(config.num_layers)
        )
        self.shapes = ShapeSet.make(
            limits.max_num_seqs, limits.token_budget, limits.max_model_len, attention.bounded_by_table
        )
        self._steps: dict[Shape, Any] = {}
        self._samplers: dict[tuple[int, Sampler], Any] = {}

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
        cache_blocks(config, limits, kind)  # refuses a cache that is too small before the long part
        kernels = choose(jax.default_backend(), kind, config.head_dim, faster, kv_heads=config.num_kv_heads)

        def place(spec: Spec, array: np.ndarray) -> Any:
            array = np.asarray(array, kind)
            packed = kernels.linear.pack(array) if len(spec.shape) == 2 else array
            return jax.device_put(packed)

        tree = specs(Decoder, config)
        tensors = Checkpoint.open(directory)
        tensors.check(shapes(tree))
        params = load(tree, tensors, place, lambda done, total: progress("load", done, total, ""))
        return cls(config, params, kernels, limits, kind)

    def warm(self, progress: Progress = lambda *_: None) -> None:
        """Compiles every shape; programs compiled before are read from disk.

        Workers that start together share the work: each shape is compiled by whoever locks it first, and the others
        come back for it when it is on disk.
        """
        folder = persistent_compilation_cache()
        queue = deque(self.shapes.all())
        total, passed_over = len(queue), 0
        while queue:
            shape = queue.popleft()
            # Once every shape left is being compiled by somebody else, wait for one of them.
            with _lock(folder / f"{_lock_name(shape)}.lock", wait=passed_over > len(queue)) as ours:
                if not ours:
                    queue.append(shape)
                    passed_over += 1
                    continue
                passed_over = 0
                self._step(shape)
                for sampler in WARM_SAMPLERS:
                    self._sampler(shape.samples, sampler)
            progress("warmup", total - len(queue), total, str(shape))

    def run(self, batch: Batch) -> Sampled:
        """Runs one step; returns what was drawn, as NumPy arrays with `batch.requests` in front."""
        arrays = (batch.tokens_T, batch.start_R, batch.count_R, batch.table_RM, batch.sample_S)
        scores, self.caches = self._step(batch.shape)(self.params, self.caches, *arrays)
        if not batch.requests:
            jax.block_until_ready(scores)
            return Sampled(jnp.zeros(0, jnp.int32))
        drawn: Sampled = jax.device_get(self._sampler(batch.shape.samples, batch.sampler)(scores, batch.sampling))
        return drawn

    def _step(self, shape: Shape) -> Any:
        """The compiled step of a shape."""
        if shape not in self._steps:
            function = partial(step_logits, decode=shape.decode, config=self.config, kernels=self.kernels)
            sizes = ((shape.tokens,), (shape.rows,), (shape.rows,), (shape.rows, shape.blocks), (shape.samples,))
            arrays = [jax.ShapeDtypeStruct(size, jnp.int32) for size in sizes]
            lowered = jax.jit(function, donate_argnums=1).lower(self.params, self.caches, *arrays)
            self._steps[shape] = lowered.compile()
        return self._steps[shape]

    def _sampler(self, rows: int, sampler: Sampler) -> Any:
        """The compiled sampler for a number of rows."""
        key = (rows, sampler)
        if key not in self._samplers:
            scores = jax.ShapeDtypeStruct((rows, self.config.vocab_size), jnp.float32)
            neutral = SamplingRows.neutral(rows, sampler.edits)
            self._samplers[key] = jax.jit(partial(sample, sampler=sampler)).lower(scores, neutral).compile()
        return self._samplers[key]


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
