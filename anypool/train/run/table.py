"""Tables of a run file: those of a fleet file, with getters that always give a value."""

from __future__ import annotations

from typing import Any

from anypool.pools.tables import Table
from anypool.train.errors import RunFileError


class RunTable(Table):
    """One table of a run file; every mistake is a RunFileError."""

    def __init__(self, data: Any, **where: Any) -> None:
        super().__init__(data, **where, mistake=RunFileError)

    def whole(self, key: str, default: int | None, *, low: int, example: int, high: int | None = None) -> int:
        """A whole number in `low..high`; without a default the key has to be there."""
        value = self.integer(key, default, low=low, high=high, example=example)
        if value is None:
            raise self.error(None, f"needs {key}, for example {key} = {example}")
        return value

    def real(self, key: str, default: float, *, above: float, example: float, equal: bool = False) -> float:
        """A finite number above `above`, or equal to it where `equal` says so."""
        value = self.number(key, default, above=above, example=example, equal=equal)
        assert value is not None
        return value

    def divides(self, what: str, size: int, key: str, parts: int) -> None:
        """Raises RunFileError if `parts`, the value of `key`, does not divide `size`; says what does."""
        if size % parts:
            divisors = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
            raise self.error(key, f"{key} = {parts} does not divide {what} {size}; what divides: {divisors}")
