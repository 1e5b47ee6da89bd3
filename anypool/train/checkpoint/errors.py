"""What can be wrong with a checkpoint. What a store reports (full, gone, read-only) is raised as it is."""


class CheckpointError(ValueError):
    """A checkpoint, or a setting of checkpoints, that cannot be used; the message names it and says what to do."""


class UncommittedError(CheckpointError):
    """A folder without a manifest: its writer did not get to the end."""


class ArchitectureError(CheckpointError):
    """A checkpoint of another model."""


class MissingTensorError(CheckpointError):
    """A checkpoint lacks a tensor, or a part of one."""


class HostsMissingError(RuntimeError):
    """Other hosts of the run did not write their part of a checkpoint."""
