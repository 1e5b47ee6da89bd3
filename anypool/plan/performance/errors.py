"""What can be wrong with a question to the performance model. All are `ValueError`s: field, value and fix."""


class PerformanceError(ValueError):
    """A question that makes no sense or that the known numbers cannot answer."""


class RowsError(PerformanceError):
    """A mistake in a table of rows. The message names the file, the line, the column, the value and the fix."""


class ShapeError(PerformanceError):
    """A model that is not known, or whose sizes contradict each other."""


class DoesNotFitError(PerformanceError):
    """The job needs more memory than the chips have; no speed is given. fewest: chips that would do, or None."""

    def __init__(self, message: str, fewest: int | None) -> None:
        super().__init__(message)
        self.fewest = fewest
