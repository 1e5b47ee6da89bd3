"""What suits a platform where a run says nothing: settings of `StepConfig` that change its speed, never its result."""

from __future__ import annotations

import jax.numpy as jnp

from anypool.models import ModelConfig
from anypool.ops import Kernels, choose
from anypool.train.sharding import MeshShape


def step_defaults(platform: str) -> dict[str, str]:
    """`layers` and `remat` for a platform, by JAX's name of it.

    On the CPU, layers are written out, because a loop copies every layer's weights out of their stack and its gradients
    into one, and nothing is computed twice, because memory is plenty there and time is not. Elsewhere the defaults of
    `StepConfig`: one compiled layer, and the least memory.
    """
    if platform == "cpu":
        return {"layers": "unrolled", "remat": "none"}
    return {"layers": "scan", "remat": "full"}


def step_kernels(platform: str, model: ModelConfig, dtype: str, mesh: MeshShape, length: int) -> Kernels:
    """The kernels of a step on a platform, by JAX's name of it, without looking at the machine.

    dtype: of matrices and activations. mesh: which devices share a row's heads and positions. length: tokens of a row.
    """
    return choose(
        platform,
        jnp.dtype(dtype),
        model.head_dim,
        # The CPU's own kernels read whole weights; over a mesh the references serve.
        faster=platform != "cpu" or mesh.devices == 1,
        train=True,
        heads=model.num_heads // mesh.tensor,
        kv_heads=model.num_kv_heads // mesh.tensor,
        window=model.sliding_window,
        length=length,
        sequence=mesh.sequence,
    )
