"""Faster f32 ops on the CPU, compiled on first use by the machine's own C++ compiler.

Without a compiler the references serve, and `unavailable` says why. `KERNELS` are for serving: their results do not
depend on what else is in the batch, bit for bit (see kernels.cc). `TRAINING` are those with a gradient (training.cc).
"""

from anypool.ops.cpu.build import unavailable
from anypool.ops.cpu.calls import KERNELS
from anypool.ops.cpu.training import TRAINING

__all__ = ["KERNELS", "TRAINING", "unavailable"]
