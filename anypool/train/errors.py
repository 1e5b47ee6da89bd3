"""What can be wrong with a training run that a user describes."""

from anypool.pools.tables import TableError


class TrainError(ValueError):
    """A setting of a run that makes no sense; the message names it, its value, and what to write instead."""


class RunFileError(TrainError, TableError):
    """A mistake in a run file; the message names the place, the value and what to do."""


class MeshError(TrainError):
    """A mesh that does not fit the chips, the model or the batch."""


class RunFailedError(TrainError):
    """A run that can not go on; what was committed is kept."""
