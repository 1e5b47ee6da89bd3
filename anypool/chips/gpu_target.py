"""What XLA's GPU compilers read instead of asking a GPU: a target description, as the text of a protocol buffer.

Its fields are those of `stream_executor.GpuTargetConfigProto`; the numbers stand in the chip's file.
"""

from __future__ import annotations

from anypool.chips.chip import Chip
from anypool.chips.errors import ChipError

_PLATFORM_NAMES = {"cuda": "CUDA", "rocm": "ROCM"}
# The library versions that the CUDA plug-in of jax 0.10 is built for; they decide which cuDNN calls it may plan.
_CUDA_VERSIONS = "dnn_version_info {\n  major: 9\n  minor: 10\n}\nruntime_version {\n  major: 12\n  minor: 8\n}\n"
_ELSEWHERE = (
    *("device_description_str", "cuda_compute_capability", "gcn_arch_name"),
    *("matrix_ops_per_clock_per_core_bf16", "matrix_clock_rate_ghz"),
)


def target_description(chip: Chip) -> str:
    """The description of one device of a GPU. Raises ChipError for a chip that XLA's GPU compilers do not know."""
    device, platform = chip.compiler.device, chip.jax_platform
    if platform not in _PLATFORM_NAMES or not device:
        raise ChipError(f"{chip.name} has no target description: only GPUs of XLA's compilers have one")
    lines = [f"  {key}: {value}" for key, value in device.items() if key not in _ELSEWHERE]
    if platform == "cuda":
        major, minor = str(device["cuda_compute_capability"]).split(".")
        lines.append(f"  cuda_compute_capability {{\n    major: {major}\n    minor: {minor}\n  }}")
    else:
        lines.append(f'  rocm_compute_capability {{\n    gcn_arch_name: "{device["gcn_arch_name"]}"\n  }}')
    return (
        "gpu_device_info {\n"
        + "\n".join(lines)
        + "\n}\n"
        + f'platform_name: "{_PLATFORM_NAMES[platform]}"\n'
        + (_CUDA_VERSIONS if platform == "cuda" else "dnn_version_info {\n}\n")
        + f'device_description_str: "{device["device_description_str"]}"\n'
    )
