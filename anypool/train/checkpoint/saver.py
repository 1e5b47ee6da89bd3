"""The checkpoints of a run: saved beside the training, found again, restored on whatever there is."""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

import anypool
from anypool.models.params import Spec
from anypool.store import Leases, NotFoundError, Store, load
from anypool.train.checkpoint import names
from anypool.train.checkpoint.chain import Folders, base_of, chain, current_epoch
from anypool.train.checkpoint.contents import Contents, Progress, small_file
from anypool.train.checkpoint.errors import CheckpointError, UncommittedError
from anypool.train.checkpoint.keep import Policy, delete_folder, superfluous
from anypool.train.checkpoint.names import Place
from anypool.train.checkpoint.plan import File, Leaf, Plan, beside, make_plan, sections
from anypool.train.checkpoint.restore import Verify, Wanted, read_arrays
from anypool.train.checkpoint.second import SecondCopy
from anypool.train.checkpoint.snapshot import Snapshot, snapshot
from anypool.train.checkpoint.source import CONFIG, check_architecture, check_files, model_files, with_dtype
from anypool.train.checkpoint.write import Hosts, Object, write

log = logging.getLogger(__name__)

FORMAT = 1
State = TypeVar("State")


@dataclass(frozen=True)
class CheckpointInfo:
    """A committed checkpoint. folder: in the run's store. known: what the trainer gave when it saved."""

    step: int
    epoch: int
    folder: str
    known: dict[str, Any]


@dataclass(frozen=True)
class Pending:
    """A save that goes on beside the training.

    stall_seconds: what planning and copying took, during which no step ran; waiting for the steps before is not in it.
    waited_seconds: for the save before, which was still going on. num_bytes: of this host's files with tensors.
    """

    step: int
    epoch: int
    folder: str
    stall_seconds: float
    waited_seconds: float
    num_bytes: int
    _future: Future[int]

    @property
    def done(self) -> bool:
        return self._future.done()

    def wait(self) -> int:
        """Until it is committed. Returns the bytes this host sent. Raises what went wrong."""
        return self._future.result()


class Checkpoints:
    """The checkpoints of one run.

    store: of the run. files: configuration and tokenizer, as a Hugging Face directory or by name; None if nothing is to
    be saved. policy: how they are written and which stay. copy_to: a second store for this run. guard: called just
    before a checkpoint is committed or an old one deleted; raises LeaseLostError if the run is another's by now. late:
    called before that with the checkpoint's step; may wait, and gives what is to be added to its `known`.
    report: called with what went wrong and does not stop the training: copying, deleting.

    With several processes, each makes one, and all save and restore at the same steps.
    """

    def __init__(
        self,
        store: Store,
        files: Path | Mapping[str, bytes] | None,
        policy: Policy | None = None,
        *,
        copy_to: Store | None = None,
        guard: Callable[[], None] = lambda: None,
        late: Callable[[int], Mapping[str, Any]] = lambda step: {},
        report: Callable[[str], None] = log.warning,
        patience_seconds: float = 600.0,
    ) -> None:
        self.store, self.policy = store, policy or Policy()
        if isinstance(files, Path):
            files = model_files(files)
        self._files = None if files is None else with_dtype(check_files(files, "files"), self.policy.dtype)
        self._guard, self._late, self._report = guard, late, report
        self._hosts = Hosts(jax.process_index(), jax.process_count(), patience_seconds)
        self._leases = Leases(store)
        first = self._hosts.host == 0
        self._second = SecondCopy(store, copy_to, report) if copy_to is not None and first else None
        self._pending: Pending | None = None
        self._plans: dict[Any, tuple[list[Leaf], Plan]] = {}

    def save(self, state: Any, specs: Any, *, step: int, epoch: int, known: Mapping[str, Any] | None = None) -> Pending:
        """Copy the state to the host and write it beside the training. The state may be given to the next step at once.

        state: with step, params and moments. specs: a tree of `Spec` like params. known: JSON that comes back with the
        checkpoint: seed, position in the data, whatever the trainer needs.

        Waits for the save before; what that one raised is raised here, and this state is not saved. Raises
        CheckpointError for a state of another step.
        """
        if self._files is None:
            raise CheckpointError(
                "these checkpoints were opened without files, so nothing can be saved; give the model's"
            )
        waiting = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - waiting
        described = list(sections(state, specs))
        arrays = [array for _, _, array in described]
        jax.block_until_ready(arrays)
        done = int(np.asarray(state.step.addressable_data(0)))
        if done != step:
            raise CheckpointError(f"step is {step}, and the state has done {done} steps; give the state of that step")
        stalled = time.perf_counter()
        leaves, plan = self._plan(described)
        taken = snapshot(leaves, arrays, plan, self._hosts.host)
        attempt = self._attempt()
        place = Place(epoch, step)
        run = self._run_record(place, arrays, dict(known or {}))
        num_bytes = taken.num_bytes
        future: Future[int] = Future()
        Thread(
            target=self._finish,
            args=(future, place, plan, taken, run, attempt),
            name=f"save {place.folder}",
            daemon=True,
        ).start()
        stall = time.perf_counter() - stalled
        self._pending = Pending(step, epoch, place.folder, stall, waited, num_bytes, future)
        return self._pending

    def wait(self) -> None:
        """Until the save that is going on, if any, is committed. Raises what went wrong with it, once."""
        pending = self._pending
        if pending is not None:
            try:
                pending.wait()
            finally:
                if pending.done:  # else this wait was interrupted
                    self._pending = None

    def close(self) -> None:
        """Wait for everything, the second copy too. Raises what went wrong with the last save."""
        try:
            self.wait()
        finally:
            if self._second is not None:
                self._second.close()
                self._second = None

    def committed(self, epoch: int | None = None) -> list[CheckpointInfo]:
        """The checkpoints of the run, newest first: those of the chain that ends with `epoch`, or the current lease."""
        found = [self._info(place) for place in self._chain(epoch)]
        return [info for info in found if info is not None]

    def latest(self, epoch: int | None = None) -> CheckpointInfo | None:
        """The newest of `committed`, or None."""
        found = (self._info(place) for place in self._chain(epoch))
        return next((info for info in found if info is not None), None)

    def restore(
        self,
        info: CheckpointInfo,
        abstract_state: State,
        specs: Any,
        *,
        verify: Verify = "full",
        progress: Progress | None = None,
    ) -> State:
        """The state of a checkpoint.

        abstract_state: with the shapes, dtypes and shardings that it is to have (`TrainStep.abstract_state`). What is
        frozen is not in a checkpoint and stays as it is here: put the base of a LoRA run there, or do it afterwards.
        verify: "full" compares the hash of every file that this host needs anything of; "read" reads only the bytes
        that its devices need, and compares hashes of small files and sizes of all. progress(done_bytes, all_bytes).

        Raises UncommittedError, CorruptObjectError naming the file, ArchitectureError naming the field,
        MissingTensorError.
        """
        folder = self.store.at(info.folder)
        try:
            manifest = load(self.store, info.folder)
        except NotFoundError as error:
            raise UncommittedError(
                f"{folder.url} has no {names.MANIFEST}: its writer did not get to the end, or it was deleted; "
                "restore one of `committed()`"
            ) from error
        if manifest.known.get("format") != FORMAT:
            raise CheckpointError(
                f"{folder.url} is of format {manifest.known.get('format')!r}, and this version reads {FORMAT}; "
                "use the version that wrote it"
            )
        contents = Contents.open(folder, manifest)
        if self._files is not None:
            there = {name: small_file(folder, manifest, name) for name in (CONFIG, names.ADAPTER_CONFIG)
                     if name in manifest.objects}  # fmt: skip
            check_architecture(self._files, there, folder.url)
        wanted = [Wanted(*one) for one in sections(abstract_state, specs)]
        arrays = iter(read_arrays(contents, wanted, verify, progress))
        restored: State = _rebuilt(abstract_state, specs, int(manifest.known["step"]), lambda: next(arrays))
        return restored

    def _chain(self, epoch: int | None) -> list[Place]:
        folders = Folders.of(self.store)
        if epoch is None:
            epoch = current_epoch(self._leases) or max((place.epoch for place in folders.committed), default=0)
        return chain(folders.committed, epoch, lambda number: base_of(self._leases, number))

    def _info(self, place: Place) -> CheckpointInfo | None:
        """None if it was deleted since it was listed."""
        try:
            manifest = load(self.store, place.folder)
        except NotFoundError:
            return None
        return CheckpointInfo(place.step, place.epoch, place.folder, manifest.known.get("known", {}))

    def _plan(self, described: list[tuple[str, Spec, Any]]) -> tuple[list[Leaf], Plan]:
        """Made anew only if the state is divided in another way than at the last save."""
        key = tuple(
            (section, spec.name, array.shape, array.dtype, array.sharding) for section, spec, array in described
        )
        if key not in self._plans:
            assert self._files is not None
            dtype = np.dtype(jax.numpy.dtype(self.policy.dtype))
            adapter = names.ADAPTER_CONFIG in self._files
            leaves = [Leaf.of(*one) for one in described]
            plan = make_plan(leaves, self._hosts.count, dtype, self.policy.max_shard_bytes, adapter)
            self._plans = {key: (leaves, plan)}
        return self._plans[key]

    def _attempt(self) -> str:
        """What all hosts call this save, so that none takes an earlier one's report for this one's."""
        mine = np.frombuffer(secrets.token_bytes(8), np.uint32)
        if self._hosts.count > 1:
            mine = np.asarray(multihost_utils.broadcast_one_to_all(mine))
        return mine.tobytes().hex()

    def _run_record(self, place: Place, arrays: list[Any], known: dict[str, Any]) -> dict[str, Any]:
        meshes = [array.sharding.mesh for array in arrays if isinstance(array.sharding, NamedSharding)]
        return {
            "format": FORMAT,
            "step": place.step,
            "epoch": place.epoch,
            "dtype": self.policy.dtype,
            "mesh": {axis: size for axis, size in dict(meshes[0].shape).items() if size > 1} if meshes else {},
            "hosts": self._hosts.count,
            "versions": {"anypool": anypool.__version__, "jax": jax.__version__},
            "known": known,
        }

    def _finish(
        self, future: Future[int], place: Place, plan: Plan, taken: Snapshot, run: dict[str, Any], attempt: str
    ) -> None:
        try:
            objects = [_object(taken, file) for file in taken.files]
            if self._hosts.host == 0:
                assert self._files is not None
                texts = plan.indexes() | {names.RUN: run}
                small = {name: (json.dumps(text, indent=2) + "\n").encode() for name, text in texts.items()}
                objects += [Object.of(name, data) for name, data in (self._files | small).items()]

            def last_words() -> dict[str, Any]:
                known = run["known"] | dict(self._late(place.step))
                self._guard()
                return run | {"known": known}

            sent = write(self.store, place.folder, objects, last_words, self._hosts, attempt)
        except BaseException as error:
            future.set_exception(error)
            return
        try:
            if self._hosts.host == 0:
                self._tidy(place)
        except Exception as error:  # the checkpoint is there, which is what counts
            self._report(f"old checkpoints of {self.store.url} were not deleted: {error}")
        future.set_result(sent)

    def _tidy(self, place: Place) -> None:
        """Offer what was just committed to the second store, and delete what the policy does not keep."""
        now = self._chain(place.epoch)
        if self._second is not None:
            self._second.offer(place, self.policy.kept(now))
        self._guard()
        used = self._second.used() if self._second is not None else set()
        for old in superfluous(self.policy, Folders.of(self.store), now, place, used):
            delete_folder(self.store, old)
        self.store.sweep()  # of writers that were killed


def _object(taken: Snapshot, file: File) -> Object:
    return Object(file.name, file.size, lambda: taken.chunks(file), lambda: taken.done(file))


def _rebuilt(abstract: Any, specs: Any, step: int, array: Callable[[], Any]) -> Any:
    """A state like `abstract`, its arrays taken one by one in the order of `sections`."""

    def tree(like: Any) -> Any:
        return beside(specs, lambda _, one: None if one is None else array(), like)

    params, mu, nu = tree(abstract.params), tree(abstract.moments.mu), tree(abstract.moments.nu)
    count = jax.make_array_from_callback(
        (), abstract.step.sharding, lambda _: np.asarray(step, abstract.step.dtype), dtype=abstract.step.dtype
    )
    return replace(abstract, step=count, params=params, moments=replace(abstract.moments, mu=mu, nu=nu))
