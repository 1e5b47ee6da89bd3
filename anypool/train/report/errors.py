"""What can be wrong with a question about runs."""

from anypool.train.errors import TrainError


class RunError(TrainError):
    """A run or a store of runs that is not there, or cannot be shown as asked. The message says what to do."""
