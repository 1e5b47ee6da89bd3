"""The page of what was checked."""

import pytest

from anypool.check import matrix
from anypool.check.matrix import MODELS, page, topology, words
from anypool.chips import Target, chips


@pytest.mark.parametrize("chip", [chip.name for chip in chips()])
def test_every_cell_asks_about_a_topology_that_exists(chip: str) -> None:
    for model in MODELS:
        assert Target.parse(f"{chip}:{topology(model, chip)}").chips > 0


def kept(**changed: object) -> dict[str, object]:
    cell: dict[str, object] = {"verdict": "fits", "proof": "compiled with x", "target": "v5e:2x2", "hbm_bytes": 2**30}
    cell["date"] = "2026-11-24"
    return cell | changed


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (None, "untested"),
        (kept(verdict="failed"), "untested"),
        (kept(), "compiled, 1 GiB on v5e:2x2"),
        (kept(proof="lowered and linted; memory predicted, not compiled"), "lowered and linted, 1 GiB on v5e:2x2"),
        (kept(proof="compiled with neuronx-cc 2.28; memory predicted"), "compiled, 1 GiB on v5e:2x2"),
        (kept(proof="code generation only, y"), "code generation only, 1 GiB on v5e:2x2"),
        (kept(proof="compiled with XLA for CPU, one step run"), "ran 2026-11-24, 1 GiB on v5e:2x2"),
        (kept(proof="estimated from the chip's file"), "estimated, 1 GiB on v5e:2x2"),
        (kept(verdict="does_not_fit"), "does not fit (compiled), 1 GiB on v5e:2x2"),
        (kept(verdict="rejected"), "rejected"),
        (kept(verdict="unsupported"), "unsupported"),
    ],
)  # fmt: skip
def test_a_cell_claims_what_was_proven(cell: dict[str, object] | None, said: str) -> None:
    assert words(cell) == said


def test_the_page_has_a_row_for_every_chip_and_a_table_for_every_job() -> None:
    text = page({"smollm2-135m/v5e/train": kept()})
    assert text.count("| v5e |") == 3
    assert text.count("compiled, 1 GiB on v5e:2x2") == 1
    assert "- compiled with x (2026-11-24)" in text
    assert all(f"| {chip.name} |" in text for chip in chips())
    assert matrix.PAGE.name == "support.md"
