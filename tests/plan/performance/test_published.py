"""Predictions against published figures: the targets, on the rows that the room has, each predicted without it."""

import math
from importlib import resources

import pytest

from anypool.plan.performance import default_calibration, predict_job, training_rows, validate
from anypool.plan.performance.calibration import INTERVAL, QUANTILE, TRAINING, Calibration, left_out, points_of
from anypool.plan.performance.errors import PerformanceError
from anypool.plan.performance.memory import fit
from anypool.plan.performance.roofline import step_times
from anypool.plan.performance.rows import parse_rows
from anypool.plan.performance.serving import most_streams, serving_rows, validate_serving
from anypool.plan.performance.validate import mfu

# model, chip, chips, dtype, tokens a second and chip, and the TFLOP/s a chip that the source states, attention causal:
# copied by hand from tpu-recipes training/ironwood/README.md and Megatron-Bridge docs/performance-summary.md (25.11).
PUBLISHED = [
    ("llama3.1-405b", "tpu7x", 256, "bf16", 499.77, 1261.4),
    ("llama3.1-405b", "tpu7x", 256, "fp8", 763.54, 1927.15),
    ("llama3.1-70b", "tpu7x", 64, "bf16", 2686.98, 1207.05),
    ("deepseek-v3", "tpu7x", 256, "fp8", 2968.49, 743.46),
    ("gpt-oss-120b", "tpu7x", 64, "bf16", 9581.66, 330.25),
    ("llama3.1-70b", "gb200", 64, "fp8", 4312, 1937),
    ("llama3.1-405b", "h100", 1024, "fp8", 292, 737),
    ("llama3.1-8b", "b200", 8, "fp8", 30624, 1576),
]


@pytest.fixture(scope="module")
def validation():
    return {scheme.left_out: scheme.summary() for scheme in validate(training_rows()).schemes}


def test_one_row_left_out(validation):
    one = validation["row"]
    assert one["rows"] == 38
    assert one["mape"] < 0.12
    assert one["median"] < 0.04
    assert 0.75 <= one["covered"] <= 0.90
    assert one["mape"] < one["constant_mape"] / 2


def test_one_model_left_out(validation):
    model = validation["model"]
    assert model["mape"] < 0.15
    assert model["in_cell_mape"] < 0.15 < model["in_cell_constant_mape"]
    assert 0.75 <= model["covered"] <= 0.90


def test_chips_and_vendors_left_out_are_no_better_than_they_are(validation):
    assert validation["chip"]["mape"] < 0.20 < validation["chip"]["constant_mape"]
    assert validation["vendor"]["mape"] < validation["vendor"]["constant_mape"]
    assert 0.75 <= validation["vendor"]["covered"] <= 0.90


@pytest.mark.parametrize(("model", "chip", "chips", "dtype", "speed", "teraflops"), PUBLISHED)
def test_rows_and_flops_are_as_published(model, chip, chips, dtype, speed, teraflops):
    def same(row):
        job = row.job
        return (job.shape.name, job.chip.name, job.chips, job.dtype, row.tokens_per_second_per_chip) == (
            *(model, chip, chips, dtype),
            speed,
        )

    (row,) = filter(same, training_rows())
    flops = row.job.shape.train_flops_per_token(row.job.sequence_length)
    assert speed * flops / 1e12 == pytest.approx(teraflops, rel=0.01)
    assert mfu(row) == pytest.approx(teraflops * 1e12 / row.job.peak_flops(dtype), rel=0.01)


def test_full_attention_was_counted_in_the_v6e_rows():
    """Their stated TFLOP/s are met only with the square of attention, and an embedding that is looked up."""
    rows = [row for row in training_rows() if row.attention_convention == "full" and row.job.chip.name == "v6e"]
    assert len(rows) == 5
    for row in rows:
        shape, length = row.job.shape, row.job.sequence_length
        causal = shape.train_flops_per_token(length)
        full = causal + 3 * shape.attention_flops(length - shape.keys_seen(length))
        full += 6 * shape.head_parameters  # the lookup, counted as a product there
        assert row.tokens_per_second_per_chip * causal / 1e12 < row.reported_tflops_per_chip
        assert row.tokens_per_second_per_chip * full / 1e12 == pytest.approx(row.reported_tflops_per_chip, rel=0.06)


@pytest.mark.parametrize("row", training_rows(), ids=lambda row: f"{row.line}")
def test_what_was_run_fits_and_no_row_beats_its_bound(row):
    memory = fit(row.job)
    assert memory.needed_bytes <= memory.usable_bytes
    if row.tokens_per_second_per_chip is not None:
        least = step_times(row.job).bound_seconds
        assert row.job.tokens_per_chip / row.tokens_per_second_per_chip > least


def test_predictions_of_known_rows_are_near_them():
    calibration = default_calibration()
    for row in training_rows():
        if row.tokens_per_second_per_chip is not None:
            prediction = predict_job(row.job, calibration)
            assert prediction.low <= prediction.tokens_per_second_per_chip <= prediction.high
            assert prediction.tokens_per_second_per_chip == pytest.approx(row.tokens_per_second_per_chip, rel=0.15)


def test_serving_rows():
    found = validate_serving(serving_rows())
    errors = {
        (row.job.shape.name, row.job.chip.name): predicted / row.output_tokens_per_second_per_chip - 1
        for row, predicted, _ in found
    }
    # Two are missed by more than 35% and said so in docs/plan.md; nothing else may join them.
    missed = {key for key, error in errors.items() if abs(error) > 0.35}
    assert missed == {("gpt-oss-120b", "b200"), ("llama3.1-70b", "trn1")}
    assert sum(abs(error) for error in errors.values()) / len(errors) < 0.25
    inside = [
        abs(math.log(predicted / row.output_tokens_per_second_per_chip)) <= QUANTILE * deviation
        for row, predicted, deviation in found
    ]
    assert sum(inside) / len(inside) >= 0.75
    for row in serving_rows():
        assert most_streams(row.job) >= 1


def test_calibration_survives_a_file(tmp_path):
    calibration = default_calibration()
    file = tmp_path / "calibration.json"
    calibration.save(file)
    again = Calibration.load(file)
    assert again == calibration
    assert again.date == "2026-11-23"
    assert len(again.residuals) == len(again.points) == 38


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "not a calibration: TypeError"),
        ("{}", "not a calibration: KeyError 'version'"),
        ('{"version": 0, "variances": {}}', "another version"),
    ],
)
def test_a_file_that_is_no_calibration(tmp_path, text, words):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(PerformanceError, match=words):
        Calibration.load(tmp_path / "c.json")


def test_leaving_out_everything_is_an_error():
    points = points_of(training_rows())
    with pytest.raises(PerformanceError, match="nothing is left"):
        left_out(points, ["all"] * len(points), TRAINING)


def test_the_interval_is_what_it_says():
    from statistics import NormalDist

    assert pytest.approx(NormalDist().inv_cdf((1 + INTERVAL) / 2), abs=1e-4) == QUANTILE


def test_rows_of_the_room_have_a_source_and_a_date():
    text = (resources.files("anypool.plan") / "data" / "training.csv").read_text()
    for row in parse_rows(text, "training.csv"):
        assert row.source and row.date == "2026-11-23" and row.grade in ("P", "S")
