"""The tables of a run file but for those of the run itself and of its pools: their data, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from anypool.train.data.errors import DataError
from anypool.train.data.source import KINDS, Source
from anypool.train.lora import MODULES, LoraConfig
from anypool.train.run.table import RunTable


@dataclass(frozen=True)
class Model:
    """What is trained.

    id: a model to go on from, anything `anypool.models.resolve` takes; None to begin from nothing with
    config: the keys of a Hugging Face `config.json`, and
    tokenizer: a model's whose tokenizer is taken, or "train" to make one of `vocab_size` from the run's own texts.
    """

    id: str | None
    config: dict[str, Any]
    tokenizer: str
    vocab_size: int


@dataclass(frozen=True)
class Data:
    """sequence_length: tokens of a row. eval_fraction: the part of all documents that is held out."""

    sequence_length: int
    eval_fraction: float
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Checkpoint:
    """every_steps: between commits. keep_last: how many stay; keep_every: steps whose multiples stay for good.

    dtype: of the weights that others read; masters and moments are f32 beside.
    """

    every_steps: int
    keep_last: int
    keep_every: int | None
    dtype: str


@dataclass(frozen=True)
class Evaluate:
    """every_steps: None for at the end only. batches: how many, at most."""

    every_steps: int | None
    batches: int


@dataclass(frozen=True)
class Guard:
    """What happens when a loss or gradient is not finite, or a gradient's norm spikes.

    nonfinite, spike: "skip" (no update, said) or "stop". spike_factor: times the median of the last norms, None for
    no limit. most_skipped: so many in a row stop the run.
    """

    nonfinite: str
    spike: str
    spike_factor: float | None
    most_skipped: int


@dataclass(frozen=True)
class Watch:
    """heartbeat_seconds: between a trainer's signs of life. lease_seconds: without one, it counts as lost.

    hang_seconds: without a finished step, it counts as lost. start_seconds: the same until the first step, compiling
    included. attempts: losses in a row without a new commit, after which the run stops.
    """

    heartbeat_seconds: float
    lease_seconds: float
    hang_seconds: float
    start_seconds: float
    attempts: int


@dataclass(frozen=True)
class Gate:
    """Relative differences a pool may show in its replay; None for those of the pair of chips."""

    loss: float | None
    gradient_norm: float | None


@dataclass(frozen=True)
class Show:
    """tensorboard: a folder for its event files. wandb: a project."""

    tensorboard: str | None
    wandb: str | None


DTYPES = ("float32", "bfloat16")


def model(table: RunTable, folder: Path | None) -> Model:
    """[model]"""
    id = table.text("id", example="smollm2-135m-instruct")
    config = table.data.get("config", {})
    if not isinstance(config, dict):
        raise table.error("config", f"config = {config!r}: must be a table with the keys of a Hugging Face config.json")
    if bool(id) == bool(config):
        raise table.error(None, "needs id, a model to go on from, or [model.config], one to begin from nothing")
    if id:
        for key in ("tokenizer", "vocab_size"):
            if key in table.data:
                raise table.error(key, f"{key} belongs to [model.config]; the model {id!r} has its own")
        return Model(_relative(id, folder), {}, "", 0)
    tokenizer = table.text("tokenizer", "train", example="train")
    if tokenizer != "train" and "vocab_size" in table.data:
        raise table.error("vocab_size", f'vocab_size belongs to tokenizer = "train"; {tokenizer!r} has its own')
    if "vocab_size" in config:
        raise table.error("config", "vocab_size is the tokenizer's: give it in [model]")
    return Model(None, config, _relative(tokenizer, folder), table.whole("vocab_size", 4096, low=256, example=4096))


def lora(table: RunTable) -> LoraConfig:
    """[lora]"""
    return LoraConfig(
        rank=table.whole("rank", 8, low=1, example=8),
        alpha=table.real("alpha", 16.0, above=0, example=16),
        modules=table.choices("modules", MODULES, MODULES),
    )


def data(table: RunTable, folder: Path | None) -> Data:
    """[data] and [[data.source]]"""
    listed = table.data.get("source", [])
    if not isinstance(listed, list) or not listed:
        raise table.error("source", "needs at least one [[data.source]] table with kind and path")
    keys = tuple(field.name for field in fields(Source))
    sources = []
    for index, one in enumerate(listed):
        path, title = f"data.source[{index}]", f"[[data.source]] number {index + 1}:"
        source = RunTable(one, file=table.file, path=path, title=title, lines=table.lines, keys=keys)
        sources.append(_source(source, folder))
    return Data(
        sequence_length=table.whole("sequence_length", 1024, low=8, example=1024),
        eval_fraction=table.real("eval_fraction", 0.02, above=0, equal=True, example=0.02),
        sources=tuple(sources),
    )


def _source(table: RunTable, folder: Path | None) -> Source:
    written = {
        name: table.text(name) for name in ("kind", "path", "field", "split", "learn", "name") if name in table.data
    }
    if "kind" not in written:
        raise table.error(None, f"needs kind, one of {', '.join(KINDS)}")
    if "path" in written:
        written["path"] = _relative(written["path"], folder)
    try:
        return Source(**written, weight=table.real("weight", 1.0, above=0, example=1))
    except DataError as error:
        key = str(error).partition(" ")[0].rstrip(":")
        raise table.error(key if key in table.data else None, str(error)) from None


def checkpoint(table: RunTable, steps: int) -> Checkpoint:
    """[checkpoint]"""
    return Checkpoint(
        every_steps=table.whole("every_steps", max(1, min(100, steps)), low=1, example=100),
        keep_last=table.whole("keep_last", 3, low=1, example=3),
        keep_every=table.integer("keep_every", None, low=1, example=1000),
        dtype=table.choice("dtype", DTYPES, "float32"),
    )


def evaluate(table: RunTable) -> Evaluate:
    """[evaluate]"""
    return Evaluate(
        every_steps=table.integer("every_steps", None, low=1, example=100),
        batches=table.whole("batches", 8, low=1, example=8),
    )


def guard(table: RunTable) -> Guard:
    """[guard]"""
    policies = ("skip", "stop")
    return Guard(
        nonfinite=table.choice("nonfinite", policies, "skip"),
        spike=table.choice("spike", policies, "skip"),
        spike_factor=table.number("spike_factor", None, above=1, example=10),
        most_skipped=table.whole("most_skipped", 20, low=1, example=20),
    )


def watch(table: RunTable) -> Watch:
    """[watch]"""
    made = Watch(
        heartbeat_seconds=table.real("heartbeat_seconds", 1.0, above=0, example=1),
        lease_seconds=table.real("lease_seconds", 30.0, above=0, example=30),
        hang_seconds=table.real("hang_seconds", 300.0, above=0, example=300),
        start_seconds=table.real("start_seconds", 1800.0, above=0, example=1800),
        attempts=table.whole("attempts", 5, low=1, example=5),
    )
    if made.lease_seconds < 3 * made.heartbeat_seconds:
        raise table.error(
            "lease_seconds",
            f"lease_seconds = {made.lease_seconds:g} is less than three heartbeats of {made.heartbeat_seconds:g} s: "
            "one that comes late would cost a pool",
        )
    return made


def gate(table: RunTable) -> Gate:
    """[gate]"""
    return Gate(
        loss=table.number("loss", None, above=0, example=1e-3),
        gradient_norm=table.number("gradient_norm", None, above=0, example=1e-2),
    )


def show(table: RunTable, folder: Path | None) -> Show:
    """[show]"""
    folder_of = table.text("tensorboard", example="./tensorboard")
    return Show(
        tensorboard=str(Path(_relative(folder_of, folder)).expanduser()) if folder_of else None,
        wandb=table.text("wandb", example="my-project") or None,
    )


def check_remat(table: RunTable, policy: str) -> None:
    """Raises RunFileError if there is no such policy."""
    from anypool.train import remat

    try:
        remat.check_policy(policy)
    except ValueError as error:
        raise table.error("remat", str(error)) from None


def _relative(path: str, folder: Path | None) -> str:
    """A path that starts with a dot, from the file's folder."""
    if folder is not None and path.startswith(("./", "../")):
        return str((folder / path).resolve())
    return path
