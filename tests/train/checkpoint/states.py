"""States whose every number is known, and the checkpoints of a tiny run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from anypool.models.params import Spec
from anypool.ops.kernels import reference
from anypool.store import Manifest, Store, commit
from anypool.store.manifest import hash_of
from anypool.train import MeshShape, StepConfig, TrainState, TrainStep, make_mesh
from anypool.train.checkpoint import Checkpoints, Policy
from anypool.train.checkpoint.names import Place
from anypool.train.optimizer import Moments
from tests.train.conftest import MODEL, step_config

FILES = {
    "config.json": json.dumps(MODEL.to_hf()).encode(),
    "generation_config.json": b'{"eos_token_id": 7}',
    "tokenizer_config.json": b"{}",
}


def step_on(mesh: str, layers: str = "scan", **changes: Any) -> TrainStep:
    """A step for the first devices that there are."""
    shape = MeshShape.parse(mesh)
    return TrainStep(
        step_config(layers=layers, **changes), make_mesh(shape, jax.devices()[: shape.devices]), reference()
    )


def numbers(config: StepConfig, step: int) -> TrainState:
    """A state of NumPy arrays: random, and other ones in every part and at every step."""

    def part(name: str, abstract: Any) -> Any:
        def one(spec: Spec, like: Any) -> Any:
            if like is None:
                return None
            named = [_named(member, f"{name}/{step}") for member in spec.members]
            return np.stack(named) if named else _named(spec, f"{name}/{step}")

        return jax.tree.map(one, config.specs, abstract, is_leaf=lambda leaf: isinstance(leaf, Spec))

    shapes = TrainStep(config, make_mesh(MeshShape(), jax.local_devices()[:1]), reference()).abstract_state()
    moments = Moments(mu=part("mu", shapes.moments.mu), nu=part("nu", shapes.moments.nu))
    return TrainState(np.int32(step), part("params", shapes.params), moments)


def _named(spec: Spec, salt: str) -> np.ndarray:
    seed = int.from_bytes(f"{salt}/{spec.name}".encode(), "little")
    made: np.ndarray = np.random.default_rng(seed).standard_normal(spec.shape, np.float32)
    return made


def placed(step: TrainStep, state: TrainState) -> TrainState:
    """A state of NumPy arrays on the step's mesh."""

    def one(like: Any, values: Any) -> Any:
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: np.asarray(values)[index])

    made: TrainState = jax.tree.map(one, step.abstract_state(), state)
    return made


def equal(state: TrainState, expected: TrainState) -> bool:
    """Whether everything that this process holds of a state is, bit by bit, what is expected."""

    def one(array: Any, values: Any) -> bool:
        shards = array.addressable_shards
        return array.dtype == values.dtype and all(
            np.asarray(shard.data).tobytes() == np.asarray(values[shard.index]).tobytes() for shard in shards
        )

    return all(jax.tree.leaves(jax.tree.map(one, state, expected)))


def checkpoints(store: Store | Path, **changes: Any) -> Checkpoints:
    policy = Policy(**{name: changes.pop(name) for name in Policy.__dataclass_fields__ if name in changes})
    store = store if isinstance(store, Store) else Store.open(str(store))
    return Checkpoints(store, changes.pop("files", FILES), policy, **changes)


def commit_with_index(root: Path, folder: str, change: Callable[[dict[str, str]], Any]) -> None:
    """Commits a checkpoint again, as if its writer had made another index of the optimizer."""
    path = root / folder / "optimizer.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    (root / folder / "manifest.json").unlink()
    store = Store.open(str(root))
    step = Place.parse(folder)
    assert step is not None
    below = store.at(folder)
    records = {entry.key: hash_of(below, entry.key) for entry in below.list()}
    commit(store, folder, Manifest(records, {"format": 1, "step": step.step}))
