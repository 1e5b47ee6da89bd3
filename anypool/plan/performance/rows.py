"""Tables of training rows: what was run, and how fast it was, or is to be predicted where the result is empty.

One row is one published or wished run. Results (`tok_s_chip` and those after it) may be empty: a prediction does not
read them. The stack is its own column or follows from the source.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from anypool.chips import ChipError, nearest
from anypool.plan.performance.errors import PerformanceError, RowsError
from anypool.plan.performance.job import DTYPE_ALIASES, DTYPES, STACKS, TrainJob, read_chips
from anypool.plan.performance.shape import ModelShape, catalogue, find_shape

REQUIRED = ("model", "chip", "dtype", "seq")
OPTIONAL = ("chips", "global_batch", "parallelism", "stack", "moe", "source", "date", "grade")
PRICES = ("usd_per_chip_hour",)
RESULTS = (
    *("tok_s_chip", "step_s", "reported_tflops_chip", "mfu_reported", "attn_convention"),
    *("mfu_causal_recomputed", "recomputed_causal_tf", "recomputed_full_tf"),
)
COLUMNS = (*REQUIRED, *OPTIONAL, *PRICES, *RESULTS)
# What of a source's text names which software.
STACK_OF_SOURCE = {
    "tpu-recipes": "maxtext",
    "maxtext": "maxtext",
    "megatron": "megatron-bridge",
    "nemo": "megatron-bridge",
    "torchtitan": "torchtitan",
    "neuron": "neuronx",
    "llama-3 paper": "meta",
    "anypool": "anypool",
}
UNKNOWN_STACK = "unknown"
STACK_ALIASES = {"megatron": "megatron-bridge", "nemo": "megatron-bridge", "neuron": "neuronx", "nxd": "neuronx"}
HIGHEST_TOKENS_PER_SECOND = 1e8
# The day the rows of this room were read.
ROWS_DATE = "2026-11-23"


@dataclass(frozen=True)
class Row:
    """One row. line: of the file. tokens_per_second_per_chip: measured, None where the row has none."""

    line: int
    job: TrainJob
    tokens_per_second_per_chip: float | None
    reported_tflops_per_chip: float | None = None
    attention_convention: str = ""
    usd_per_chip_hour: float | None = None
    source: str = ""
    date: str = ""
    grade: str = ""

    @property
    def model(self) -> str:
        return self.job.shape.name


def training_rows() -> tuple[Row, ...]:
    """The rows that the room calibrates on."""
    text = (resources.files("anypool.plan") / "data" / "training.csv").read_text(encoding="utf-8")
    return parse_rows(text, "training.csv")


def read_rows(path: str | Path, shapes: Mapping[str, ModelShape] | None = None) -> tuple[Row, ...]:
    """The rows of a CSV file. Raises RowsError."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RowsError(f"{path} cannot be read as a CSV file: {error}") from None
    return parse_rows(text, str(path), shapes)


def parse_rows(text: str, file: str, shapes: Mapping[str, ModelShape] | None = None) -> tuple[Row, ...]:
    """Rows of a CSV text, each checked. Raises RowsError: file, line, column, value and fix."""
    reader = csv.DictReader(io.StringIO(text))
    columns = reader.fieldnames or ()
    if not columns:
        raise RowsError(f"{file}:1: is empty: write a header with {', '.join((*REQUIRED, 'chips'))}, and rows")
    for column in columns:
        if column not in COLUMNS:
            hint = nearest(column, COLUMNS) or f"; known: {', '.join(COLUMNS)}"
            raise RowsError(f"{file}:1: unknown column {column!r}{hint}")
        if list(columns).count(column) > 1:
            raise RowsError(f"{file}:1: column {column!r} stands twice: remove one")
    for column in REQUIRED:
        if column not in columns:
            raise RowsError(f"{file}:1: there is no column {column!r}: add it")
    rows: list[Row] = []
    before = UNKNOWN_STACK
    for cells in reader:
        row = _read(cells, file, reader.line_num, catalogue() if shapes is None else shapes, before)
        before = row.job.stack
        rows.append(row)
    if not rows:
        raise RowsError(f"{file}:2: there is no row below the header: add one")
    return tuple(rows)


def _read(
    raw: Mapping[str | None, str | None], file: str, line: int, shapes: Mapping[str, ModelShape], before: str
) -> Row:
    if None in raw or None in raw.values():
        raise RowsError(f"{file}:{line}: has another number of fields than the header: quote texts that hold a comma")
    cells = {str(key): (value or "").strip() for key, value in raw.items()}

    def wrong(column: str, fix: str) -> RowsError:
        return RowsError(f"{file}:{line}: {column} = {cells.get(column, '')!r}: {fix}")

    for column in REQUIRED:
        if not cells[column]:
            raise wrong(column, "must not be empty")
    try:
        shape = find_shape(cells["model"], shapes)
    except PerformanceError as error:
        raise wrong("model", str(error)) from None
    if cells.get("moe", "") not in ("", "0", "1"):
        raise wrong("moe", "must be 0 for a dense model or 1 for a mixture of experts")
    if cells.get("moe") and (cells["moe"] == "1") != shape.is_mixture:
        raise wrong(
            "moe", f"{shape.name} is {'a mixture' if shape.is_mixture else 'dense'}: write {int(shape.is_mixture)}"
        )
    try:
        chip, chips = read_chips(cells["chip"], cells.get("chips", ""))
    except (ChipError, PerformanceError) as error:
        raise wrong("chips" if str(error).startswith("chips") else "chip", str(error)) from None
    dtype = DTYPE_ALIASES.get(cells["dtype"].lower(), cells["dtype"].lower())
    if dtype not in DTYPES:
        raise wrong("dtype", f"must be one of {', '.join(DTYPES)}{nearest(dtype, DTYPES)}")
    batch = _count(cells, "global_batch", wrong)
    length = _count(cells, "seq", wrong)
    assert length is not None
    try:
        job = TrainJob(shape, chip, chips, dtype, length, _stack(cells, before, wrong), batch)
    except PerformanceError as error:
        raise wrong(str(error).split(" = ")[0], str(error)) from None
    return Row(
        line=line,
        job=job,
        tokens_per_second_per_chip=_number(cells, "tok_s_chip", wrong, HIGHEST_TOKENS_PER_SECOND),
        reported_tflops_per_chip=_number(cells, "reported_tflops_chip", wrong, 1e5),
        attention_convention=cells.get("attn_convention", ""),
        usd_per_chip_hour=_number(cells, "usd_per_chip_hour", wrong, 1000.0),
        source=cells.get("source", ""),
        date=cells.get("date", ""),
        grade=cells.get("grade", ""),
    )


def _stack(cells: Mapping[str, str], before: str, wrong: Callable[[str, str], RowsError]) -> str:
    named = cells.get("stack", "").lower()
    if named:
        if not re.fullmatch(r"[a-z0-9][a-z0-9 ._+-]{0,40}", named):
            raise wrong("stack", f"must be a name such as {', '.join(STACKS)}")
        return STACK_ALIASES.get(named, named)
    source = cells.get("source", "").lower()
    if source == "same":
        return before
    return next((stack for text, stack in STACK_OF_SOURCE.items() if text in source), UNKNOWN_STACK)


def _count(cells: Mapping[str, str], column: str, wrong: Callable[[str, str], RowsError]) -> int | None:
    text = cells.get(column, "")
    if not text:
        return None
    if not re.fullmatch(r"[1-9][0-9]{0,11}", text):
        raise wrong(column, "must be a whole number of at least 1, without separators")
    return int(text)


def _number(
    cells: Mapping[str, str], column: str, wrong: Callable[[str, str], RowsError], highest: float
) -> float | None:
    text = cells.get(column, "")
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise wrong(column, "must be a number, or empty where it is not known") from None
    if not math.isfinite(value) or not 0 < value <= highest:
        raise wrong(column, f"must be above 0 and at most {highest:g}; leave it empty where it is not known")
    return value
