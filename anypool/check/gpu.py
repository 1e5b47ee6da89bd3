"""The description of a GPU that XLA reads in place of a GPU, from the chip's file."""

from __future__ import annotations

from anypool.chips import Chip

_NOT_XLA = ("matrix_ops_per_clock_per_core", "matrix_clock_rate_ghz")
_TOP_LEVEL = ("device_description_str",)


def target_description(chip: Chip) -> str:
    """`stream_executor.GpuTargetConfigProto` in text form."""
    device = dict(chip.compiler.device)
    lines = ["gpu_device_info {"]
    for name, value in device.items():
        if name.startswith(_NOT_XLA) or name in (*_TOP_LEVEL, "cuda_compute_capability", "gcn_arch_name"):
            continue
        lines.append(f"  {name}: {_text(value)}")
    if "cuda_compute_capability" in device:
        major, _, minor = str(device["cuda_compute_capability"]).partition(".")
        lines.append(f"  cuda_compute_capability {{ major: {major} minor: {minor or 0} }}")
        platform, version = "CUDA", "dnn_version_info { major: 9 minor: 10 }\nruntime_version { major: 12 minor: 8 }"
    else:
        lines.append(f"  rocm_compute_capability {{ gcn_arch_name: {_text(device['gcn_arch_name'])} }}")
        platform, version = "ROCM", "dnn_version_info { }"
    name = _text(str(device.get("device_description_str", chip.title)))
    return "\n".join([*lines, "}", f'platform_name: "{platform}"', version, f"device_description_str: {name}", ""])


def _text(value: float | str) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
