"""What can be wrong with a training run that a user describes."""


class TrainError(ValueError):
    """A setting of a run that makes no sense; the message names it, its value, and what to write instead."""


class MeshError(TrainError):
    """A mesh that does not fit the chips, the model or the batch."""
