"""What a model asks of its kernels: what an op's `refuses` is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Need:
    """Shapes and kinds as one device has them. None: not known, and so not judged.

    dtype: of weights, activations and cache. head_dim: width of one attention head.
    heads, kv_heads: query heads, and key-value heads, of one device.
    window: keys a token sees, itself included; None: all before it.
    length: tokens of a row of a training batch. sequence: devices that share the positions of a row.
    """

    dtype: jnp.dtype
    head_dim: int
    heads: int | None = None
    kv_heads: int | None = None
    window: int | None = None
    length: int | None = None
    sequence: int = 1


def lacks(module: str) -> str | None:
    """Why a kernel that JAX brings cannot be had, or None: releases move and drop what is in `jax.experimental`.

    Looks at the files, because to ask Python would import all that is above the module.
    """
    file = Path(jax.__file__).parent.joinpath(*module.split(".")[1:])
    here = file.is_dir() or file.with_suffix(".py").is_file()
    return None if here else f"jax {jax.__version__} has no {module}"
