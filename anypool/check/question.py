"""One question of a check: this model, on these chips, for this job. Plain data, to be answered by another process."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import anypool
from anypool.chips import Target
from anypool.models import ModelConfig

JOBS = ("train", "prefill", "decode")


@dataclass(frozen=True)
class Question:
    """What is compiled, for one worker or one run.

    config: the model's `config.json`. target: chips and topology that the program is for; a serving worker takes a
        part of what was asked about. mesh: devices along each axis, whose product is the target's devices.
    workers: how many such programs the asked target holds side by side.
    batch: rows of the global batch (train), or streams of one worker (prefill, decode). seq: their length in tokens.
    micro_batches: into how many parts a training batch is divided.
    """

    config: dict[str, Any]
    target: str
    job: str
    mesh: dict[str, int]
    workers: int
    batch: int
    seq: int
    dtype: str
    optimizer: str = "adamw"
    remat: str = "full"
    micro_batches: int = 1

    @property
    def model(self) -> ModelConfig:
        return ModelConfig.from_hf(self.config)

    @property
    def devices(self) -> int:
        """JAX devices of one program."""
        return math.prod(self.mesh.values())

    @property
    def chips(self) -> Target:
        return Target.parse(self.target)

    @property
    def tokens(self) -> int:
        """Tokens that one program computes in one step."""
        return {"train": self.batch * self.seq, "prefill": self.batch * self.chunk, "decode": self.batch}[self.job]

    @property
    def chunk(self) -> int:
        """Prompt tokens of each stream in a prefill step, which is the last of a prompt of `seq` tokens."""
        return min(self.seq, PREFILL_CHUNK)

    def mesh_text(self) -> str:
        """The mesh as `--mesh` takes it."""
        return ",".join(f"{axis}={size}" for axis, size in self.mesh.items() if size > 1) or "one device"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Question:
        return cls(**data)

    def key(self, compiler: str) -> str:
        """Names the answer: what is asked, our code that is compiled, and by which compiler."""
        text = json.dumps([self.as_json(), compiler, _code_digest()], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


PREFILL_CHUNK = 512


# What the process that compiles runs of this room; the rest only asks and judges.
_COMPILING = ("child", "count", "gpu", "hlo", "jobs", "lint", "neuron_rules", "neuronx", "question", "stablehlo")


@cache
def _code_digest() -> str:
    """Of every file of ours that can change a program or what is read off it."""
    root = Path(anypool.__file__).parent
    files = [file for room in ("chips", "engine", "models", "ops") for file in (root / room).rglob("*")]
    files += (root / "train").glob("*")  # the step; what is below runs around it
    files += [root / "check" / f"{name}.py" for name in _COMPILING]
    digest = hashlib.blake2b(digest_size=12)
    for file in sorted(files):
        if file.suffix in (".py", ".toml", ".cc"):
            digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()
