"""Training: a run that belongs to nobody's chips.

This room's own names are the step, which other rooms compile, measure and run; below it are `data`, `checkpoint`,
`report` and `run`, each with names of its own.

- `TrainStep(StepConfig, mesh, kernels)`: one update, called or lowered from shapes alone;
- `OptimizerConfig`, `Schedule`: AdamW and Muon, and their learning rates;
- `LoraConfig`: adapters to train beside frozen weights (`lora` has their files and what merges them);
- `Batch`: packed rows of tokens with targets, segments and positions;
- `rows_here`, `place_batch`: this process's part of a batch, and the whole batch on the mesh;
- `MeshShape`, `make_mesh`: how the step is spread over devices;
- `TrainError`, `MeshError`: settings that make no sense.
"""

from anypool.train.batch import Batch, place_batch, rows_here
from anypool.train.errors import MeshError, TrainError
from anypool.train.lora import LoraConfig
from anypool.train.optimizer import OptimizerConfig, Schedule
from anypool.train.sharding import MeshShape, make_mesh, single_device
from anypool.train.step import Metrics, StepConfig, TrainState, TrainStep

__all__ = [
    "Batch",
    "LoraConfig",
    "MeshError",
    "MeshShape",
    "Metrics",
    "OptimizerConfig",
    "Schedule",
    "StepConfig",
    "TrainError",
    "TrainState",
    "TrainStep",
    "make_mesh",
    "place_batch",
    "rows_here",
    "single_device",
]
