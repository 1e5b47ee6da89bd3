"""`anypool train RUN.toml`: submits a run, and controls it until it is done, moved elsewhere or stopped."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from types import FrameType
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress as Bars

from anypool.models import ModelConfig
from anypool.progress import Reporter, bars
from anypool.store import Lease, LeaseHeldError, Leases, Store, StoreError
from anypool.train.checkpoint import Checkpoints
from anypool.train.errors import RunFailedError, RunFileError
from anypool.train.report import Progress
from anypool.train.run import directory, requests
from anypool.train.run.controller import Controller
from anypool.train.run.file import RunFile, load_run
from anypool.train.run.texts import make_model, prepare_texts
from anypool.train.sharding import check_divides

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
SILENT_BEATS = 5
"""A holder that missed so many heartbeats has most likely died."""
STOPPED_AT_ONCE = 130


def train(path: str, *, pool: str | None, move_to: str | None, take_over: bool, format: str) -> int:
    """Trains the run of a file; 0 when all its steps are done or it was stopped with a commit.

    pool: begin on this one. move_to: commit, and go on there. take_over: from a trainer that is still alive.

    Raises RunFileError, DataError, ModelError, RunFailedError; StoreError becomes RunFailedError.
    """
    file = load_run(path)
    for name in (pool, move_to):
        if name is not None:
            file.pool(name)
    try:
        store = directory.store_of(file)
        if move_to is not None and (held := _held(file, store)) is not None:
            return _ask_to_move(file, store, move_to, held)
        if not take_over:
            _refuse_a_live_holder(file, store)
        return _control(file, store, move_to or pool, take_over, format)
    except LeaseHeldError as error:
        raise RunFailedError(
            f"{error}. To move it, add --move-to POOL; to take it from that trainer, --take-over"
        ) from None
    except StoreError as error:
        raise RunFailedError(f"{error}. What was committed is kept") from None


def prepare(file: RunFile, store: Store, shown: Bars) -> None:
    """Everything that can be wrong before a chip is touched: the model, the texts, the meshes."""
    directory.submit(file, store, make_model)
    folder = directory.model_folder(store)
    model = ModelConfig.load(folder)
    if file.data.sequence_length > model.max_position:
        raise RunFileError(
            f"data.sequence_length = {file.data.sequence_length} is more than the model's max_position_embeddings "
            f"{model.max_position}; use at most that"
        )
    for pool in file.pools:
        mesh: Any = jax.sharding.AbstractMesh(
            (pool.mesh.data, pool.mesh.fsdp, pool.mesh.sequence, pool.mesh.tensor),
            ("data", "fsdp", "sequence", "tensor"),
        )
        try:
            check_divides(model, mesh, file.rows // file.micro_batches_on(pool), file.data.sequence_length)
        except ValueError as error:
            raise RunFileError(f"[[pool]] {pool.name!r}: {error}") from None
    prepare_texts(file, model, folder, Reporter(shown, "texts"))


def _control(file: RunFile, store: Store, first: str | None, take_over: bool, format: str) -> int:
    console = Console(stderr=True)
    with bars(console) as shown:
        prepare(file, store, shown)
    # The trainers' own log lines; a terminal's progress bar makes room for them.
    with Progress(file.steps, console) as progress:
        controller = Controller(
            file,
            store,
            observe=lambda event: _show(event, progress),
            on_log=lambda line: console.print(line, markup=False, highlight=False),
        )
        with _ctrl_c(controller):
            how = controller.run(first, fence=take_over)
    if controller.asked.stop >= 2:
        return STOPPED_AT_ONCE
    _print_end(file, store, how, format)
    return 0


def _show(event: dict[str, Any], progress: Progress) -> None:
    if event["event"] in ("step", "evaluated", "committed"):
        progress.update(event)


@contextlib.contextmanager
def _ctrl_c(controller: Controller) -> Iterator[None]:
    """Ctrl-C once commits and stops, twice stops now. SIGTERM is the same."""

    def asked(number: int, frame: FrameType | None) -> None:
        controller.asked.stop += 1
        if controller.asked.stop == 1:
            sys.stderr.write("\nstopping after this step, with a checkpoint; once more stops at once\n")

    before = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_end(file: RunFile, store: Store, how: str, format: str) -> None:
    last = Checkpoints(store, None).latest()
    folder = None if last is None else f"{store.url}/{last.folder}".removeprefix("file://")
    done = 0 if last is None else last.step
    if format == "json":
        print(json.dumps({"run": file.name, "how": how, "steps": done, "checkpoint": folder}))
        return
    print(f"{file.name}: {how}, {done} of {file.steps} steps are committed")
    if folder is None:
        return
    print(f"  checkpoint  {folder}")
    if folder.startswith("/") and file.lora is None:
        print(f'  try it      anypool generate {folder} "Once upon a time" --raw')
        print(f'  serve it    anypool up FLEET.toml, with id = "{folder}" in its [model]')
    print(f"  look at it  anypool runs show {file.name} --store {file.store}")
    if how == "stopped":
        print("  go on       the same command")


@dataclass(frozen=True)
class _HeldBy:
    """A holder that counts as alive. last: its last sign of life, unix seconds."""

    lease: Lease
    last: float

    def __str__(self) -> str:
        holder, ago = self.lease.holder, time.time() - self.last
        since = datetime.fromtimestamp(self.lease.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        where = f"process {holder.pid} on {holder.host}, epoch {self.lease.number}, since {since}"
        return f"pool {holder.pool!r} ({where}, last heartbeat {ago:.0f} s ago)"


def _held(file: RunFile, store: Store) -> _HeldBy | None:
    """Who holds the run and counts as alive; None if nobody does."""
    leases = Leases(store, ttl_seconds=file.watch.lease_seconds)
    lease = leases.current()
    if lease is None or leases.released(lease.number) is not None:
        return None
    beat = leases.heartbeat(lease.number)
    last = beat.at if beat else lease.since
    return None if time.time() - last > file.watch.lease_seconds else _HeldBy(lease, last)


def _refuse_a_live_holder(file: RunFile, store: Store) -> None:
    """Raises RunFailedError if a trainer holds the run and is seen to beat; one that died is waited for.

    A fresh heartbeat alone says nothing: its writer may have been killed a moment ago.
    """
    seen: tuple[int, float] | None = None
    told = False
    while (held := _held(file, store)) is not None:
        now = (held.lease.number, held.last)
        if seen not in (None, now):
            raise RunFailedError(
                f"run {file.name!r} is held by {held}. To move it, add --move-to POOL; to take it from that trainer, "
                "--take-over"
            )
        seen = now
        silent = time.time() - held.last
        if not told and silent > SILENT_BEATS * file.watch.heartbeat_seconds:
            left = file.watch.lease_seconds - silent
            log.warning("%s is silent; its lease is over in %.0f s (--take-over does not wait)", held, left)
            told = True
        time.sleep(POLL_SECONDS)


def _ask_to_move(file: RunFile, store: Store, pool: str, held: _HeldBy) -> int:
    """Asks the controller of a run that another process controls, and waits until it has moved."""
    if held.lease.holder.pool == pool:
        raise RunFailedError(f"run {file.name!r} is on {pool} already: {held}")
    leases = Leases(store, ttl_seconds=file.watch.lease_seconds)
    key = requests.ask_to_move(store, pool)
    print(f"asked {held} to move to {pool}")
    while True:
        now = leases.current()
        if now is not None and now.number > held.lease.number and now.holder.pool == pool:
            print(f"moved: {pool} holds the run as epoch {now.number}")
            return 0
        if requests.is_waiting(store, key) and _held(file, store) is None:
            store.delete(key)
            raise RunFailedError(f"{held} ended before it read the request; give the same command again")
        time.sleep(POLL_SECONDS)
