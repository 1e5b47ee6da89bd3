"""The same training in Anypool and in PyTorch, side by side: tokens per second, and whether the losses agree.

    python benchmarks/train.py --peer-python PYTHON [--case small --case smollm2-135m] [--format json]

PYTHON is an interpreter that has PyTorch and transformers. Both start from the same weights, see the same batches and
use the same optimizer, in f32, each in a process of its own; they take turns of a few steps, and the one that waits
computes nothing. Ours trains as `train.defaults` says for this platform. Figures are medians over all steps of all
rounds after the first, which compiles. CPU ms is the time of all threads of a process: on a machine that others use
too it says more than the clock, but threads that wait for each other may spin.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from anypool.train.run.launch import KEEP_MEMORY

PEER = Path(__file__).with_name("train_peer.py")
OPTIMIZER = {"learning_rate": 3e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0}
AGREE = 2e-3
"""How far the losses of two engines may be apart, as a part of them: f32 sums in another order, some steps on."""


@dataclass(frozen=True)
class Case:
    """What is trained. model: a bundled name, or None for a model made from nothing. rows, length: of one batch."""

    model: str | None
    rows: int
    length: int


CASES = {"small": Case(None, 16, 256), "smollm2-135m": Case("smollm2-135m-instruct", 4, 256)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="a Python that has PyTorch and transformers; without it ours runs alone")
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="give it several times; all by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of PyTorch; ours uses all")
    parser.add_argument("--compile", action="store_true", help="a third run: PyTorch under torch.compile")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)  # the process that trains ours
    arguments = parser.parse_args()
    if arguments.serve:
        serve(Path(arguments.serve[0]), json.loads(arguments.serve[1]))
        return
    results = [measure(name, arguments) for name in arguments.case or sorted(CASES)]
    if arguments.format == "json":
        print(json.dumps(results, indent=2))
    else:
        show(results)
    if not all(result["losses_agree"] for result in results):
        raise SystemExit("the losses do not agree")


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All engines in turns on one case."""
    case = CASES[name]
    with contextlib.ExitStack() as stack:
        directory = model_directory(case, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        settings = OPTIMIZER | {"threads": arguments.threads, "compile": False}
        engines = {"anypool": stack.enter_context(engine([sys.executable, __file__, "--serve"], directory, settings))}
        if arguments.peer_python:
            peer = [arguments.peer_python, str(PEER)]
            engines["pytorch"] = stack.enter_context(engine(peer, directory, settings))
            if arguments.compile:
                compiled = settings | {"compile": True}
                engines["pytorch compiled"] = stack.enter_context(engine(peer, directory, compiled))
        vocabulary = json.loads((directory / "config.json").read_text())["vocab_size"]
        seconds: dict[str, list[float]] = {label: [] for label in engines}
        cpu_seconds: dict[str, list[float]] = {label: [] for label in engines}
        losses: dict[str, list[float]] = {label: [] for label in engines}
        for turn in range(arguments.rounds + 1):
            batches = [batch(case, vocabulary, turn * arguments.steps + i) for i in range(arguments.steps)]
            for label, process in engines.items():
                answer = process.ask(tokens=[rows.tolist() for rows in batches])
                losses[label] += answer["losses"]
                if turn:
                    seconds[label] += answer["seconds"]
                    cpu_seconds[label] += answer["cpu_seconds"]
    tokens = case.rows * case.length
    ours = statistics.median(seconds["anypool"])
    rows = [
        {
            "engine": label,
            "about": engines[label].about,
            "step_ms": round(statistics.median(seconds[label]) * 1e3, 1),
            "cpu_ms": round(statistics.median(cpu_seconds[label]) * 1e3, 1),
            "tokens_per_second": round(tokens / statistics.median(seconds[label]), 1),
            "anypool_is_faster_by": round(statistics.median(seconds[label]) / ours, 3),
            "first_loss": round(losses[label][0], 5),
            "last_loss": round(losses[label][-1], 5),
        }
        for label in engines
    ]
    apart = max(abs(a / b - 1) for one in losses.values() for a, b in zip(losses["anypool"], one, strict=True))
    return {
        "case": name,
        "rows": case.rows,
        "length": case.length,
        "steps": len(seconds["anypool"]),
        "losses_apart": apart,
        "losses_agree": apart < AGREE,
        "engines": rows,
    }


def show(results: list[dict[str, Any]]) -> None:
    for result in results:
        verdict = "agree" if result["losses_agree"] else "DO NOT AGREE"
        print(
            f"\n{result['case']}: {result['rows']} rows of {result['length']} tokens, "
            f"medians of {result['steps']} steps; losses {verdict}, at most {result['losses_apart']:.1e} apart"
        )
        print(
            f"{'engine':<18}{'step ms':>9}{'CPU ms':>9}{'tokens/s':>10}{'anypool':>9}"
            f"{'first loss':>12}{'last loss':>11}"
        )
        for row in result["engines"]:
            print(
                f"{row['engine']:<18}{row['step_ms']:9}{row['cpu_ms']:9}{row['tokens_per_second']:10}"
                f"{row['anypool_is_faster_by']:8}x{row['first_loss']:12}{row['last_loss']:11}"
            )
        for row in result["engines"]:
            print(f"  {row['engine']}: {', '.join(f'{k} {v}' for k, v in row['about'].items())}")


def batch(case: Case, vocabulary: int, step: int) -> np.ndarray:
    """Rows that count in strides, so that there is something to learn: a pure function of the step."""
    generator = np.random.default_rng(step)
    start, stride = generator.integers(0, vocabulary, (case.rows, 1)), generator.integers(1, 8, (case.rows, 1))
    return (start + stride * np.arange(case.length)) % vocabulary


def model_directory(case: Case, folder: Path) -> Path:
    """A Hugging Face directory that both engines read."""
    from anypool.models import ModelConfig, RopeConfig, resolve
    from anypool.models.decoder import Decoder
    from anypool.models.params import all_specs, specs
    from anypool.models.weights import Pending, write_safetensors

    if case.model is not None:
        return resolve(case.model)
    config = ModelConfig(
        model_type="llama", vocab_size=4096, hidden_size=384, intermediate_size=1024, num_layers=8, num_heads=6,
        num_kv_heads=2, head_dim=64, max_position=1024, rms_norm_eps=1e-5, rope=RopeConfig(),
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    tensors = [
        Pending(spec.name, np.dtype(np.float32), spec.shape, partial(spec.initial, seed=0))
        for spec in all_specs(specs(Decoder, config))
    ]
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


@dataclass
class Engine:
    process: subprocess.Popen[str]
    about: dict[str, Any]

    def ask(self, **message: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps(message), file=self.process.stdin, flush=True)
        return _read(self.process)


@contextlib.contextmanager
def engine(command: list[str], directory: Path, settings: dict[str, Any]) -> Iterator[Engine]:
    """A process that trains when asked."""
    ours = {} if command[-1] == str(PEER) else {"GLIBC_TUNABLES": KEEP_MEMORY}  # as a trainer has it
    process = subprocess.Popen(
        [*command, str(directory), json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | ours,
    )
    try:
        about = _read(process)
        if "error" in about:
            raise SystemExit(
                f"--peer-python {command[0]}: {about['error']}: name a Python that has PyTorch and transformers "
                "(pip install torch transformers)"
            )
        yield Engine(process, about.pop("versions") | about)
    finally:
        process.kill()
        process.wait()


def _read(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{process.args!r} ended with exit code {process.wait()}; see what it wrote above")
    message: dict[str, Any] = json.loads(line)
    return message


def serve(directory: Path, settings: dict[str, Any]) -> None:
    """Ours, told what to do as the peer is."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import jax.numpy as jnp

    from anypool.models import Checkpoint, ModelConfig
    from anypool.models.params import load
    from anypool.ops import choose
    from anypool.train import Batch, OptimizerConfig, Schedule, StepConfig, TrainStep, single_device
    from anypool.train.defaults import step_defaults

    model = ModelConfig.load(directory)
    optimizer = OptimizerConfig(
        Schedule(settings["learning_rate"], 1000, kind="constant"),
        **{name: settings[name] for name in ("beta1", "beta2", "eps", "weight_decay")},
    )
    defaults = step_defaults("cpu")
    config = StepConfig(
        model,
        optimizer,
        compute_dtype="float32",
        clip_norm=settings["clip_norm"],
        remat=defaults["remat"],
        layers=defaults["layers"],
    )
    kernels = choose("cpu", jnp.float32, model.head_dim, train=True)
    params = load(config.specs, Checkpoint.open(directory), lambda spec, array: np.array(array, np.float32))
    step = TrainStep(config, single_device(), kernels)
    state = step.place(params)
    del params
    _say(
        versions={"jax": jax.__version__}, kernels=" ".join(f"{k}={v}" for k, v in kernels.report().items()), **defaults
    )
    for line in sys.stdin:
        seconds, cpu_seconds, losses = [], [], []
        for rows in json.loads(line)["tokens"]:
            tokens = np.array(rows)
            started, used = time.perf_counter(), time.process_time()
            state, metrics = step(state, Batch.from_rows(tokens))
            losses.append(float(metrics.loss))
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - started)
            cpu_seconds.append(time.process_time() - used)
        _say(seconds=seconds, cpu_seconds=cpu_seconds, losses=losses)


def _say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
