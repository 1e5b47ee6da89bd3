"""The gate: a pool that takes a run over first computes a batch whose result is recorded with the checkpoint.

With a checkpoint of step s goes what the batch of step s gave from it: loss and gradient norm, before the update. The
next trainer's first step is that batch, so its replay costs nothing; beyond the tolerance the pool is refused, and
nothing of it is ever committed.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

TOLERANCES: dict[tuple[bool, str], tuple[float, float]] = {
    (True, "float32"): (1e-5, 1e-3),
    (False, "float32"): (1e-4, 1e-2),
    (True, "bfloat16"): (2e-3, 3e-2),
    (False, "bfloat16"): (5e-3, 5e-2),
}
"""(same kind of chip, compute dtype) -> relative difference allowed in (loss, gradient norm).

Chosen from the width of the dtype's fraction, not measured: 2^-24 and 2^-8, times what sums over a model's layers in
another order make of it. `[gate]` in the run file replaces them.
"""


@dataclass(frozen=True)
class Recorded:
    """What the batch of step `step` gave. chip, mesh: where. loss in nats; gradient_norm before clipping."""

    step: int
    loss: float
    gradient_norm: float
    chip: str
    mesh: str
    dtype: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Recorded:
        return cls(**data)


@dataclass(frozen=True)
class Comparison:
    """A replay beside what was recorded: relative differences, and what is allowed."""

    recorded: Recorded
    replayed: Recorded
    loss_difference: float
    gradient_norm_difference: float
    loss_allowed: float
    gradient_norm_allowed: float

    @property
    def passed(self) -> bool:
        # Written so that NaN does not pass.
        return self.loss_difference <= self.loss_allowed and self.gradient_norm_difference <= self.gradient_norm_allowed

    def __str__(self) -> str:
        return (
            f"replay of step {self.recorded.step}: loss {self.replayed.loss:.7g}, recorded {self.recorded.loss:.7g} on "
            f"{self.recorded.chip} (difference {self.loss_difference:.1e}, allowed {self.loss_allowed:.1e}); gradient "
            f"norm {self.replayed.gradient_norm:.7g}, recorded {self.recorded.gradient_norm:.7g} (difference "
            f"{self.gradient_norm_difference:.1e}, allowed {self.gradient_norm_allowed:.1e})"
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}

    def facts(self) -> dict[str, Any]:
        """What a run's record keeps of it, in a line."""
        return {
            "step": self.recorded.step,
            "recorded_on": f"{self.recorded.chip}, {self.recorded.mesh}",
            "loss": self.replayed.loss,
            "loss_difference": self.loss_difference,
            "loss_allowed": self.loss_allowed,
            "gradient_norm_difference": self.gradient_norm_difference,
            "gradient_norm_allowed": self.gradient_norm_allowed,
        }


def compare(
    recorded: Recorded, replayed: Recorded, loss: float | None = None, gradient_norm: float | None = None
) -> Comparison:
    """A replay beside the record. loss, gradient_norm: what is allowed, None for the pair's own tolerance.

    A record that is not finite is met by one that is not finite either.
    """
    same = recorded.chip == replayed.chip
    dtype = "float32" if recorded.dtype == replayed.dtype == "float32" else "bfloat16"
    usual = TOLERANCES[same, dtype]
    return Comparison(
        recorded,
        replayed,
        _relative(recorded.loss, replayed.loss),
        _relative(recorded.gradient_norm, replayed.gradient_norm),
        usual[0] if loss is None else loss,
        usual[1] if gradient_norm is None else gradient_norm,
    )


def _relative(expected: float, found: float) -> float:
    if not math.isfinite(expected) and not math.isfinite(found):
        return 0.0
    return abs(found - expected) / max(abs(expected), 1e-12)
