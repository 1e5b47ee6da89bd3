"""Checkpoints: Hugging Face model directories with the optimizer beside them, in any store, for any mesh.

- `Checkpoints(store, files, policy)`: `.save` beside the training, `.committed`, `.latest`, `.restore` onto any mesh;
- `Policy`: type of the weights, size of files, which checkpoints stay;
- `CheckpointInfo`, `Pending`: one that is there, one that is being written;
- `Verify`: how much of a checkpoint is hashed when it is restored;
- `CheckpointError` (ValueError) and its kinds; what a store or a lease raises comes as it is.

README.md says what is in a checkpoint and what is verified when.
"""

from anypool.train.checkpoint.errors import (
    ArchitectureError,
    CheckpointError,
    HostsMissingError,
    MissingTensorError,
    UncommittedError,
)
from anypool.train.checkpoint.keep import Policy
from anypool.train.checkpoint.restore import Verify
from anypool.train.checkpoint.saver import CheckpointInfo, Checkpoints, Pending

__all__ = [
    "ArchitectureError",
    "CheckpointError",
    "CheckpointInfo",
    "Checkpoints",
    "HostsMissingError",
    "MissingTensorError",
    "Pending",
    "Policy",
    "UncommittedError",
    "Verify",
]
