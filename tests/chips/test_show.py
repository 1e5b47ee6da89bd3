"""`anypool chips`: the table, one chip with its sources, and the same as JSON."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

import anypool.chips
from anypool import cli
from anypool.chips import UnknownChipError, chips, load_chip

ROOM = Path(anypool.chips.__file__).parent
PROJECT = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())


def run(*arguments):
    return CliRunner().invoke(cli.app, ["chips", *arguments], env={"COLUMNS": "120", "TERM": "dumb"})


def test_the_table_has_a_row_a_chip_and_says_what_is_not_known():
    result = run()
    assert result.exit_code == 0
    rows = {line.split()[0]: line.split()[1:] for line in result.output.splitlines() if line.split()}
    assert rows["v5p"] == ["459", "459", "96", "2.77", "600", "8960", "50", "-", "libtpu"]
    assert rows["a100"][1] == "none"
    assert rows["cpu"] == ["-"] * 8 + ["xla-cpu"]
    assert {chip.name for chip in chips()} <= set(rows)
    assert "-: not known" in result.output


def test_one_chip_shows_every_number_with_its_source():
    output = run("trillium").output
    assert output.startswith("v6e  Google TPU v6e (Trillium)")
    for words in ("1638 GB/s", "docs.cloud.google.com/tpu/docs/v6e", "2026-11-23", "half of 800 GB/s", "31.25 GiB"):
        assert words in output
    assert "power.watts               not known" in output
    assert "us-central1" in output
    assert "USD/h" in output


def test_a_chip_without_prices():
    assert "price  not known" in run("gb300").output


def test_json_of_all():
    listed = json.loads(run("--format", "json").output)
    assert [chip["name"] for chip in listed] == [chip.name for chip in chips()]
    by_name = {chip["name"]: chip for chip in listed}
    fact = by_name["v5e"]["numbers"]["memory.capacity"]
    assert fact == {
        "value": 16 * 2**30,
        "unit": "B",
        "published": "16 GiB",
        "source": "docs.cloud.google.com/tpu/docs/v5e",
        "date": "2026-11-23",
        "grade": "D",
        "note": load_chip("v5e").hbm_bytes.note,
    }
    assert by_name["v5e"]["numbers"]["power.watts"] is None
    assert by_name["cpu"]["numbers"]["flops.bf16"] is None


def test_json_of_one_has_prices():
    chip = json.loads(run("tpu-v4", "--format", "json").output)
    assert chip["name"] == "v4"
    assert chip["compiler"]["target"] == "v4"
    assert {price["kind"]: price["usd_per_chip_hour"] for price in chip["prices"]} == {
        "on_demand": 3.22,
        "spot": 0.9215,
    }


def test_an_unknown_chip_is_one_line_and_exit_code_2():
    result = run("h10")
    assert isinstance(result.exception, UnknownChipError)
    whole = subprocess.run(
        [sys.executable, "-m", "anypool", "chips", "h10"], capture_output=True, text=True, check=False
    )
    assert (whole.returncode, whole.stdout) == (2, "")
    assert whole.stderr == "error: there is no chip 'h10'; did you mean 'h100'?\n"


def test_the_room_imports_no_other():
    code = "import sys, anypool.chips.show\nprint(*(name for name in sys.modules if name.startswith('anypool')))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = result.stdout.split()
    assert "anypool.chips.prices" in loaded
    assert all(name in ("anypool", "anypool.chips") or name.startswith("anypool.chips.") for name in loaded)


@pytest.mark.parametrize("file", sorted(ROOM.rglob("data/**/*.*")), ids=lambda file: file.name)
def test_data_files_lie_in_the_package_that_the_wheel_takes_whole(file):
    assert PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["anypool"]}
    assert file.suffix in (".toml", ".csv")
