"""A checkpoint out of its store, as a model directory for other tools: without the optimizer, adapters merged."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import partial
from pathlib import Path

import jax
import numpy as np

from anypool.models import ModelConfig, resolve
from anypool.models.decoder import Decoder
from anypool.models.params import Spec, specs
from anypool.models.weights import Pending, write_safetensors
from anypool.store import Manifest, Store, load
from anypool.train.checkpoint import CheckpointInfo, Checkpoints
from anypool.train.errors import TrainError
from anypool.train.lora import load_adapter, merge
from anypool.train.run.directory import MODEL_FILES
from anypool.train.run.state import read_weights

ADAPTER_CONFIG = "adapter_config.json"


class ExportError(TrainError):
    """A checkpoint that cannot be brought out, or not to where it was asked for."""


def export(store_url: str, run: str, out: Path, step: int | None = None) -> Path:
    """Writes a committed checkpoint of a run into the folder `out`, which must not exist or be empty; returns it.

    step: which one; None for the last. Every file is compared with its hash on the way. Adapters are merged into the
    weights of the model they belong to, in f32 sums and the model's own dtypes.

    Raises ExportError, ModelError, CorruptObjectError.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} is there already; name a folder that is not")
    if not out.absolute().parent.is_dir():
        raise ExportError(f"{out}: there is no folder {out.absolute().parent}; make it first")
    place = Store.open(store_url).at(f"runs/{run}")
    info = _chosen(place, run, step)
    # Made beside and moved as a whole, so that a folder that is there is complete.
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.") as beside:
        made = Path(beside) / "model"
        made.mkdir()
        _fetch(place.at(info.folder), load(place, info.folder), made)
        if (made / ADAPTER_CONFIG).is_file():
            _merge(made)
        if out.exists():
            out.rmdir()
        made.rename(out)
    return out


def _chosen(place: Store, run: str, step: int | None) -> CheckpointInfo:
    committed = Checkpoints(place, None).committed()
    if not committed:
        raise ExportError(
            f"run {run!r} in {place.url} has no committed checkpoint; `anypool runs list` shows what there is"
        )
    if step is None:
        return committed[0]
    for info in committed:
        if info.step == step:
            return info
    known = ", ".join(str(info.step) for info in committed)
    raise ExportError(f"step {step} of run {run!r} is not committed; these are: {known}")


def _fetch(source: Store, manifest: Manifest, folder: Path) -> None:
    target = Store.open(str(folder))
    for name, expected in manifest.objects.items():
        if name.startswith("optimizer") or name == "run.json":
            continue
        copied = target.copy_from(source, name)
        if copied.blake3 != expected.blake3:
            raise ExportError(f"{source.url}/{name} has the hash {copied.blake3}, and {expected.blake3} was written")


def _merge(folder: Path) -> None:
    """Replaces an adapter by the model with it merged in."""
    base_id = json.loads((folder / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
    base = resolve(base_id)
    model = ModelConfig.load(base)
    declared = specs(Decoder, model)
    lora, adapters = load_adapter(folder, model)
    merged = merge(read_weights(base_id, declared), adapters, lora)
    leaves = jax.tree.leaves(declared, is_leaf=lambda leaf: isinstance(leaf, Spec))
    tensors = [
        Pending(spec.name, np.dtype(array.dtype), array.shape, partial(np.asarray, array))
        for spec, array in zip(leaves, jax.tree.leaves(merged), strict=True)
    ]
    write_safetensors(folder / "model.safetensors", tensors)
    for name in MODEL_FILES:
        if (base / name).is_file() and not (folder / name).is_file():
            shutil.copyfile(base / name, folder / name)
    for path in folder.glob("adapter_*"):
        path.unlink()


__all__ = ["ExportError", "export"]
