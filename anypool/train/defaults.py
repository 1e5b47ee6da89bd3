"""What suits a platform where a run says nothing: settings of `StepConfig` that change its speed, never its result."""

from __future__ import annotations


def step_defaults(platform: str) -> dict[str, str]:
    """`layers` and `remat` for a platform, by JAX's name of it.

    On the CPU, layers are written out, because a loop copies every layer's weights out of their stack and its gradients
    into one, and nothing is computed twice, because memory is plenty there and time is not. Elsewhere the defaults of
    `StepConfig`: one compiled layer, and the least memory.
    """
    if platform == "cpu":
        return {"layers": "unrolled", "remat": "none"}
    return {"layers": "scan", "remat": "full"}
