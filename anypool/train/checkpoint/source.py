"""The files that come with a model and go with every checkpoint: configuration and tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from anypool.models import ModelConfig
from anypool.train.checkpoint import names
from anypool.train.checkpoint.errors import ArchitectureError, CheckpointError

CONFIG = "config.json"

_KEY = re.compile(r"[A-Za-z0-9._=+@,\-/]+")  # what a store takes; a model's own files are called so

_KEPT = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
    "additional_chat_templates/*.jinja",
)
_NOT_KEPT = ("*.index.json", names.RUN, names.MANIFEST, "part-*.json")

# What a tokenizer or a server decides, not the weights; and what follows from use_sliding_window.
_MAY_DIFFER = {"bos_token_id", "eos_token_id", "max_position_embeddings", "max_window_layers"}
_ADAPTER_FIELDS = ("r", "lora_alpha", "target_modules")


def model_files(directory: Path) -> dict[str, bytes]:
    """Configuration and tokenizer of a Hugging Face directory, by name. Raises CheckpointError if there is neither."""
    files = {}
    for path in sorted({path for pattern in _KEPT for path in directory.glob(pattern)}):
        name = path.relative_to(directory).as_posix()
        left = any(fnmatch(name, pattern) for pattern in _NOT_KEPT)
        if path.is_file() and _KEY.fullmatch(name) and not left:
            files[name] = path.read_bytes()
    return check_files(files, str(directory))


def check_files(files: Mapping[str, bytes], where: str) -> dict[str, bytes]:
    if CONFIG not in files and names.ADAPTER_CONFIG not in files:
        raise CheckpointError(
            f"{where} has neither {CONFIG} nor {names.ADAPTER_CONFIG}, so checkpoints of it could not be read as a "
            "model; name the Hugging Face directory that the model came from"
        )
    return dict(files)


def with_dtype(files: Mapping[str, bytes], dtype: str) -> dict[str, bytes]:
    """The files, with the type of the weights in config.json as it now is: servers take it from there."""
    if CONFIG not in files:
        return dict(files)
    config = json.loads(files[CONFIG])
    spelled = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    if all(config.get(key) == dtype for key in spelled):
        return dict(files)
    config |= dict.fromkeys(spelled, dtype)
    return dict(files) | {CONFIG: (json.dumps(config, ensure_ascii=False, indent=2) + "\n").encode()}


def check_architecture(ours: Mapping[str, bytes], theirs: Mapping[str, bytes], where: str) -> None:
    """Whether a checkpoint's model is this run's. Raises ArchitectureError naming the first field that differs."""
    if CONFIG in ours and CONFIG in theirs:
        pair = [ModelConfig.from_hf(json.loads(files[CONFIG])).to_hf() for files in (ours, theirs)]
        fields: list[str] = sorted(set(pair[0]) | set(pair[1]))
        _compare(CONFIG, pair[0], pair[1], [field for field in fields if field not in _MAY_DIFFER], where)
    if (names.ADAPTER_CONFIG in ours) != (names.ADAPTER_CONFIG in theirs):
        what = ("whole models", "LoRA adapters") if names.ADAPTER_CONFIG in ours else ("LoRA adapters", "whole models")
        raise ArchitectureError(f"{where} is of {what[0]}, and this run trains {what[1]}; start it from another one")
    if names.ADAPTER_CONFIG in ours:
        mine, other = (json.loads(files[names.ADAPTER_CONFIG]) for files in (ours, theirs))
        _compare(names.ADAPTER_CONFIG, mine, other, _ADAPTER_FIELDS, where)


def _compare(file: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], fields: Any, where: str) -> None:
    for field in fields:
        mine, other = _plain(ours.get(field)), _plain(theirs.get(field))
        if mine != other:
            raise ArchitectureError(
                f"{where} is of another model: {field} is {other!r} in its {file}, and {mine!r} in this run's; "
                "name the model that the checkpoint is of, or another checkpoint"
            )


def _plain(value: Any) -> Any:
    """Lists that are sets in truth, in one order."""
    return sorted(value) if isinstance(value, list) and all(isinstance(one, str) for one in value) else value
