"""From what a user asks to questions: the model's configuration, the jobs, and how each target is divided."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from anypool.check.errors import CheckError
from anypool.check.memory import predict
from anypool.check.question import JOBS, Question
from anypool.chips import Chip, Target
from anypool.models import BUNDLED, ModelConfig, ModelNotFoundError, resolve
from anypool.models.config import read_json
from anypool.train import MeshError, MeshShape
from anypool.train.optimizer import OPTIMIZERS
from anypool.train.remat import check_policy

CONFIGS = Path(__file__).parent / "configs"
DEFAULT_SEQ = 4096
DEFAULT_STREAMS = {"decode": 32, "prefill": 1}
WIDEST_FSDP = 128
WIDEST_TENSOR = 8
ROOM = 0.92
"""A worker is spread over more devices until its predicted memory is below this part of a device's."""


@dataclass(frozen=True)
class Options:
    """What is asked of every target. None takes the default of the job and the chip."""

    jobs: tuple[str, ...] = JOBS
    batch: int | None = None
    seq: int | None = None
    dtype: str | None = None
    mesh: str | None = None
    optimizer: str = "adamw"
    remat: str = "full"
    micro_batches: int = 1

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise CheckError(f"--optimizer is {self.optimizer!r}; there are {', '.join(OPTIMIZERS)}")
        check_policy(self.remat)
        for name in ("batch", "seq", "micro_batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CheckError(f"--{name.replace('_', '-')} is {value}; at least 1 is expected")


def parse_jobs(text: str) -> tuple[str, ...]:
    """Jobs with commas between them, or "all". Raises CheckError."""
    if text == "all":
        return JOBS
    asked = tuple(part.strip() for part in text.split(","))
    for job in asked:
        if job not in JOBS:
            raise CheckError(f"--job is {text!r}; there are {', '.join(JOBS)} and all")
    return tuple(dict.fromkeys(asked))


def known_models() -> list[str]:
    """Names of the configurations that come with this package."""
    return sorted(file.stem for file in CONFIGS.glob("*.json"))


def read_model(model: str) -> tuple[str, dict[str, Any]]:
    """A name for reports, and the content of the model's `config.json`. No weight is read.

    model: the name of a configuration that comes with this package, a `config.json`, a directory that has one, a
        bundled model, a GGUF file or a hub id, of which only `config.json` is fetched.

    Raises ModelError.
    """
    path = Path(model).expanduser()
    if (CONFIGS / f"{model}.json").is_file() and not path.exists():
        return _checked(model, read_json(CONFIGS / f"{model}.json"), model)
    if path.suffix == ".json" and path.is_file():
        return _checked(path.parent.name if path.name == "config.json" else path.stem, read_json(path), path.name)
    if path.is_dir() and (path / "config.json").is_file():
        return _checked(path.resolve().name, read_json(path / "config.json"), "config.json")
    if (
        model not in BUNDLED
        and not path.exists()
        and re.fullmatch(r"[\w.-]+/[\w.-]+", model)
        and path.suffix != ".gguf"
    ):
        return _checked(model, read_json(_fetch_config(model)), "config.json")
    if model not in BUNDLED and not path.exists():
        raise ModelNotFoundError(
            f"there is no model {model!r}: give a config.json, a Hugging Face directory or id, a GGUF file, "
            f"or one of {', '.join([*BUNDLED, *known_models()])}"
        )
    return _checked(path.stem if path.exists() else model, read_json(resolve(model) / "config.json"), "config.json")


def _checked(name: str, config: dict[str, Any], file: str) -> tuple[str, dict[str, Any]]:
    ModelConfig.from_hf(config, file)
    return name, config


def _fetch_config(model: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, "config.json"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelNotFoundError(f"the config.json of {model!r} cannot be fetched: {reason}") from error


def question(config: dict[str, Any], target: Target, job: str, options: Options) -> Question:
    """The question for one target and job, with every default filled in.

    Raises CheckError or MeshError for options that do not fit the target or the model.
    """
    model = ModelConfig.from_hf(config)
    seq = options.seq or min(DEFAULT_SEQ, model.max_position)
    if seq > model.max_position:
        raise CheckError(f"--seq is {seq}; the model's max_position_embeddings is {model.max_position}")
    dtype = options.dtype or ("float32" if target.chip.name == "cpu" else "bfloat16")
    asked = Question(config, str(target), job, {}, 1, 1, seq, dtype, options.optimizer, options.remat)
    if job == "train":
        return _training(asked, model, target, options)
    return _serving(asked, model, target, options)


def device_count(target: Target) -> int:
    """JAX devices of a target; one a chip where it is not known."""
    return target.devices or target.chips


def capacity(chip: Chip) -> int | None:
    """Bytes of memory that one device can use, None if no source says."""
    if chip.usable_hbm_bytes_per_device is not None:
        return int(chip.usable_hbm_bytes_per_device.value)
    if chip.hbm_bytes is None:
        return None
    devices = chip.devices_per_chip
    return int(chip.hbm_bytes.value / (devices.value if devices else 1))


def _training(asked: Question, model: ModelConfig, target: Target, options: Options) -> Question:
    devices = device_count(target)
    if options.mesh is None:
        mesh = training_mesh(model, devices, asked.seq)
    else:
        mesh = MeshShape.parse(options.mesh)
        if mesh.devices != devices:
            raise MeshError(f"--mesh {options.mesh} has {mesh.devices} devices; {target} has {devices}")
    rows = mesh.data * mesh.fsdp * options.micro_batches
    sizes = {"data": mesh.data, "fsdp": mesh.fsdp, "sequence": mesh.sequence, "tensor": mesh.tensor}
    return replace(asked, mesh=sizes, batch=options.batch or rows, micro_batches=options.micro_batches)


def training_mesh(model: ModelConfig, devices: int, seq: int) -> MeshShape:
    """Parameters over as many devices as divide them, up to 128; then heads, up to 8; copies over the rest."""
    fsdp = max(n for n in _divisors(devices) if model.hidden_size % n == 0 and n <= WIDEST_FSDP)
    rest = devices // fsdp
    fits = [n for n in _divisors(rest) if n <= WIDEST_TENSOR and tensor_divides(model, n) and seq % n == 0]
    tensor = max(fits)
    return MeshShape(data=rest // tensor, fsdp=fsdp, tensor=tensor)


def tensor_divides(model: ModelConfig, tensor: int) -> bool:
    """Whether a model can be divided along its heads, MLP width and vocabulary."""
    sizes = (model.num_heads, model.num_kv_heads, model.intermediate_size, model.vocab_size)
    return all(size % tensor == 0 for size in sizes)


def _serving(asked: Question, model: ModelConfig, target: Target, options: Options) -> Question:
    devices = device_count(target)
    asked = replace(asked, batch=options.batch or DEFAULT_STREAMS[asked.job])
    if options.mesh is not None:
        mesh = MeshShape.parse(options.mesh)
        if mesh.fsdp > 1 or mesh.sequence > 1:
            raise MeshError(
                f"--mesh {options.mesh}: a serving worker is divided along tensor only; the rest is workers"
            )
        if devices % (mesh.tensor * mesh.data) or (mesh.data > 1 and mesh.devices != devices):
            raise MeshError(f"--mesh {options.mesh} has {mesh.devices} devices; {target} has {devices}")
        if not tensor_divides(model, mesh.tensor):
            raise MeshError(
                f"--mesh {options.mesh}: tensor {mesh.tensor} does not divide num_attention_heads {model.num_heads}, "
                f"num_key_value_heads {model.num_kv_heads}, intermediate_size {model.intermediate_size} "
                f"and vocab_size {model.vocab_size}"
            )
        return worker(asked, target, mesh.tensor)
    widths = [n for n in _divisors(devices) if tensor_divides(model, n) and n <= WIDEST_TENSOR]
    room = capacity(target.chip)
    for tensor in widths:
        made = worker(asked, target, tensor)
        if room is None or sum(predict(made).values()) <= ROOM * room:
            return made
    return worker(asked, target, widths[-1])


def worker(asked: Question, target: Target, tensor: int) -> Question:
    """A serving worker over `tensor` devices of a target, in the smallest topology that exists and holds it whole."""
    devices = device_count(target)
    per_chip = devices // target.chips
    needed = max(1, tensor // per_chip)
    topology = target.topology
    for chips in range(needed, target.chips, needed):
        shape = target.chip.topology.near(chips)
        if shape is not None and math.prod(shape) == chips and (chips * per_chip) % tensor == 0:
            topology = shape
            break
    smaller = Target(target.chip, topology)
    # What a worker leaves of its topology runs copies of it.
    copies = device_count(smaller) // tensor
    return replace(asked, target=str(smaller), mesh={"data": copies, "tensor": tensor}, workers=devices // tensor)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def describe(asked: Question) -> str:
    """A question's shape in a few words, for reports."""
    size = f"{asked.batch} x {asked.seq} tokens"
    if asked.job == "train":
        return f"{size}, mesh {asked.mesh_text()}, {asked.dtype}, {asked.optimizer}, remat {asked.remat}"
    what = f"{asked.batch} streams of {asked.seq}" if asked.job == "decode" else f"{asked.chunk} tokens of {size}"
    return f"{what}, tensor={asked.mesh.get('tensor', 1)}, {asked.workers} workers, {asked.dtype}"
