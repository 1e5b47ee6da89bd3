"""What must hold for any job: orders, units, intervals, money and energy."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anypool.chips import chips, load_chip
from anypool.plan.performance import (
    DoesNotFitError,
    Money,
    ServeJob,
    Site,
    TrainJob,
    catalogue,
    default_calibration,
    default_serving_calibration,
    energy_per_token,
    find_shape,
    listed_price,
    predict_job,
    predict_serving,
    regions,
    site_of,
)
from anypool.plan.performance.errors import PerformanceError
from anypool.plan.performance.roofline import step_times
from anypool.plan.performance.serving import most_streams, serve_times

TRAINERS = [
    c.name for c in chips() if "bf16" in c.peak_flops and c.scale_up_bytes_per_second_one_way and c.scale_up_chips
]
shapes = st.sampled_from(list(catalogue().values()))
counts = st.sampled_from([1, 2, 8, 16, 64, 256, 1024])


def faster(chip, field: str, factor: float):
    fact = getattr(chip, field)
    if fact is None:
        return chip
    return dataclasses.replace(chip, **{field: dataclasses.replace(fact, value=fact.value * factor)})


def job(shape, chip, chips, batch=None, length=4096):
    return TrainJob(shape, chip, chips, "bf16", length, "maxtext", batch)


@given(shape=shapes, name=st.sampled_from(TRAINERS), chips=counts, factor=st.floats(1.01, 10))
@settings(max_examples=80, deadline=None)
def test_more_bandwidth_is_never_slower(shape, name, chips, factor):
    chip = load_chip(name)
    before = step_times(job(shape, chip, chips))
    for field in (
        "hbm_bytes_per_second",
        "scale_up_bytes_per_second_one_way",
        "scale_out_bytes_per_second_one_way",
    ):
        after = step_times(job(shape, faster(chip, field, factor), chips))
        assert after.weighted_seconds <= before.weighted_seconds * (1 + 1e-9)
        assert after.bound_seconds <= before.bound_seconds * (1 + 1e-9)


@given(shape=shapes, name=st.sampled_from(TRAINERS), chips=counts)
@settings(max_examples=80, deadline=None)
def test_twice_the_chips_with_twice_the_batch_are_never_less_in_total(shape, name, chips):
    few, many = (step_times(job(shape, load_chip(name), n, batch=4 * n)) for n in (chips, 2 * chips))
    # Each does the same tokens, so twice as many are done in the step's time.
    assert many.weighted_seconds <= 2 * few.weighted_seconds
    assert many.bound_seconds <= 2 * few.bound_seconds


@given(shape=shapes, name=st.sampled_from(TRAINERS), chips=counts, stack=st.sampled_from(["maxtext", "new"]))
@settings(max_examples=60, deadline=None)
def test_the_interval_holds_the_point_and_nothing_beats_the_bound(shape, name, chips, stack):
    asked = TrainJob(shape, load_chip(name), chips, "bf16", 4096, stack)
    try:
        found = predict_job(asked, default_calibration())
    except DoesNotFitError as error:
        assert error.fewest is None or error.fewest > chips
        return
    speed = found.tokens_per_second_per_chip
    assert 0 < found.low <= speed <= found.high <= found.bound_tokens_per_second_per_chip * (1 + 1e-9)
    assert 0 < found.mfu < 1
    assert sum(found.seconds_by_group.values()) == pytest.approx(found.seconds_per_step)
    assert found.tokens_per_step == pytest.approx(speed * chips * found.seconds_per_step)
    if not found.efficiency.calibrated:
        assert found.efficiency.deviation >= default_calibration().uncalibrated_deviation
    assert math.isfinite(found.as_json()["seconds_per_step"])


def test_units_of_money_time_and_energy():
    """One job by hand: 10 USD a chip and hour, 1085 W a chip with its machines, PUE 1.1, 412.7 g a kWh."""
    asked = TrainJob(find_shape("llama3.1-70b", catalogue()), load_chip("tpu7x"), 64, "bf16", 8192, "maxtext", 256)
    found = predict_job(asked, default_calibration(), Money(10.0, "given"), site_of("google/us-central1"))
    speed = found.tokens_per_second_per_chip
    assert found.tokens_per_step == 256 * 8192
    assert found.usd_per_million_tokens == pytest.approx(10 / 3600 * 1e6 / speed)
    assert found.energy.power_basis == "pod/chips"
    assert found.energy.chip_joules_per_token is None
    assert found.energy.it_joules_per_token == pytest.approx(1085 / speed)
    assert found.energy.facility_joules_per_token == pytest.approx(1085 / speed * 1.10)
    assert found.energy.grams_co2e_per_million_tokens == pytest.approx(1085 / speed * 1.10 * 1e6 / 3.6e6 * 412.7)
    run = found.run(1e12)
    assert run.seconds == pytest.approx(1e12 / (64 * speed))
    assert run.chip_hours == pytest.approx(run.seconds * 64 / 3600)
    assert run.usd == pytest.approx(run.chip_hours * 10)
    assert run.facility_kwh == pytest.approx(1085 * 1.10 * run.chip_hours / 1000)
    assert run.kilograms_co2e == pytest.approx(run.facility_kwh * 0.4127)
    assert run.seconds_low < run.seconds < run.seconds_high
    with pytest.raises(PerformanceError, match="run_tokens = 0: must be above 0"):
        found.run(0)


def test_a_limit_is_no_measurement_and_an_unknown_is_no_number():
    h100 = energy_per_token(load_chip("h100"), 1000.0, Site())
    assert h100.chip_joules_per_token == pytest.approx(0.7)
    assert h100.it_joules_per_token is None and h100.facility_joules_per_token is None
    assert "limit (tdp)" in h100.note and "it_factor" in h100.note
    whole = energy_per_token(load_chip("h100"), 1000.0, Site(pue=1.2, it_factor=1.4, grams_co2e_per_kwh=100))
    assert whole.facility_joules_per_token == pytest.approx(0.7 * 1.4 * 1.2)
    assert whole.grams_co2e_per_million_tokens == pytest.approx(0.7 * 1.4 * 1.2 / 3.6 * 100)
    unknown = energy_per_token(load_chip("v6e"), 1000.0, Site(pue=1.1))
    assert unknown.power_basis is None and unknown.chip_joules_per_token is None
    assert unknown.note == "the watts of a v6e are not known"
    assert listed_price("tpu7x") is None
    price = listed_price("v6e")
    assert price is not None and price.usd_per_chip_hour == pytest.approx(2.7) and "2026-11-23" in price.source


def test_sites():
    assert {region.provider for region in regions()} == {"google", "aws"}
    assert all(region.source for region in regions())
    with pytest.raises(PerformanceError, match=r"region = 'us-central2': no figures are known; did you mean"):
        site_of("us-central2")
    for bad in ({"pue": 0.9}, {"pue": 9.0}, {"it_factor": 0.5}, {"grams_co2e_per_kwh": -1.0}):
        with pytest.raises(PerformanceError, match="must be"):
            Site(**bad)


def serve(**changes):
    fields = {"shape": find_shape("llama3.3-70b", catalogue()), "chip": load_chip("h100"), "chips": 4, "dtype": "fp8"}
    fields |= {"input_tokens": 1000, "output_tokens": 1000, "stack": "tensorrt-llm", "concurrency": None}
    return ServeJob(**(fields | changes))


@given(
    concurrency=st.integers(1, 5000),
    lengths=st.tuples(st.integers(1, 20_000), st.integers(1, 20_000)),
    name=st.sampled_from(["h100", "h200", "b200", "tpu7x", "mi300x"]),
)
@settings(max_examples=60, deadline=None)
def test_a_replica_never_holds_more_streams_than_fit(concurrency, lengths, name):
    asked = serve(chip=load_chip(name), concurrency=concurrency, input_tokens=lengths[0], output_tokens=lengths[1])
    try:
        most = most_streams(asked)
    except DoesNotFitError:
        return
    found = predict_serving(asked, default_serving_calibration())
    assert found.streams == min(concurrency, most) and found.most_streams == most
    context = sum(lengths) * asked.cache_bytes_per_token
    devices = asked.chip.devices_per_chip.value
    usable = asked.chip.usable_hbm_bytes_per_device
    whole = usable.value * devices if usable else asked.chip.hbm_bytes.value
    assert asked.weight_bytes + found.streams * context <= whole * asked.chips
    assert 0 < found.low <= found.output_tokens_per_second_per_chip <= found.high
    # A stream's tokens come as fast as its share of the replica says.
    rate = found.output_tokens_per_second_per_chip * asked.chips / found.streams
    assert 1 / found.seconds_between_tokens == pytest.approx(rate)


def test_serving_is_slower_with_less_and_refused_with_too_little():
    one = serve_times(serve(concurrency=1))
    assert serve_times(serve(concurrency=1, chip=faster(load_chip("h100"), "hbm_bytes_per_second", 2))).decode_step < (
        one.decode_step
    )
    many = predict_serving(serve(concurrency=64), default_serving_calibration())
    few = predict_serving(serve(concurrency=1), default_serving_calibration())
    assert many.output_tokens_per_second_per_chip > few.output_tokens_per_second_per_chip
    assert many.seconds_between_tokens > few.seconds_between_tokens
    with pytest.raises(DoesNotFitError, match=r"chips = 1: llama3.1-70b in bf16 .* 2 chips would hold it"):
        most_streams(serve(dtype="bf16", chips=1, chip=load_chip("h100")))
    with pytest.raises(PerformanceError, match="dtype = 'f8': must be one of"):
        serve(dtype="f8")
    with pytest.raises(PerformanceError, match="concurrency = 0: must be 1 to"):
        serve(concurrency=0)
    with pytest.raises(PerformanceError, match="input_tokens = 0: must be 1 to"):
        serve(input_tokens=0)


def test_decode_power_is_the_measured_one_where_it_is_known():
    amd = predict_serving(serve(chip=load_chip("mi300x"), chips=1), default_serving_calibration())
    assert amd.energy.power_basis == "measured"
    assert amd.energy.chip_joules_per_token == pytest.approx(356 / amd.output_tokens_per_second_per_chip)
    nvidia = predict_serving(serve(), default_serving_calibration())
    assert nvidia.energy.power_basis == "tdp"
    assert not amd.calibrated and nvidia.calibrated
