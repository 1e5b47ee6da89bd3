"""`anypool plan`: tables and JSON, exit codes, and errors of one line."""

import json

import pytest
from typer.testing import CliRunner

from anypool import cli
from anypool.plan.performance.errors import PerformanceError, RowsError

JOBS = (
    "model,chip,chips,dtype,seq,global_batch,stack,usd_per_chip_hour,tok_s_chip\n"
    "llama3.1-70b,tpu7x,4x4x4,bf16,8192,256,maxtext,8,\n"
    "llama3.1-8b,v5p-128,,bf16,8192,,maxtext,,\n"
)
LARGE = "llama3.1-405b,h100,8,fp8,8192,,torchtitan,,\n"


def run(*arguments: str):
    return CliRunner().invoke(cli.app, ["plan", *arguments], env={"COLUMNS": "140", "TERM": "dumb"})


@pytest.fixture
def jobs(tmp_path):
    file = tmp_path / "jobs.csv"
    file.write_text(JOBS)
    return file


def test_predict_as_json(jobs):
    result = run("predict", str(jobs), "--format", "json", "--region", "us-central1", "--run-tokens", "1e12")
    assert result.exit_code == 0, result.output
    first, second = json.loads(result.output)
    assert first["chips"] == 64 and first["tokens_per_step"] == 256 * 8192 and first["calibrated"]
    low, high = (first[f"tokens_per_second_per_chip_{end}"] for end in ("low", "high"))
    assert low < first["tokens_per_second_per_chip"] < high
    # Published: 2686.98.
    assert low < 2686.98 < high
    assert first["energy"]["facility_joules_per_token"] > first["energy"]["it_joules_per_token"]
    assert first["run"]["usd"] == pytest.approx(first["run"]["chip_hours"] * 8)
    assert second["chips"] == 64 and not second["calibrated"] and second["basis"].startswith("uncalibrated")
    assert second["tokens_per_step_assumed"] and second["price_source"].startswith("google")


def test_predict_as_a_table(jobs):
    jobs.write_text(JOBS + LARGE)
    result = run("predict", str(jobs), "--run-tokens", "1e12")
    assert result.exit_code == 1
    for words in ("llama3.1-70b on 64 tpu7x", "does not fit", "128 chips would hold it", "uncalibrated", "chip-hours"):
        assert words in result.output


def test_calibrate_and_predict_with_it(jobs, tmp_path):
    out = tmp_path / "c.json"
    result = run("calibrate", "--out", str(out))
    assert result.exit_code == 0 and "38 rows" in result.output and "A chip without any row" in result.output
    known = run("predict", str(jobs), "--format", "json", "--calibration", str(out))
    default = run("predict", str(jobs), "--format", "json")
    assert json.loads(known.output) == json.loads(default.output)


def test_own_rows_calibrate_too(tmp_path):
    rows = tmp_path / "own.csv"
    rows.write_text(JOBS.replace(",8,\n", ",,2600\n").replace(",,\n", ",,9000\n") + LARGE.replace(",,\n", ",,100\n"))
    result = run("calibrate", "--rows", str(rows), "--format", "json")
    assert result.exit_code == 0, result.output
    assert [p["tokens_per_second_per_chip"] for p in json.loads(result.output)["points"]] == [2600, 9000, 100]


def test_errors_reach_the_user(jobs, tmp_path):
    jobs.write_text(JOBS.replace("tpu7x", "tpu8z"))
    assert isinstance(run("predict", str(jobs)).exception, RowsError)
    assert isinstance(run("calibrate", "--rows", str(jobs)).exception, RowsError)
    jobs.write_text(JOBS)
    assert isinstance(run("calibrate", "--rows", str(jobs)).exception, PerformanceError)  # no speed in it
    assert isinstance(run("predict", str(jobs), "--pue", "0.5").exception, PerformanceError)
    assert isinstance(run("calibrate", "--out", str(tmp_path / "no" / "c.json")).exception, PerformanceError)


def test_validate_of_few_rows(tmp_path):
    rows = tmp_path / "own.csv"
    lines = [JOBS.split("\n", maxsplit=1)[0]]
    for model, chip, speed in (
        ("llama3.1-8b", "h100", 7000),
        ("llama3.1-70b", "v6e", 900),
        ("llama3.1-8b", "trn1", 800),
    ):
        lines += [f"{model},{chip},{count},bf16,8192,,x,,{speed}" for count in (64, 128)]
    rows.write_text("\n".join(lines) + "\n")
    result = run("validate", "--rows", str(rows), "--format", "json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.output)
    assert [scheme["rows"] for scheme in said["training"]["schemes"]] == [6, 6, 6, 6]
    assert len(said["serving"]) == 16
    table = run("validate", "--rows", str(rows))
    assert table.exit_code == 0 and "constant" in table.output and "serving, one row left out" in table.output
