"""What is reported of one target and job."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["fits", "does_not_fit", "rejected", "unsupported", "failed"]

EXPLAINED: dict[str, str] = {
    "fits": "the program compiles (or passes the rules) and its memory is there",
    "does_not_fit": "the program is accepted, and needs more memory than a device has",
    "rejected": "the compiler, or its rules, refuse the program",
    "unsupported": "this job cannot run on this chip with this package",
    "failed": "the compiler is missing, crashed, or ran out of time or of this machine's memory: nothing is proven",
}


@dataclass(frozen=True)
class Result:
    """One target and job.

    proof: what stands behind the verdict, with the compiler's version. reason: one sentence.
    hbm_bytes_per_device: the compiler's figure; the prediction where none compiled (`hbm_source` says which).
    hbm_parts: the compiler's arguments, temporaries and code. predicted_hbm_bytes: by what it is for.
    flops: of matrix products in one step, all devices, recomputation included; model_flops: without it.
    hbm_traffic_bytes: read and written by one device in one step. collectives: by kind and mesh axis.
    change: the nearest change that fits, tried; None if nothing was tried or none was found.
    """

    target: str
    job: str
    verdict: Verdict
    proof: str
    reason: str = ""
    setting: str = ""
    mesh: dict[str, int] = field(default_factory=dict)
    workers: int = 1
    batch: int = 0
    seq: int = 0
    dtype: str = ""
    hbm_bytes_per_device: int | None = None
    hbm_capacity_bytes: int | None = None
    hbm_source: str = ""
    hbm_parts: dict[str, int] = field(default_factory=dict)
    predicted_hbm_bytes: dict[str, int] = field(default_factory=dict)
    findings: list[dict[str, Any]] = field(default_factory=list)
    kernels: dict[str, str] = field(default_factory=dict)
    flops: int | None = None
    model_flops: int | None = None
    hbm_traffic_bytes: int | None = None
    collectives: list[dict[str, Any]] = field(default_factory=list)
    seconds_per_step: float | None = None
    bound_by: str | None = None
    bounds: dict[str, float | None] = field(default_factory=dict)
    measured_seconds: float | None = None
    compile_seconds: float | None = None
    unknown_loops: int = 0
    change: dict[str, Any] | None = None
    log: str | None = None
    cached: bool = False

    @property
    def missing_bytes(self) -> int | None:
        """How much memory a device lacks, if it does."""
        if self.hbm_bytes_per_device is None or self.hbm_capacity_bytes is None:
            return None
        return max(0, self.hbm_bytes_per_device - self.hbm_capacity_bytes)

    @property
    def errors(self) -> list[dict[str, Any]]:
        return [finding for finding in self.findings if finding["severity"] == "error"]

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"missing_bytes": self.missing_bytes}
