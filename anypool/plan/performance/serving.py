"""Serving predicted: how many streams fit, and how fast their tokens come.

A replica holds the weights and, for each stream, the keys and values of its whole context; how many streams that allows
is counted first and never exceeded. A decode step reads what it needs from memory and computes, at the shares of the
rates below, and waits for the network and for operations to be launched: reading and computing hardly overlap in one
layer. Prompts are computed by the same chips, so a stream's time is its own prompt, the prompts of the others that are
computed between its tokens, and its decode steps. The whole is divided by an efficiency that is calibrated on published
rows in the same way as training is.
"""

from __future__ import annotations

import csv
import functools
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from anypool.chips import Chip, load_chip
from anypool.plan.performance.calibration import (
    QUANTILE,
    Calibration,
    Point,
    Prior,
    calibrate_points,
    left_out,
    predict_logs,
)
from anypool.plan.performance.energy import Energy, Site, energy_per_token
from anypool.plan.performance.errors import DoesNotFitError, PerformanceError
from anypool.plan.performance.memory import GIB, usable_bytes
from anypool.plan.performance.prediction import SECONDS_PER_HOUR, Money, listed_price
from anypool.plan.performance.roofline import FILLED, needed, scale_out, scale_up
from anypool.plan.performance.shape import ModelShape, catalogue, find_shape

# Bytes of one weight, scales of blocks included (16 or 32 weights share one byte).
WEIGHT_BYTES = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0, "mxfp8": 1 + 1 / 32, "fp4": 0.5 + 1 / 16, "mxfp4": 0.5 + 1 / 32}
# Dtypes whose products run at the rate of another, first found first, where a chip has no rate of their own.
COMPUTED_AS = {"mxfp4": ("mxfp4", "fp4", "bf16"), "mxfp8": ("mxfp8", "fp8", "bf16"), "fp4": ("fp4", "bf16")}
# Source: NVIDIA's aiconfigurator takes 0.8 of the memory's rate and 3 us an operation.
MEMORY_SHARE = 0.8
SECONDS_PER_OPERATION = 3e-6
OPERATIONS_PER_LAYER = 8
# Of the peak, what products reach while serving: about the MFU that training reaches with each kind of model.
COMPUTE_SHARE = {"dense": 0.5, "moe": 0.2}
MOST_STREAMS = 100_000
# The shares above are typical already, so little is left to lose; serving software changes by the month (one model on
# one chip became 2.8 times faster in half a year), so like runs differ more than in training.
SERVING = Prior(mean=math.log(0.85), repeat=0.12)


@dataclass(frozen=True)
class ServeJob:
    """One replica. chips: that hold one copy. concurrency: requests at once, of which those that do not fit wait; None
    for as many as fit.

    input_tokens, output_tokens: of each request.
    """

    shape: ModelShape
    chip: Chip
    chips: int
    dtype: str
    input_tokens: int
    output_tokens: int
    stack: str
    concurrency: int | None = None

    def __post_init__(self) -> None:
        """Raises PerformanceError."""
        if self.dtype not in WEIGHT_BYTES:
            raise PerformanceError(f"dtype = {self.dtype!r}: must be one of {', '.join(WEIGHT_BYTES)}")
        for name, value, most in (
            ("chips", self.chips, 10_000),
            ("input_tokens", self.input_tokens, 10**7),
            ("output_tokens", self.output_tokens, 10**7),
            ("concurrency", 1 if self.concurrency is None else self.concurrency, MOST_STREAMS),
        ):
            if not 1 <= value <= most:
                raise PerformanceError(f"{name} = {value}: must be 1 to {most:,}")
        _ = self.peak_flops

    @property
    def peak_flops(self) -> float:
        """Of one chip, for the products as they run: weights that a chip cannot multiply are widened to bf16."""
        for dtype in COMPUTED_AS.get(self.dtype, (self.dtype, "bf16")):
            if dtype in self.chip.peak_flops:
                return self.chip.peak_flops[dtype].value
        raise PerformanceError(f"dtype = {self.dtype!r}: no rate of a {self.chip.name} is known for it or for bf16")

    @property
    def cache_bytes_per_token(self) -> float:
        """Keys and values are kept in 1 byte where the weights have at most 1, else in 2."""
        return self.shape.cache_elements_per_token * (1.0 if WEIGHT_BYTES[self.dtype] <= 1.1 else 2.0)

    @property
    def weight_bytes(self) -> float:
        """Resident. The lookup table and the output projection stay in bf16."""
        tables = self.shape.head_parameters * (1 if self.shape.tied else 2)
        return (self.shape.total_parameters - tables) * WEIGHT_BYTES[self.dtype] + 2 * tables


@dataclass(frozen=True)
class ServeTimes:
    """At `streams` streams, not yet calibrated: seconds of one decode step and of one prompt.

    least_seconds_per_output_token: of the whole replica, that no software undercuts.
    """

    streams: int
    decode_step: float
    prompt: float
    least_seconds_per_output_token: float

    def seconds_per_output_token(self, output_tokens: int) -> float:
        """Of the whole replica, prompts included."""
        return (self.streams * self.prompt / output_tokens + self.decode_step) / self.streams


@dataclass(frozen=True)
class ServePrediction:
    """Of one replica. Every low and high belongs to the 80% interval.

    streams: at once; most_streams: that memory allows. seconds_to_first_token: on an idle replica.
    seconds_between_tokens: of one stream under this load, the prompts of others included.
    """

    job: ServeJob
    most_streams: int
    streams: int
    output_tokens_per_second_per_chip: float
    low: float
    high: float
    seconds_to_first_token: float
    seconds_between_tokens: float
    calibrated: bool
    money: Money | None
    energy: Energy

    @property
    def usd_per_million_output_tokens(self) -> float | None:
        if self.money is None:
            return None
        return self.money.usd_per_chip_hour / SECONDS_PER_HOUR / self.output_tokens_per_second_per_chip * 1e6

    def as_json(self) -> dict[str, Any]:
        job = self.job
        return {
            "model": job.shape.name,
            "chip": job.chip.name,
            "chips": job.chips,
            "dtype": job.dtype,
            "stack": job.stack,
            "input_tokens": job.input_tokens,
            "output_tokens": job.output_tokens,
            "streams": self.streams,
            "most_streams": self.most_streams,
            "output_tokens_per_second_per_chip": self.output_tokens_per_second_per_chip,
            "output_tokens_per_second_per_chip_low": self.low,
            "output_tokens_per_second_per_chip_high": self.high,
            "seconds_to_first_token": self.seconds_to_first_token,
            "seconds_between_tokens": self.seconds_between_tokens,
            "calibrated": self.calibrated,
            "usd_per_million_output_tokens": self.usd_per_million_output_tokens,
            "usd_per_chip_hour": self.money.usd_per_chip_hour if self.money else None,
            "price_source": self.money.source if self.money else None,
            "energy": self.energy.as_json(),
        }


@dataclass(frozen=True)
class ServingRow:
    """One published row."""

    job: ServeJob
    output_tokens_per_second_per_chip: float
    source: str


def most_streams(job: ServeJob) -> int:
    """Streams whose whole contexts fit beside the weights. Raises DoesNotFitError if not even one does."""
    devices = int(job.chip.devices_per_chip.value) if job.chip.devices_per_chip else 1
    one = usable_bytes(job.chip) * devices * FILLED
    context = job.input_tokens + job.output_tokens
    stream = job.cache_bytes_per_token * job.shape.keys_at(context)
    streams = int((one * job.chips - job.weight_bytes) / stream)
    if streams >= 1:
        return min(streams, MOST_STREAMS)
    need = job.weight_bytes + stream
    fewest = math.ceil(need / one)
    raise DoesNotFitError(
        f"chips = {job.chips}: {job.shape.name} in {job.dtype} and one stream of {context:,} tokens need "
        f"{need / GIB:.1f} GiB, and {job.chips} {job.chip.name} have {one * job.chips / GIB:.1f} GiB for them; "
        f"{fewest} chips would hold it",
        fewest,
    )


def serve_times(job: ServeJob) -> ServeTimes:
    """The least times with as many streams as are asked for and fit; the others wait. Raises DoesNotFitError."""
    most = most_streams(job)
    streams = min(job.concurrency or most, most)
    shape, chip = job.shape, job.chip
    memory = needed(chip, chip.hbm_bytes_per_second, "memory.bandwidth") * job.chips * MEMORY_SHARE
    flops = job.peak_flops * job.chips * COMPUTE_SHARE[shape.kind]
    context = job.input_tokens + job.output_tokens // 2
    keys = shape.keys_at(context)
    read = weights_read(job, streams) + streams * job.cache_bytes_per_token * keys
    computed = streams * (2 * shape.active_parameters + shape.attention_flops(keys))
    launched = shape.layers * OPERATIONS_PER_LAYER * SECONDS_PER_OPERATION
    step = read / memory + computed / flops + _network(job, streams) + launched
    prompt_flops = job.input_tokens * shape.forward_flops_per_token(job.input_tokens)
    prompt = prompt_flops / flops + _network(job, job.input_tokens)
    full = COMPUTE_SHARE[shape.kind]
    least = max(read * MEMORY_SHARE / memory / streams, computed * full / flops / streams)
    least += prompt_flops * full / flops / job.output_tokens
    return ServeTimes(streams, step, prompt, least)


def weights_read(job: ServeJob, streams: int) -> float:
    """Bytes that a step reads: everything, but of routed experts those that a batch is expected to meet."""
    shape = job.shape
    table = shape.head_parameters * 2.0
    shared = shape.shared_parameters * WEIGHT_BYTES[job.dtype]
    if not shape.is_mixture:
        return shared + table
    met = 1 - (1 - shape.experts_per_token / shape.experts) ** streams
    experts = shape.expert_layers * shape.experts * shape.expert_parameters * WEIGHT_BYTES[job.dtype]
    return shared + table + met * experts


def _network(job: ServeJob, tokens: int) -> float:
    """Two sums over all chips in each layer, of one row a token."""
    if job.chips == 1:
        return 0.0
    up, domain = scale_up(job.chip)
    rate = up if job.chips <= domain else min(up, scale_out(job.chip))
    size = 2 * job.shape.layers * tokens * job.shape.width * 2.0
    return size * 2 * (job.chips - 1) / job.chips / rate


@functools.cache
def serving_rows() -> tuple[ServingRow, ...]:
    """The published rows of the room."""
    text = (resources.files("anypool.plan") / "data" / "serving.csv").read_text(encoding="utf-8")
    rows = []
    for row in csv.DictReader(io.StringIO(text)):
        job = ServeJob(
            find_shape(row["model"], catalogue()),
            load_chip(row["chip"]),
            int(row["chips"]),
            row["dtype"],
            int(row["input_tokens"]),
            int(row["output_tokens"]),
            row["stack"],
            int(row["concurrency"]) if row["concurrency"] else None,
        )
        rows.append(ServingRow(job, float(row["output_tok_s_chip"]), row["source"]))
    return tuple(rows)


def _point(job: ServeJob, speed: float, source: str) -> Point:
    times = serve_times(job)
    least = times.seconds_per_output_token(job.output_tokens)
    precision = "bf16" if job.dtype == "bf16" else "low"
    efficiency = math.log(least * speed * job.chips)
    return Point(
        job.shape.name, job.chip.name, job.chip.vendor, job.stack, job.shape.kind, precision, efficiency, speed, source
    )


def serving_points(rows: Sequence[ServingRow]) -> list[Point]:
    return [_point(row.job, row.output_tokens_per_second_per_chip, row.source) for row in rows]


def calibrate_serving(rows: Sequence[ServingRow], date: str | None = None) -> Calibration:
    """As `calibrate`, on serving rows."""
    return calibrate_points(tuple(serving_points(rows)), SERVING, date)


def validate_serving(rows: Sequence[ServingRow]) -> list[tuple[ServingRow, float, float]]:
    """Each row, predicted tokens a second and chip from the others, and the deviation of its logarithm."""
    points = serving_points(rows)
    errors = left_out(points, list(range(len(points))), SERVING)
    return [
        (row, row.output_tokens_per_second_per_chip * math.exp(error), deviation)
        for row, (error, deviation) in zip(rows, errors, strict=True)
    ]


def predict_serving(
    job: ServeJob, calibration: Calibration, money: Money | None = None, site: Site | None = None
) -> ServePrediction:
    """Memory, then speed. calibration: of serving. Raises DoesNotFitError or PerformanceError."""
    times = serve_times(job)
    bound = 1 / times.least_seconds_per_output_token / job.chips
    asked = _point(job, 1.0, "")
    mean, deviation = predict_logs(calibration.points, [asked], calibration.variances, calibration.prior)
    calibrated = any(point.chip == job.chip.name for point in calibration.points)
    width = float(deviation[0]) if calibrated else max(float(deviation[0]), calibration.uncalibrated_deviation)
    spread = math.exp(QUANTILE * width)
    typical = 1 / times.seconds_per_output_token(job.output_tokens) / job.chips
    # Nothing is faster than memory and products at their full rates.
    speed = min(math.exp(float(mean[0])) * typical, bound)
    efficiency = speed / typical
    watts, basis = _decode_power(job.chip)
    return ServePrediction(
        job=job,
        most_streams=most_streams(job),
        streams=times.streams,
        output_tokens_per_second_per_chip=speed,
        low=speed / spread,
        high=min(bound, speed * spread),
        seconds_to_first_token=(times.prompt + times.decode_step) / efficiency,
        seconds_between_tokens=times.seconds_per_output_token(job.output_tokens) * times.streams / efficiency,
        calibrated=calibrated,
        money=money if money is not None else listed_price(job.chip.name),
        energy=energy_per_token(job.chip, speed, site or Site(), watts, basis),
    )


def _decode_power(chip: Chip) -> tuple[float | None, str | None]:
    """Measured watts of one chip in decode and their basis; (None, None) where nobody has published any."""
    text = (resources.files("anypool.plan") / "data" / "power.csv").read_text(encoding="utf-8")
    for row in csv.DictReader(io.StringIO(text)):
        if row["chip"] == chip.name and row["work"] == "decode":
            return float(row["watts"]), row["power_basis"]
    return None, None
