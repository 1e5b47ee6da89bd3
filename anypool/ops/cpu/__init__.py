"""Faster f32 ops on the CPU: `kernels.cc`, compiled on first use by the machine's own C++ compiler.

Without a compiler the references serve, and `unavailable` says why. The results of these ops do not depend on what
else is in the batch, bit for bit (see kernels.cc).
"""

from anypool.ops.cpu.build import unavailable
from anypool.ops.cpu.calls import KERNELS

__all__ = ["KERNELS", "unavailable"]
