"""Faster ops on NVIDIA and AMD GPUs, written in Pallas by JAX's own authors and compiled by XLA's Triton.

Nothing of Pallas is imported before a kernel is traced, so that naming the kernels of a chip costs nothing.
"""

from typing import Any

from anypool.ops.gpu.packed import TritonAttention

KERNELS: dict[str, dict[str, Any]] = {
    "cuda": {"packed_attention": TritonAttention(wide_bytes=256, widest_bytes=512)},
    "rocm": {"packed_attention": TritonAttention(wide_bytes=0, widest_bytes=256)},
}
"""By platform, as JAX calls it."""

__all__ = ["KERNELS", "TritonAttention"]
