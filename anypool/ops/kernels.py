"""One implementation of every op for a platform, and why it was chosen.

An op is an object with a few methods. The reference of each runs on every compiler; a faster one says with `refuses`
why it cannot serve a model, and then the reference stands in for it. The choice is made once, by name of platform and
not by looking at the machine, so that a model can be compiled for a chip that is not here.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from anypool.ops.attention import PackedAttentionReference
from anypool.ops.linear import LinearReference
from anypool.ops.mlp import SiluMulReference
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
}


def reference() -> Kernels:
    """The portable reference of every op."""
    return Kernels(**REFERENCES, choices=tuple(Choice(op, "reference") for op in REFERENCES))


def choose(platform: str, dtype: jnp.dtype, head_dim: int, faster: bool = True, train: bool = False) -> Kernels:
    """The fastest registered implementation of every op that serves this model on `platform`.

    Args:
        platform: what JAX calls it: cpu, tpu, cuda, rocm, neuron.
        dtype: of weights, activations and cache.
        head_dim: width of one attention head.
        faster: False takes the reference everywhere.
        train: only what has a gradient; the attention reported is that of training, not that of serving.
    """
    candidates: dict[str, Any] = {}
    unavailable: str | None = None
    if platform == "cpu" and faster and not train:
        from anypool.ops import cpu

        candidates = cpu.KERNELS
        unavailable = cpu.unavailable()
    chosen: dict[str, Any] = {}
    choices = []
    for op, fallback in REFERENCES.items():
        kernel, reason = candidates.get(op), None
        if kernel is not None:
            reason = unavailable or kernel.refuses(dtype=jnp.dtype(dtype), head_dim=head_dim)
        if kernel is None or reason is not None:
            kernel = fallback
        chosen[op] = kernel
        if op != ("paged_attention" if train else "packed_attention"):
            choices.append(Choice(op, kernel.name, reason))
    return Kernels(**chosen, choices=tuple(choices))
