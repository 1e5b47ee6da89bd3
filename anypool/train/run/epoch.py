"""One epoch of a run in a trainer's process: the pool's devices, the run's data and last commit, the loop, the end."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from anypool.models import ModelConfig
from anypool.models.counts import train_flops_per_token
from anypool.store import CorruptObjectError, Holder, Lease, LeaseLostError, Leases, Store
from anypool.train.checkpoint import Checkpoints, Policy
from anypool.train.lora import adapter_config
from anypool.train.report import PoolFacts, Recorder, RunFacts, Sink, TensorBoardSink, WandbSink
from anypool.train.run import directory
from anypool.train.run.beats import Beats
from anypool.train.run.file import RunFile, RunPool
from anypool.train.run.launch import FENCED, FINISHED, REFUSED, STOPPED, Assignment
from anypool.train.run.probe import Probe

log = logging.getLogger(__name__)


class PoolRefusedError(RuntimeError):
    """This pool is not what the run file says."""


class Epoch:
    """What a trainer does with its assignment. say: tells an event. wanted: 0 go on, 1 commit and stop."""

    def __init__(self, told: Assignment, say: Callable[..., None], wanted: Callable[[], int]) -> None:
        self.told, self.say, self.wanted = told, say, wanted
        self.store = Store.open(told.store)
        self.file: RunFile = directory.submitted(self.store)
        self.pool: RunPool = self.file.pool(told.pool)
        self.leases = Leases(self.store, ttl_seconds=self.file.watch.lease_seconds)
        self.lease = Lease(told.lease, Holder(**told.holder), told.since)
        self.leads = told.host == 0
        self.model_folder: Path = directory.model_folder(self.store)
        self.model = ModelConfig.load(self.model_folder)
        self.probe = Probe()
        self.recorder = self._recorder()

    def run(self) -> int:
        """Trains; returns the process's exit code. Raises what stops it without a word of its own."""
        beats = None
        if self.leads:
            watch = self.file.watch
            beats = Beats(
                self.leases, self.lease, watch.heartbeat_seconds, watch.lease_seconds, self._fenced, self.recorder.known
            )
            beats.start()
        try:
            code, how, reason = self._train()
        except BaseException:
            self.recorder.flush()
            raise
        self.recorder.close(reason)
        if beats is not None:
            beats.stop()
            if code in (FINISHED, STOPPED):
                self.leases.release(self.lease, reason)
        self.say("refused" if code == REFUSED else "ending", how=how, reason=reason)
        return code

    def _train(self) -> tuple[int, str, str]:
        from anypool.train.run.loop import GateRefusedError, GuardStoppedError

        try:
            loop, saver = self._loop()
        except PoolRefusedError as error:
            self.recorder.event("refused", reason=str(error))
            return REFUSED, "refused", str(error)
        try:
            try:
                how = loop.run()
            except GuardStoppedError as error:
                loop.commit(last=True)
                return STOPPED, "guard", str(error)
            except GateRefusedError as error:
                self.say("gate", **error.comparison.as_json())
                return REFUSED, "refused", str(error)
            saver.wait()
            loop.note_commits()
        except LeaseLostError as error:
            return FENCED, "fenced", str(error)
        finally:
            self.probe.close()
            saver.close()
        if how == "finished":
            return FINISHED, how, how
        return STOPPED, how, f"asked to, after step {loop.done}"

    def _loop(self) -> tuple[Any, Any]:
        """Everything the loop works on, each in its phase."""
        self._devices()
        from anypool.engine.runner import persistent_compilation_cache
        from anypool.train.run.loop import Inputs, Loop
        from anypool.train.run.state import make_step
        from anypool.train.run.texts import prepare_texts

        persistent_compilation_cache()
        with self.recorder.phase("data"):
            training, held_out = prepare_texts(self.file, self.model, self.model_folder)
        step = make_step(self.file, self.pool, self.model)
        began = time.perf_counter()
        with self.recorder.phase("restore"):
            saver = self._saver()
            state, base = self._restore(saver, step)
            if self.leads:
                self.leases.set_base(self.lease, None if base is None else Path(base.folder).name)
        self.say(
            "restored",
            step=0 if base is None else base.step,
            folder=base and base.folder,
            seconds=time.perf_counter() - began,
        )
        inputs = Inputs(
            file=self.file,
            pool=self.pool,
            epoch=self.lease.number,
            step=step,
            saver=saver,
            probe=self.probe,
            recorder=self.recorder,
            training=training,
            held_out=held_out,
            say=self.say,
            wanted=self.wanted,
            trace=self.told.trace,
            throttle_seconds=self.told.throttle_seconds,
        )
        return Loop(inputs, state, base), saver

    def _devices(self) -> None:
        """Raises PoolRefusedError if the pool does not have the devices that the run file says."""
        import jax

        if self.told.hosts > 1:
            if self.pool.target.chip.jax_platform == "cpu":
                jax.config.update("jax_cpu_collectives_implementation", "gloo")
            jax.distributed.initialize(self.told.coordinator, self.told.hosts, self.told.host)
        try:
            there = jax.device_count()
        except RuntimeError as error:
            raise PoolRefusedError(f"pool {self.pool.name!r}: {error}") from None
        if there != self.pool.devices:
            raise PoolRefusedError(
                f"pool {self.pool.name!r} is {self.pool.target} with {self.pool.devices} devices, and {there} are here"
            )

    def _saver(self) -> Checkpoints:
        policy = Policy(self.file.checkpoint.keep_last, self.file.checkpoint.keep_every, self.file.checkpoint.dtype)
        copy_to = None
        if self.file.copy_to is not None:
            copy_to = Store.open(self.file.copy_to).at(f"runs/{self.file.name}")
        return Checkpoints(
            self.store,
            self._model_files(),
            policy,
            copy_to=copy_to,
            guard=lambda: self.leases.check(self.lease),
            late=self._late,
            report=self._report,
        )

    def _model_files(self) -> dict[str, bytes] | Path:
        if self.file.lora is None:
            return self.model_folder
        assert self.file.model.id is not None, "the run file's check asks for a model"
        config = adapter_config(self.file.lora, self.file.model.id)
        files = {path.name: path.read_bytes() for path in self.model_folder.iterdir() if path.name != "config.json"}
        return files | {"adapter_config.json": json.dumps(config, indent=2).encode()}

    def _late(self, step: int) -> dict[str, Any]:
        """What the manifest of a checkpoint says of the step after it."""
        recorded = self.probe.wait(step)
        self.recorder.flush()  # what a checkpoint rests on is in the store before it
        return {} if recorded is None else {"gate": recorded}

    def _report(self, problem: str) -> None:
        log.warning("%s", problem)
        self.recorder.event("problem", reason=problem)

    def _restore(self, saver: Checkpoints, step: Any) -> tuple[Any, Any]:
        """(state, what it was restored from); the newest commit, or the one before where that one is damaged."""
        from anypool.train.run.state import base_weights, first_state

        committed = saver.committed()
        for base in committed:
            try:
                state = saver.restore(base, replace(step.abstract_state(), frozen=None), step.config.specs)
            except CorruptObjectError as error:
                self._report(f"{error}; the commit before it is taken")
                self.say("corrupt", folder=base.folder, reason=str(error))
                # Hosts that see different damage must not go on from different commits.
                if self.told.hosts > 1 or base is committed[-1]:
                    raise
                continue
            if self.file.lora is not None:
                state = replace(state, frozen=step.place_frozen(base_weights(self.file, step)))
            return state, base
        return first_state(self.file, step), None

    def _recorder(self) -> Recorder:
        pool = self.pool
        target = pool.target
        facts = PoolFacts(pool.name, target.chip.name, pool.devices, target.chips, pool.usd_per_chip_hour)
        run = RunFacts(
            self.file.steps,
            train_flops_per_token(self.model, self.file.data.sequence_length),
            self.file.compute_dtype,
            self.told.usd_before,
            self.file.watch.lease_seconds,
        )
        sinks = self._sinks() if self.leads else []
        return Recorder(self.store, self.lease.number, facts, sinks, run=run, writes=self.leads)

    def _sinks(self) -> list[Sink]:
        shown: list[Sink] = []
        if self.file.show.tensorboard is not None:
            shown.append(TensorBoardSink(Path(self.file.show.tensorboard) / self.file.name))
        if self.file.show.wandb is not None:
            shown.append(WandbSink(self.file.show.wandb, self.file.name))
        return shown

    def _fenced(self, reason: str) -> None:
        """In the heartbeat's thread: the run is another's, or may be. Nothing more is written, by anyone here."""
        self.say("ending", how="fenced", reason=reason)
        os._exit(FENCED)
