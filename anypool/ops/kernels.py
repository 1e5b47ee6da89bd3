"""One implementation of every op for a platform, and why it was chosen.

An op is an object with a few methods. The reference of each runs on every compiler; a faster one says with `refuses`
why it cannot serve a model, and then the reference stands in for it. The choice is made once, by name of platform and
not by looking at the machine, so that a model can be compiled for a chip that is not here.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from anypool.ops.attention import PackedAttentionReference
from anypool.ops.cross_entropy import CrossEntropyReference
from anypool.ops.linear import LinearReference
from anypool.ops.mlp import SiluMulReference
from anypool.ops.need import Need
from anypool.ops.norm import RmsNormReference
from anypool.ops.paged_attention import PagedAttentionReference


@dataclass(frozen=True)
class Choice:
    """Which implementation of an op was chosen. `reason` is None unless the reference stands in for a faster one."""

    op: str
    kernel: str
    reason: str | None = None


@dataclass(frozen=True)
class Kernels:
    """The chosen implementation of every op. Hashable, so that a compiled step can be keyed by it."""

    linear: Any
    rms_norm: Any
    silu_mul: Any
    paged_attention: Any
    packed_attention: Any
    cross_entropy: Any
    choices: tuple[Choice, ...]

    def report(self) -> dict[str, str]:
        """Op name to kernel name, with the reason where the reference stands in for a faster version."""
        return {c.op: c.kernel if c.reason is None else f"{c.kernel} ({c.reason})" for c in self.choices}


REFERENCES: dict[str, Any] = {
    "linear": LinearReference(),
    "rms_norm": RmsNormReference(),
    "silu_mul": SiluMulReference(),
    "paged_attention": PagedAttentionReference(),
    "packed_attention": PackedAttentionReference(),
    "cross_entropy": CrossEntropyReference(),
}


def reference() -> Kernels:
    """The portable reference of every op."""
    return Kernels(**REFERENCES, choices=tuple(Choice(op, "reference") for op in REFERENCES))


def choose(
    platform: str,
    dtype: jnp.dtype,
    head_dim: int,
    faster: bool = True,
    train: bool = False,
    *,
    heads: int | None = None,
    kv_heads: int | None = None,
    window: int | None = None,
    length: int | None = None,
    sequence: int = 1,
) -> Kernels:
    """The fastest registered implementation of every op that serves this model on `platform`.

    Args:
        platform: what JAX calls it: cpu, tpu, cuda, rocm, neuron; gpu, as a worker finds itself, is one of two.
        dtype: of weights, activations and cache.
        head_dim: width of one attention head.
        faster: False takes the reference everywhere.
        train: only what has a gradient; reported are the ops of training, not those of serving.
        heads, kv_heads: query heads and key-value heads of one device.
        window: keys a token sees; None: all before it.
        length: tokens of a row of a training batch.
        sequence: devices among which a mesh divides a row's positions.

    What is None is not judged; a kernel that cannot compute it raises when it is traced.
    """
    need = Need(jnp.dtype(dtype), head_dim, heads, kv_heads, window, length, sequence)
    offers = _offers(platform, need, train) if faster else {}
    chosen: dict[str, Any] = {}
    choices = []
    for op, fallback in REFERENCES.items():
        kernel, reason = offers.get(op, (fallback, None))
        chosen[op] = kernel if reason is None else fallback
        if op not in (("paged_attention",) if train else ("packed_attention", "cross_entropy")):
            choices.append(Choice(op, chosen[op].name, reason))
    return Kernels(**chosen, choices=tuple(choices))


def _offers(platform: str, need: Need, train: bool) -> dict[str, tuple[Any, str | None]]:
    """What is registered for a platform beside the references: op to kernel, and why it cannot serve, or None."""
    if platform == "cpu":
        from anypool.ops import cpu

        lacking = cpu.unavailable()
        return {
            op: (kernel, lacking or kernel.refuses(dtype=need.dtype, head_dim=need.head_dim))
            for op, kernel in (cpu.TRAINING if train else cpu.KERNELS).items()
        }
    registered: dict[str, Any] = {}
    if platform == "tpu":
        from anypool.ops import tpu

        registered = tpu.KERNELS
    elif platform in ("cuda", "rocm", "gpu"):
        from anypool.ops import gpu

        registered = gpu.KERNELS[_gpu_vendor() if platform == "gpu" else platform]
    return {op: (kernel, kernel.refuses(need)) for op, kernel in registered.items()}


def _gpu_vendor() -> str:
    """The platform of the GPUs that are here; JAX calls those of either vendor "gpu"."""
    return "rocm" if "rocm" in jax.devices("gpu")[0].client.platform_version.lower() else "cuda"
