"""The run file: one training run, whichever pools it will be on, as TOML.

    [run]
    name = "small"
    steps = 300

    [model]
    id = "smollm2-135m-instruct"

    [data]
    sequence_length = 256

    [[data.source]]
    kind = "chat"
    path = "answers.jsonl"

    [[pool]]
    name = "here"

Nothing in the file is ignored: an unknown key, a wrong type or a value out of range is an error that says what to write
instead. Paths that start with a dot are meant relative to the file.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anypool.chips import Target
from anypool.pools.tables import line_numbers
from anypool.train.errors import MeshError, RunFileError
from anypool.train.lora import LoraConfig
from anypool.train.optimizer import OPTIMIZERS, SCHEDULES, OptimizerConfig, Schedule
from anypool.train.run import sections
from anypool.train.run.table import RunTable
from anypool.train.sharding import MeshShape

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
TABLES = (
    "run", "model", "lora", "data", "batch", "optimizer", "precision", "checkpoint", "evaluate", "guard", "watch",
    "gate", "show", "pool",
)  # fmt: skip


@dataclass(frozen=True)
class RunPool:
    """A pool that may hold the run, in the order of preference.

    hosts: processes that train together, each with its part of the devices. mesh: over all of them.
    micro_batches: parts a batch is computed in, None for the run's. layers, remat: None for the chip's usual ones.
    usd_per_chip_hour: None where no price is known; costs are then "at least".
    """

    name: str
    target: Target
    mesh: MeshShape
    hosts: int = 1
    launcher: str = "local"
    provider: str = ""
    region: str = ""
    micro_batches: int | None = None
    layers: str | None = None
    remat: str | None = None
    usd_per_chip_hour: float | None = None

    @property
    def devices(self) -> int:
        return self.mesh.devices


@dataclass(frozen=True)
class RunFile:
    """A whole run file, validated. `text` is what was written, which the run's store keeps; `folder` where it lay."""

    name: str
    store: str
    copy_to: str | None
    seed: int
    steps: int
    model: sections.Model
    lora: LoraConfig | None
    data: sections.Data
    rows: int
    micro_batches: int
    optimizer: OptimizerConfig
    clip_norm: float | None
    z_loss: float
    compute_dtype: str
    checkpoint: sections.Checkpoint
    evaluate: sections.Evaluate
    guard: sections.Guard
    watch: sections.Watch
    gate: sections.Gate
    show: sections.Show
    pools: tuple[RunPool, ...]
    text: str
    folder: Path

    def pool(self, name: str) -> RunPool:
        """The pool of this name. Raises RunFileError if the run has none."""
        for pool in self.pools:
            if pool.name == name:
                return pool
        known = ", ".join(pool.name for pool in self.pools)
        raise RunFileError(f"run {self.name!r} has no pool {name!r}; its pools are {known}")

    def micro_batches_on(self, pool: RunPool) -> int:
        return pool.micro_batches or self.micro_batches


def load_run(path: str | Path) -> RunFile:
    """Reads and validates a run file. Raises RunFileError, naming the line, the field, the value and the fix."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = sorted(entry.name for entry in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        hint = f"; there are {', '.join(beside)}" if beside else ""
        raise RunFileError(f"{path}: there is no such run file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RunFileError(f"{path}: cannot be read as a run file: {error}") from None
    return parse_run(text, file=str(path), folder=path.parent)


def parse_run(text: str, *, file: str = "run", folder: Path | None = None) -> RunFile:
    """The run that `text` describes. `file` is named in errors; `folder` is where `./paths` start."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RunFileError(f"{file}: not valid TOML: {error}") from None
    lines = line_numbers(text)
    RunTable(data, file=file, path="", title="", lines=lines, keys=TABLES)

    def table(name: str, *keys: str) -> RunTable:
        return RunTable(data.get(name, {}), file=file, path=name, title=f"[{name}]", lines=lines, keys=keys)

    run = table("run", "name", "store", "copy_to", "seed", "steps")
    name = run.text("name", required=True, example="small")
    if not NAME.fullmatch(name):
        raise run.error("name", f"name = {name!r}: use letters, digits, dots, dashes and underscores only")
    steps = run.whole("steps", None, low=1, example=300)
    batch = table("batch", "rows", "micro_batches")
    rows = batch.whole("rows", 16, low=1, example=16)
    micro_batches = batch.whole("micro_batches", 1, low=1, example=2)
    batch.divides("rows", rows, "micro_batches", micro_batches)
    precision = table("precision", "compute")
    made = RunFile(
        name=name,
        store=_store(run, "store", folder) or str(Path.cwd()),
        copy_to=_store(run, "copy_to", folder),
        seed=run.whole("seed", 0, low=0, example=0),
        steps=steps,
        model=sections.model(table("model", "id", "config", "tokenizer", "vocab_size"), folder),
        lora=sections.lora(table("lora", "rank", "alpha", "modules")) if "lora" in data else None,
        data=sections.data(table("data", "sequence_length", "eval_fraction", "source"), folder),
        rows=rows,
        micro_batches=micro_batches,
        compute_dtype=precision.choice("compute", ("float32", "bfloat16"), "float32"),
        checkpoint=sections.checkpoint(table("checkpoint", "every_steps", "keep_last", "keep_every", "dtype"), steps),
        evaluate=sections.evaluate(table("evaluate", "every_steps", "batches")),
        guard=sections.guard(table("guard", "nonfinite", "spike", "spike_factor", "most_skipped")),
        watch=sections.watch(
            table("watch", "heartbeat_seconds", "lease_seconds", "hang_seconds", "start_seconds", "attempts")
        ),
        gate=sections.gate(table("gate", "loss", "gradient_norm")),
        show=sections.show(table("show", "tensorboard", "wandb"), folder),
        pools=_pools(data.get("pool", [{"name": "local", "chip": "cpu"}]), file, lines, rows, micro_batches),
        text=text,
        folder=folder or Path(),
        **_optimizer(table("optimizer", *OPTIMIZER_KEYS), steps),
    )
    if made.lora is not None and made.model.id is None:
        raise RunFileError(f"{file}: [lora] adapts a model that exists: name it with id in [model]")
    return made


def _store(table: RunTable, key: str, folder: Path | None) -> str | None:
    """A store's address; a path is made absolute, from the file's folder if it starts with a dot."""
    value = table.text(key, example="./runs")
    if not value:
        return None
    if "://" in value:
        return value
    path = Path(value).expanduser()
    return str(((folder or Path()) / path if value.startswith(".") else path).resolve())


OPTIMIZER_KEYS = (
    "kind", "learning_rate", "schedule", "warmup_steps", "decay_steps", "final_fraction", "weight_decay", "beta1",
    "beta2", "eps", "momentum", "clip_norm", "z_loss",
)  # fmt: skip


def _optimizer(table: RunTable, steps: int) -> dict[str, Any]:
    kind = table.choice("kind", OPTIMIZERS, "adamw")
    default = OptimizerConfig(Schedule(1.0, 1))
    try:
        schedule = Schedule(
            peak=table.real("learning_rate", 3e-4, above=0, example=3e-4),
            total_steps=steps,
            kind=table.choice("schedule", SCHEDULES, "cosine"),
            warmup_steps=table.whole("warmup_steps", 0, low=0, example=20),
            decay_steps=table.whole("decay_steps", 0, low=0, example=100),
            final_fraction=table.real("final_fraction", 0.1, above=0, equal=True, example=0.1),
        )
        optimizer = OptimizerConfig(
            schedule,
            kind,
            **{
                name: table.real(name, getattr(default, name), above=0, equal=True, example=getattr(default, name))
                for name in ("beta1", "beta2", "eps", "weight_decay", "momentum")
            },
        )
    except RunFileError:
        raise
    except ValueError as error:
        raise table.error(None, str(error)) from None
    clip = table.real("clip_norm", 1.0, above=0, equal=True, example=1.0)
    return {
        "optimizer": optimizer,
        "clip_norm": clip or None,  # 0 is how a file says "not at all"
        "z_loss": table.real("z_loss", 0.0, above=0, equal=True, example=1e-4),
    }


POOL_KEYS = (
    "name", "chip", "topology", "hosts", "launcher", "provider", "region", "mesh", "micro_batches", "layers", "remat",
    "usd_per_chip_hour",
)  # fmt: skip


def _pools(data: Any, file: str, lines: dict[str, int], rows: int, micro_batches: int) -> tuple[RunPool, ...]:
    if isinstance(data, dict):
        raise RunFileError(f"{file}:{lines.get('pool', 1)}: [pool] must be [[pool]]: there is one such table a pool")
    if not isinstance(data, list) or not data:
        raise RunFileError(f"{file}: no pool: add at least one [[pool]] table with name and chip")
    pools: list[RunPool] = []
    for index, one in enumerate(data):
        named = one.get("name") if isinstance(one, dict) else None
        title = f"[[pool]] {named!r}:" if isinstance(named, str) else f"[[pool]] number {index + 1}:"
        table = RunTable(one, file=file, path=f"pool[{index}]", title=title, lines=lines, keys=POOL_KEYS)
        pool = _pool(table, rows, micro_batches)
        if pool.name in {earlier.name for earlier in pools}:
            raise table.error("name", f"two pools are named {pool.name!r}: give each pool its own name")
        pools.append(pool)
    return tuple(pools)


def _pool(table: RunTable, rows: int, micro_batches: int) -> RunPool:
    name = table.text("name", required=True, example="cpu-a")
    if not NAME.fullmatch(name):
        raise table.error("name", f"name = {name!r}: use letters, digits, dots, dashes and underscores only")
    launcher = table.text("launcher", "local", example="local")
    if launcher != "local":
        fix = 'start `anypool train` on that pool\'s own hosts, with launcher = "local" there'
        raise table.error("launcher", f"launcher = {launcher!r} is not supported yet: {fix}")
    chip, topology = table.text("chip", "cpu", example="cpu"), table.text("topology", "1", example="4")
    try:
        target = Target.parse(f"{chip}:{topology}")
    except ValueError as error:
        raise table.error("topology" if "topology" in table.data else "chip", str(error)) from None
    if target.chip.jax_platform is None:
        raise table.error("chip", f"chip = {chip!r}: JAX does not run on it; train on another pool")
    devices = target.devices or target.chips
    try:
        mesh = MeshShape.parse(table.text("mesh", f"fsdp={devices}", example=f"fsdp={devices}"))
    except MeshError as error:
        raise table.error("mesh", str(error)) from None
    if mesh.devices != devices:
        raise table.error("mesh", f'mesh = "{mesh}" has {mesh.devices} devices, and {target} has {devices}')
    hosts = table.whole("hosts", 1, low=1, example=2)
    table.divides("devices", devices, "hosts", hosts)
    own = table.whole("micro_batches", 0, low=1, example=2) or None
    table.divides("rows", rows, "micro_batches", own or micro_batches)
    table.divides("rows of a micro-batch", rows // (own or micro_batches), "data x fsdp", mesh.data * mesh.fsdp)
    remat = table.text("remat", example="full") or None
    if remat is not None:
        sections.check_remat(table, remat)
    return RunPool(
        name=name,
        target=target,
        mesh=mesh,
        hosts=hosts,
        launcher=launcher,
        provider=table.text("provider", example="google"),
        region=table.text("region", example="us-east5"),
        micro_batches=own,
        layers=table.choice("layers", ("scan", "unrolled"), "scan") if "layers" in table.data else None,
        remat=remat,
        usd_per_chip_hour=table.number("usd_per_chip_hour", None, above=0, equal=True, example=1.2),
    )
