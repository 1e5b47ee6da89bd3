"""What can be wrong with the texts that a run learns from."""

from anypool.train.errors import TrainError


class DataError(TrainError):
    """Texts that cannot be used; the message names the file, the place in it, and what to do."""
