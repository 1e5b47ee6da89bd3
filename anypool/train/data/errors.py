"""What can be wrong with the texts that a run learns from."""

from anypool.train.errors import TrainError


def complaint(error: OSError) -> str:
    """What a person can do about a file that cannot be read or written."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}; what was finished is kept: ask again once that is mended"


class DataError(TrainError):
    """Texts that cannot be used; the message names the file, the place in it, and what to do."""
