"""Where else metrics go, beside the lines in the store: TensorBoard's event files, and Weights & Biases."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from anypool.train.errors import TrainError


class Sink(Protocol):
    """Takes metrics as they come. What it raises is logged, and it is asked no more."""

    def write(self, group: str, step: int, at: float, metrics: Mapping[str, float]) -> None:
        """group: "train" or "evaluation". at: seconds since 1970."""

    def close(self) -> None:
        """Brings out what it still holds."""


class TensorBoardSink:
    """Event files in a local directory, as `tensorboard --logdir DIRECTORY` reads them.

    first_step: the first step that this trainer makes. TensorBoard then hides what an earlier trainer wrote into the
    same directory from that step on, for those steps are made again.
    """

    def __init__(self, directory: Path, first_step: int | None = None) -> None:
        from tensorboardX import SummaryWriter

        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._writer = SummaryWriter(str(directory), purge_step=first_step, flush_secs=10)
        except OSError as error:
            fix = "name a directory that can be written to"
            raise TrainError(f"tensorboard directory {str(directory)!r}: {error}: {fix}") from None

    def write(self, group: str, step: int, at: float, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(f"{group}/{name}", value, step, walltime=at)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A run of Weights & Biases, one for all epochs: a trainer that takes over goes on with it.

    Needs the extra: `pip install anypool[wandb]`, `EXTRA=wandb make install` in a clone. WANDB_MODE=offline keeps it on
    this machine, as `wandb` itself reads it. Steps are logged as a metric, because `wandb` drops a step made again.
    """

    def __init__(
        self, project: str, run: str, directory: Path | None = None, config: Mapping[str, Any] | None = None
    ) -> None:
        try:
            wandb = importlib.import_module("wandb")
            # Its folder of files, ./wandb, imports as a module of nothing where it is not installed.
            start = wandb.init
        except (ImportError, AttributeError):
            fix = "install the extra, `pip install anypool[wandb]` or `EXTRA=wandb make install`, or do not ask for it"
            raise TrainError(f"wandb = {project!r}: the package wandb is not installed: {fix}") from None
        try:
            self._run = start(
                project=project,
                id=run,
                name=run,
                resume="allow",
                dir=None if directory is None else str(directory),
                config=dict(config or {}),
            )
        except Exception as error:
            fix = "log in with `wandb login`, or set WANDB_MODE=offline to keep it on this machine"
            raise TrainError(f"wandb = {project!r}: {error}: {fix}") from None
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, group: str, step: int, at: float, metrics: Mapping[str, float]) -> None:
        self._run.log({f"{group}/{name}": value for name, value in metrics.items()} | {"step": step})

    def close(self) -> None:
        self._run.finish()
