"""Tables of rows: what is accepted, and the exact error for what is not."""

import pytest

from anypool.chips import load_chip
from anypool.plan.performance import (
    DoesNotFitError,
    TrainJob,
    catalogue,
    default_calibration,
    fewest_chips,
    find_shape,
    predict_job,
    predict_rows,
    read_chips,
)
from anypool.plan.performance.errors import PerformanceError, RowsError
from anypool.plan.performance.memory import fit
from anypool.plan.performance.rows import parse_rows, read_rows

HEADER = "model,chip,chips,dtype,global_batch,seq,stack,source,moe,usd_per_chip_hour,tok_s_chip\n"


def row(**changes: str) -> str:
    cells = {"model": "llama3.1-8b", "chip": "h100", "chips": "8", "dtype": "bf16", "global_batch": "", "seq": "8192"}
    cells |= {"stack": "torchtitan", "source": "", "moe": "", "usd_per_chip_hour": "", "tok_s_chip": ""}
    cells |= changes
    return HEADER + ",".join(cells.values()) + "\n"


def only(**changes: str):
    (found,) = parse_rows(row(**changes), "f.csv")
    return found


@pytest.mark.parametrize(
    ("chip", "chips", "name", "count"),
    [
        ("h100", "64", "h100", 64),
        ("tpu-v6e", "256", "v6e", 256),
        ("v5p", "4x4x4", "v5p", 64),
        ("v5p-128", "", "v5p", 64),
        ("v5p-128", "64", "v5p", 64),
        ("v5p", "v5p-128", "v5p", 64),
        ("v4-64", "", "v4", 32),
        ("v6e-256", "", "v6e", 256),
        ("tpu7x:4x4x4", "", "tpu7x", 64),
        ("Ironwood", "128", "tpu7x", 128),
    ],
)
def test_chips_are_counted_in_chips(chip, chips, name, count):
    found, number = read_chips(chip, chips)
    assert (found.name, number) == (name, count)


def test_the_stack_is_named_or_follows_from_the_source():
    assert only(stack="", source="NVIDIA-NeMo/Megatron-Bridge docs").job.stack == "megatron-bridge"
    assert only(stack="NeMo").job.stack == "megatron-bridge"
    assert only(stack="", source="somewhere").job.stack == "unknown"
    two = HEADER + row(stack="", source="aws-neuron-sdk").split("\n")[1] + "\n"
    two += row(stack="", source="same").split("\n")[1] + "\n"
    assert [found.job.stack for found in parse_rows(two, "f")] == ["neuronx", "neuronx"]


BAD = [
    ({"model": "llama9"}, "model = 'llama9': there is no model 'llama9'"),
    ({"model": ""}, "model = '': must not be empty"),
    ({"chip": "h101"}, "chip = 'h101': there is no chip 'h101'; did you mean 'h100'"),
    ({"chip": "v5q-128"}, "chip = 'v5q-128': there is no chip 'v5q-128'"),
    ({"chips": ""}, "chips = '': chips = '': say how many"),
    ({"chips": "0"}, "chips = '0': chips = '0': must be 1 to 1,000,000"),
    ({"chips": "-8"}, "chips = '-8': chips = '-8': must be a number such as 64"),
    ({"chips": "8.5"}, "chips = '8.5': chips = '8.5': must be a number"),
    ({"chips": "99999999"}, "must be 1 to 1,000,000"),
    ({"chip": "v5p-128", "chips": "128"}, "chips = '128': chips = '128': v5p-128 is 64 chips"),
    ({"chip": "v5p-127", "chips": ""}, "counts TensorCores, two a chip: N must be even"),
    ({"chips": "v5p-8"}, "names a v5p, and chip is h100"),
    ({"dtype": "float8"}, "dtype = 'float8': must be one of bf16, fp8"),
    ({"chip": "v5e", "dtype": "fp8"}, "dtype = 'fp8': dtype = 'fp8': a v5e has no such products"),
    ({"chip": "mi350x", "dtype": "fp8"}, "no rate of a mi350x is known for it; known: bf16"),
    ({"seq": "0"}, "seq = '0': must be a whole number of at least 1"),
    ({"seq": "8k"}, "seq = '8k': must be a whole number"),
    ({"seq": "999999999"}, "seq = '999999999': seq = 999999999: must be 1 to"),
    ({"global_batch": "1.5"}, "global_batch = '1.5': must be a whole number"),
    ({"global_batch": "99999999999"}, "global_batch = '99999999999': global_batch = 99999999999: must be 1 to"),
    ({"moe": "yes"}, "moe = 'yes': must be 0"),
    ({"moe": "1"}, "moe = '1': llama3.1-8b is dense: write 0"),
    ({"stack": "-x-"}, "stack = '-x-': must be a name such as maxtext"),
    ({"usd_per_chip_hour": "0"}, "usd_per_chip_hour = '0': must be above 0"),
    ({"usd_per_chip_hour": "free"}, "usd_per_chip_hour = 'free': must be a number"),
    ({"tok_s_chip": "nan"}, "tok_s_chip = 'nan': must be above 0"),
    ({"tok_s_chip": "1e30"}, "tok_s_chip = '1e30': must be above 0 and at most 1e+08"),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=[words[:40] for _, words in BAD])
def test_bad_cells_name_file_line_column_value_and_fix(changes, words):
    with pytest.raises(RowsError) as caught:
        parse_rows(row(**changes), "f.csv")
    assert str(caught.value).startswith("f.csv:2: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "f:1: is empty"),
        (HEADER, "f:2: there is no row"),
        ("model,chip\n", "f:1: there is no column 'dtype': add it"),
        (HEADER.replace("dtype", "dtyp"), "f:1: unknown column 'dtyp'; did you mean 'dtype'"),
        (HEADER.replace("stack", "seq"), "f:1: column 'seq' stands twice"),
        (HEADER + "llama3.1-8b,h100\n", "f:2: has another number of fields"),
        (row().strip() + ",1\n", "f:2: has another number of fields"),
    ],
)
def test_bad_tables(text, words):
    with pytest.raises(RowsError) as caught:
        parse_rows(text, "f")
    assert words in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(RowsError, match="cannot be read as a CSV file"):
        read_rows(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RowsError, match="cannot be read as a CSV file"):
        read_rows(tmp_path / "b.csv")


def test_results_are_not_read_by_a_prediction():
    empty, given = only(), only(tok_s_chip="1")
    calibration = default_calibration()
    (one,), (other,) = predict_rows([empty], calibration), predict_rows([given], calibration)
    assert one.prediction == other.prediction


def test_what_does_not_fit_has_no_speed_and_says_what_would():
    found = only(model="llama3.1-405b")
    (answer,) = predict_rows([found], default_calibration())
    assert answer.prediction is None
    assert answer.fewest_chips == 128
    said = answer.as_json()
    assert said["fits"] is False and "tokens_per_second_per_chip" not in said
    job = found.job
    with pytest.raises(DoesNotFitError, match=r"chips = 8: llama3.1-405b needs .* GiB .* has 79.1 GiB; 128 chips"):
        predict_job(job, default_calibration())
    bigger = TrainJob(job.shape, job.chip, 128, job.dtype, job.sequence_length, job.stack)
    assert predict_job(bigger, default_calibration()).tokens_per_second_per_chip > 0
    assert fewest_chips(job) == fewest_chips(bigger) == 128
    small = find_shape("llama3.1-8b", catalogue())
    assert fewest_chips(TrainJob(small, job.chip, 64, "bf16", 8192, "maxtext")) == 8


@pytest.mark.parametrize("chip", ["cpu", "ascend-910b", "trn3"])
def test_a_chip_without_the_numbers_is_refused(chip):
    shape = find_shape("llama3.1-8b", catalogue())
    if chip == "trn3":  # a scale-out and all rates are known: it is predicted, and uncalibrated
        job = TrainJob(shape, load_chip(chip), 64, "bf16", 8192, "neuronx")
        prediction = predict_job(job, default_calibration())
        assert not prediction.efficiency.calibrated
        assert "uncalibrated" in prediction.efficiency.basis
        return
    with pytest.raises(PerformanceError, match=r"not known|no rate of a cpu is known"):
        predict_job(TrainJob(shape, load_chip(chip), 8, "bf16", 8192, "maxtext"), default_calibration())


@pytest.mark.parametrize(
    ("chip", "dtype", "same"), [("b200", "nvfp4", "fp4"), ("gb300", "mxfp8", "fp8"), ("trn3", "fp8", "mxfp8")]
)
def test_formats_with_scaled_blocks_run_at_the_plain_rate(chip, dtype, same):
    asked = only(chip=chip, dtype=dtype).job
    assert asked.peak_flops(asked.dtype) == load_chip(chip).peak_flops[same].value
    assert asked.precision == "low"


@pytest.mark.parametrize("model", ["mixtral-8x7b", "deepseek-v3", "gpt-oss-120b", "llama4-maverick"])
def test_memory_of_a_mixture_holds_the_state_of_every_expert(model):
    shape = find_shape(model, catalogue())
    found = fit(TrainJob(shape, load_chip("b200"), 512, "bf16", 4096, "maxtext"))
    state = 16 * shape.total_parameters / 512
    held = sum(found.parts.get(part, 0) for part in ("parameters", "optimizer", "weights", "gradients", "experts"))
    assert held == pytest.approx(state, rel=0.02)
    assert found.needed_bytes > held
