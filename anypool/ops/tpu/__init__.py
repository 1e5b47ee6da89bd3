"""Faster ops on TPUs, written in Pallas by JAX's own authors and compiled by libtpu.

Nothing of Pallas is imported before a kernel is traced, so that naming the kernels of a chip costs nothing.
"""

from typing import Any

from anypool.ops.tpu.packed import SplashAttention
from anypool.ops.tpu.paged import RaggedPagedAttention

KERNELS: dict[str, Any] = {"packed_attention": SplashAttention(), "paged_attention": RaggedPagedAttention()}

__all__ = ["KERNELS", "RaggedPagedAttention", "SplashAttention"]
