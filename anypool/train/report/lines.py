"""What a trainer writes down, line by line: the ledger's four kinds of lines, and the lines of metrics.

Ledger lines are JSON objects told apart by `kind`; times are whole nanoseconds since 1970, so that sums are exact:

    opened   who started, on which pool, when its process began
    time     a stretch of time without gaps, as a list of (phase, nanoseconds); the stretch that ends a step names it
    event    something that happened: a commit, a skipped step, a spike, a refusal
    ended    the trainer stopped on purpose, and why

Lines of metrics are flat JSON objects, of `kind` "step" or "evaluation", with the time in seconds: what pandas and jq
read as they are. A number that is not finite is null, because JSON has none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import msgspec

from anypool.train.errors import TrainError

Phase = Literal["start-up", "restore", "gate", "compile", "compute", "data", "checkpoint", "evaluate", "idle"]
PHASES: tuple[str, ...] = get_args(Phase)

RESERVED = ("kind", "step", "epoch", "at", "tokens", "seconds")
"""Keys of a line of metrics that no metric may be called."""


class PoolFacts(msgspec.Struct, frozen=True):
    """The pool that a trainer runs on. devices: as JAX counts them. usd_per_chip_hour: None where it is not known."""

    name: str
    chip: str
    devices: int
    chips: int
    usd_per_chip_hour: float | None = None

    def __post_init__(self) -> None:
        for field in ("devices", "chips"):
            if getattr(self, field) < 1:
                raise TrainError(f"pool {self.name!r}: {field} = {getattr(self, field)}: must be at least 1")
        price = self.usd_per_chip_hour
        if price is not None and not (0 <= price < math.inf):
            fix = "must be 0 or more, or left out where it is not known"
            raise TrainError(f"pool {self.name!r}: usd_per_chip_hour = {price}: {fix}")

    @property
    def usd_per_second(self) -> float | None:
        """Of the whole pool."""
        return None if self.usd_per_chip_hour is None else self.usd_per_chip_hour * self.chips / 3600


class RunFacts(msgspec.Struct, frozen=True):
    """What is known of a run when a trainer starts. Everything may be left out; then less is shown.

    flops_per_token: as `anypool.models.counts.train_flops_per_token` counts them. compute_dtype: what products are
    made in, "bfloat16" or "float32". usd_before: dollars of the epochs before this one, None if not all are known.
    lease_seconds: how long without a heartbeat until another trainer may take the run.
    """

    total_steps: int | None = None
    flops_per_token: float | None = None
    compute_dtype: str = "bfloat16"
    usd_before: float | None = 0.0
    lease_seconds: float = 30.0


class Opened(msgspec.Struct, frozen=True, tag_field="kind", tag="opened"):
    """started_ns: when the process began; at_ns: when it began to record."""

    epoch: int
    pool: PoolFacts
    run: RunFacts
    started_ns: int
    at_ns: int


class Time(msgspec.Struct, frozen=True, tag_field="kind", tag="time"):
    """From start_ns on, each span right after the one before. step: the step that ended with it; tokens: of it."""

    start_ns: int
    spans: list[tuple[Phase, int]]
    step: int | None = None
    tokens: int = 0

    @property
    def end_ns(self) -> int:
        return self.start_ns + sum(length for _, length in self.spans)


class Event(msgspec.Struct, frozen=True, tag_field="kind", tag="event"):
    """name: "commit", "skipped", "spike", "refused", or any other word of the trainer's."""

    name: str
    at_ns: int
    facts: dict[str, Any]


class Ended(msgspec.Struct, frozen=True, tag_field="kind", tag="ended"):
    """The trainer stopped on purpose."""

    at_ns: int
    reason: str


LedgerLine = Opened | Time | Event | Ended


class MetricsLine(msgspec.Struct, frozen=True):
    """One step, or one evaluation after a step. at: seconds since 1970. tokens, seconds: of the step, else 0."""

    kind: Literal["step", "evaluation"]
    epoch: int
    step: int
    at: float
    metrics: dict[str, float]
    tokens: int = 0
    seconds: float = 0.0


def _plain(value: Any) -> Any:
    """NumPy's and JAX's scalars as Python's; anything else in words, because a record must not fail for its facts."""
    item = getattr(value, "item", None)
    if item is not None and getattr(value, "shape", None) == ():
        return item()
    return str(value)


_encoder = msgspec.json.Encoder(enc_hook=_plain)
_ledger_decoder = msgspec.json.Decoder(LedgerLine)


class _Flat(msgspec.Struct):
    """The keys of a line of metrics that every line has; they are checked before the rest is read."""

    kind: Literal["step", "evaluation"]
    epoch: int
    step: int
    at: float
    tokens: int = 0
    seconds: float = 0.0


_flat_decoder = msgspec.json.Decoder(_Flat)
_values_decoder = msgspec.json.Decoder(dict[str, Any])


def encode_ledger(line: LedgerLine) -> bytes:
    """With the newline."""
    return _encoder.encode(line) + b"\n"


def encode_metrics(line: MetricsLine) -> bytes:
    """With the newline. Raises TrainError for a metric with the name of one of the line's own keys."""
    for name in RESERVED:
        if name in line.metrics:
            raise TrainError(f"metric {name!r}: is a key of every line already: choose another name")
    flat = {"kind": line.kind, "epoch": line.epoch, "step": line.step, "at": round(line.at, 6)}
    if line.kind == "step":
        flat |= {"tokens": line.tokens, "seconds": line.seconds}
    return _encoder.encode(flat | line.metrics) + b"\n"


def decode_ledger(line: bytes) -> LedgerLine:
    """Raises ValueError that says what is wrong."""
    decoded: LedgerLine = _ledger_decoder.decode(line)
    if isinstance(decoded, Time) and any(length < 0 for _, length in decoded.spans):
        raise ValueError("a span of negative length")
    return decoded


def decode_metrics(line: bytes) -> MetricsLine:
    """Raises ValueError that says what is wrong. Keys that are no numbers are left out; null is not-a-number."""
    flat = _flat_decoder.decode(line)
    values = _values_decoder.decode(line)
    metrics = {name: _number(value) for name, value in values.items() if name not in RESERVED}
    known = {name: value for name, value in metrics.items() if value is not None}
    return MetricsLine(flat.kind, flat.epoch, flat.step, flat.at, known, flat.tokens, flat.seconds)


def _number(value: Any) -> float | None:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as plain floats, whatever scalars they are given as. Raises TrainError for what is none."""
    plain = {}
    for name, value in metrics.items():
        try:
            plain[name] = float(value)
        except (TypeError, ValueError):
            raise TrainError(f"metric {name!r} = {value!r}: must be one number") from None
    return plain
