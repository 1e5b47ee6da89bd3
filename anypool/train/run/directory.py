"""The run directory: what was submitted, and the files of the model that is trained.

`model/` in it has config.json, tokenizer and, of a model to go on from, its generation settings, so that a pool which
never saw the original knows them. The weights to begin with stay where the run file says they are, until the first
checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from anypool.models import resolve
from anypool.paths import cache_dir
from anypool.store import NotFoundError, Store
from anypool.train.errors import RunFileError
from anypool.train.run.file import RunFile, parse_run

RUN_FILE = "run.toml"
SUBMITTED = "submitted.json"
"""Where the run file lay, from where its relative paths start."""
MODEL_FOLDER = "model/"
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
)
"""What of a Hugging Face directory is not weights."""

SAME = ("seed", "model", "lora", "data", "rows", "compute_dtype", "optimizer.kind")
"""What may not change between one submission of a run and the next: it would be another run."""

MakeModel = Callable[[RunFile, Path], None]
"""Writes config.json and tokenizer of a model that begins from nothing into a folder."""


def store_of(file: RunFile) -> Store:
    """The run's directory in its store."""
    return Store.open(file.store).at(f"runs/{file.name}")


def submitted(store: Store) -> RunFile:
    """The run file that a run directory holds. Raises NotFoundError, RunFileError."""
    folder = Path(json.loads(store.get(SUBMITTED))["folder"])
    return parse_run(store.get(RUN_FILE).decode(), file=RUN_FILE, folder=folder)


def submit(file: RunFile, store: Store, make_model: MakeModel) -> bool:
    """Puts a run file and its model's files into the run directory; True if the run is new.

    A later submission may change steps, learning rates, pools, policies: what SAME does not list.

    Raises RunFileError if the directory holds another run by this name.
    """
    new = not store.exists(RUN_FILE)
    if not new:
        _check_same(submitted(store), file)
    store.put(SUBMITTED, json.dumps({"folder": str(file.folder.resolve())}).encode())
    store.put(RUN_FILE, file.text.encode())
    if not store.exists(f"{MODEL_FOLDER}config.json"):
        _put_model_files(file, store, make_model)
    return new


def _put_model_files(file: RunFile, store: Store, make_model: MakeModel) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if file.model.id is not None:
            folder = resolve(file.model.id)
        else:
            make_model(file, folder)
        # config.json last: with it the model is there.
        for name in reversed(MODEL_FILES):
            if (folder / name).is_file():
                store.put(f"{MODEL_FOLDER}{name}", (folder / name).read_bytes())


def model_folder(store: Store) -> Path:
    """The model's files, on this machine. Raises NotFoundError if the run was never submitted."""
    files = {entry.key: store.get(entry.key) for entry in store.list(MODEL_FOLDER)}
    if f"{MODEL_FOLDER}config.json" not in files:
        raise NotFoundError(f"{store.url} holds no run: submit it with `anypool train RUN.toml`")
    digest = hashlib.blake2b(digest_size=16)
    for key, content in sorted(files.items()):
        digest.update(f"{key}\0{len(content)}\0".encode() + content)
    folder = cache_dir() / "train" / "models" / digest.hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    for key, content in files.items():
        path = folder / key.removeprefix(MODEL_FOLDER)
        if not path.is_file():
            # Several trainers may do this at once.
            partial = path.with_name(f"{path.name}.{os.getpid()}")
            partial.write_bytes(content)
            partial.replace(path)
    return folder


def _check_same(before: RunFile, now: RunFile) -> None:
    for name in SAME:
        old, new = _value(before, name), _value(now, name)
        if old != new:
            raise RunFileError(
                f"the run {now.name!r} exists in {now.store} with another {name}: {_short(old)}, and now "
                f"{_short(new)}; give the new run another name"
            )


def _value(file: RunFile, name: str) -> Any:
    found: Any = file
    for part in name.split("."):
        found = getattr(found, part)
    # A model named by a path may be named otherwise from elsewhere; its files are in the run directory.
    return replace(found, id=found.id and Path(found.id).name) if name == "model" else found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 200 else f"{text[:200]}..."
