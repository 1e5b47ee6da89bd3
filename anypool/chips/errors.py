"""What can be wrong with the name of a chip, with a target, and with the data files. All are `ValueError`s."""

import difflib
from collections.abc import Iterable


class ChipError(ValueError):
    """A chip, a target or a data file that cannot be used as given."""


class UnknownChipError(ChipError):
    """A name that no file in this room has; the message suggests the nearest one."""


class TargetError(ChipError):
    """A target that does not exist, such as `v5e:3x5`; the message says which do."""


class ChipFileError(ChipError):
    """A mistake in a chip's TOML file. The message names the file, the field, the value and the fix."""


class PriceError(ChipError):
    """A mistake in a table of prices. The message names the file, the line, the field, the value and the fix."""


def nearest(wrong: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing when no name is close."""
    close = difflib.get_close_matches(wrong.lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
